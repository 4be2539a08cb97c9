"""The numbers of the gossip of offers, each with what it is paid for in bytes or seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GossipSettings:
    """Bounds and rhythms. Seconds unless the name says otherwise.

    offers_max: publishers held; beyond, offers are looked up by topic (`topics.py`). voices_max: suspicions kept per publisher.
    active_wanted: neighbours this node looks for; active_max: neighbours it has before it turns others down, where
    nodes that nobody can dial may go up to active_clients_max, because only dialable nodes can take them in.
    push, digest: how long a new document waits for company before it goes to tree neighbours, and its entry to the others.
    The digest is slow: it is for repair, and a tree of 1000 nodes has delivered before.
    sync: how often one neighbour's book is compared with ours. shuffle: how often samples of peers are exchanged.
    update, updates_burst: how often one publisher's news are taken and passed on.
    syncs_per_minute: how many comparisons one peer may begin.
    probe, tries, probe_timeout, retry: a monitor finds a publisher dead after at most probe + tries x (timeout + retry), 41 s.
    monitors, monitors_trusted: assigned, and how far down the ranking a suspicion still counts, because books differ.
    voices_needed: monitors that must agree. epoch: how long an assignment lasts.
    """

    offers_max: int = 10_000
    voices_max: int = 12
    active_wanted: int = 5
    active_max: int = 6
    active_clients_max: int = 24
    passive_max: int = 30
    push_seconds: float = 0.15
    digest_seconds: float = 4.0
    sync_seconds: float = 60.0
    shuffle_seconds: float = 120.0
    connect_seconds: float = 10.0
    tell_seconds: float = 5.0
    update_seconds: float = 10.0
    updates_burst: int = 3
    syncs_per_minute: float = 2.0
    life_seconds_max: float = 3600.0
    probe_seconds: float = 20.0
    probe_timeout_seconds: float = 4.0
    retry_seconds: float = 3.0
    tries: int = 3
    monitors: int = 6
    monitors_acting: int = 3
    monitors_trusted: int = 12
    voices_needed: int = 2
    epoch_seconds: float = 3600.0

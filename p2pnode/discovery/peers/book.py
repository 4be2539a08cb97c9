"""The peer book: which peers exist, where they may be, and which to dial next. A pure machine.

Addresses are hints from many mouths (mDNS, the owner, the peer itself); none is believed until the handshake has proven
who answers there. Failures back off with jitter so that a restarted network does not dial in step; bans have a cause and
an end, and double when they repeat (go-libp2p and research both found permanent bans to hurt honest peers behind a NAT).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from p2pnode.discovery.peers.entry import (
    SOURCE_BOOK,
    SOURCE_BOOTSTRAP,
    SOURCE_INBOUND,
    SOURCE_MDNS,
    SOURCE_STATIC,
    Dial,
    DialFailed,
    Disconnect,
    Effect,
    Entry,
    Event,
    Forget,
    FoundAgain,
    Heard,
    LinkDown,
    LinkUp,
    Misbehaved,
    Save,
)
from p2pnode.discovery.peers.links import LinkPlan, Why
from p2pnode.discovery.settings import DiscoverySettings
from p2pnode.ids import NodeId
from p2pnode.reasons import Reason

SCORE_MAX: Final = 100.0
SCORE_HALF_LIFE_SECONDS: Final = 3600.0
DIAL_FAILURE_COST: Final = 1.0
VIOLATION_COST: Final = 25.0
SUCCESS_GAIN: Final = 5.0
# Seeds for the next start (geth, p2p/discover/table.go): alive for so long, and seen so recently.
SEED_LIVE_SECONDS: Final = 300.0
SEED_AGE_SECONDS_MAX: Final = 5 * 86400.0
FORGET_CHECK_SECONDS: Final = 600.0
NAMED_SOURCES: Final = frozenset({SOURCE_STATIC, SOURCE_MDNS, SOURCE_BOOTSTRAP})
# Ends of a link that say nothing against the peer: it was there to the last.
QUIET_ENDS: Final = frozenset({
    Reason.IDLE, Reason.SHUTTING_DOWN, Reason.DUPLICATE_SESSION, Reason.DUPLICATE_IDENTITY, Reason.BANNED, Reason.EXPIRED,
    Reason.TOO_MANY_CONNECTIONS,
})  # fmt: skip
# When two nodes hear of each other at once, the one with the larger id lets the other dial first.
YIELD_SECONDS: Final = 0.5
# Causes that no honest, current peer produces. Everything else only costs score.
BAN_CAUSES: Final = frozenset({
    Reason.BAD_SIGNATURE, Reason.WRONG_SIGNER, Reason.TOO_LARGE, Reason.TOO_DEEP, Reason.BAD_FRAME, Reason.FLOW_CONTROL,
    Reason.TOO_MANY_ITEMS, Reason.REPLAYED, Reason.EXTENSION_TYPE, Reason.DUPLICATE_KEY, Reason.WRONG_TYPE, Reason.TRUNCATED,
    Reason.TRAILING_BYTES, Reason.NOT_MINIMAL, Reason.BAD_TENSOR,
})  # fmt: skip


@dataclass(slots=True)
class _StaticAddress:
    address: str
    node_id: NodeId | None = None
    failures: int = 0
    next_dial: float = 0.0
    dialling: bool = False
    source: str = SOURCE_STATIC


@dataclass(slots=True)
class _Book:
    """named: peers of sources that links may be kept for; lost: peers to probe. Both index `entries`."""

    entries: dict[NodeId, Entry] = field(default_factory=dict)
    named: dict[NodeId, None] = field(default_factory=dict)
    lost: dict[NodeId, None] = field(default_factory=dict)
    linked: dict[NodeId, None] = field(default_factory=dict)
    dialling: dict[NodeId, None] = field(default_factory=dict)
    statics: dict[str, _StaticAddress] = field(default_factory=dict)

    def put(self, entry: Entry) -> None:
        """Enter or change an entry."""
        self.entries[entry.node_id] = entry
        node_id = entry.node_id
        if NAMED_SOURCES.isdisjoint(entry.sources):
            self.named.pop(node_id, None)
        else:
            self.named[node_id] = None
        if entry.is_lost:
            self.lost[node_id] = None
        else:
            self.lost.pop(node_id, None)

    def remove(self, node_id: NodeId) -> None:
        """Forget an entry."""
        del self.entries[node_id]
        self.named.pop(node_id, None)
        self.lost.pop(node_id, None)


class PeerBook:
    """Decides whom to dial and remembers how it went.

    Dialled are peers that a link is to be kept with: the owner's, those of `plan`, mDNS's while there is room for them,
    bootstrap nodes while they are needed; and, one at a time, peers that were lost. own_id: never dialled. jitter: a float in
    [0, 1) each call. entries: from disk.
    """

    def __init__(
        self,
        own_id: NodeId,
        settings: DiscoverySettings,
        jitter: Callable[[], float],
        entries: Iterable[Entry] = (),
        plan: LinkPlan | None = None,
    ) -> None:
        self._own_id = own_id
        self._settings = settings
        self._jitter = jitter
        self._plan = plan or LinkPlan(settings.local_links_max, settings.anchors_max)
        self._state = _Book()
        for entry in entries:
            if entry.node_id != own_id:
                self._state.put(entry)
        self._next_probe = 0.0
        self._next_forget = 0.0

    def apply(self, settings: DiscoverySettings) -> None:
        """Use new settings from now on."""
        self._settings = settings

    def add_static(self, address: str, node_id: NodeId | None, now: float, source: str = SOURCE_STATIC) -> list[Effect]:
        """Remember an address that the owner gave; with an id it is an ordinary entry that is never forgotten.

        source: SOURCE_STATIC for a link that is always kept, SOURCE_BOOTSTRAP for one that is opened when it is needed.
        """
        if node_id is not None:
            return self.handle(Heard(node_id, (address,), source), now)
        known = self._state.statics.setdefault(address, _StaticAddress(address, next_dial=now, source=source))
        if source == SOURCE_STATIC:
            known.source = source
        return []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; gives what to do about it."""
        match event:
            case Heard():
                return self._on_heard(event, now)
            case LinkUp():
                return self._on_link_up(event, now)
            case LinkDown():
                return self._on_link_down(event, now)
            case DialFailed():
                return self._on_dial_failed(event, now)
            case Misbehaved():
                return self._on_misbehaved(event, now)

    def tick(self, now: float) -> list[Effect]:
        """Give the dials that are due, as many as the limits leave room for, and forget what is too old."""
        effects: list[Effect] = []
        if now >= self._next_forget:
            self._next_forget = now + FORGET_CHECK_SECONDS
            effects.extend(self._forget_old(now))
        room = min(self._settings.links_max - len(self._state.linked), self._settings.dials_max) - self._dials()
        for static in self._due_statics(now):
            if room <= 0:
                break
            static.dialling, room = True, room - 1
            effects.append(Dial(None, (static.address,)))
        for entry in self._due_entries(now):
            if room <= 0:
                break
            self._state.dialling[entry.node_id] = None
            room -= 1
            effects.append(Dial(entry.node_id, entry.addresses))
        return effects

    @property
    def deadline(self) -> float:
        """When `tick` should run next; infinite when nothing is waiting. While dials fill the limit their end decides."""
        if self._dials() >= self._settings.dials_max or len(self._state.linked) >= self._settings.links_max:
            return float("inf")
        times = [entry.next_dial for entry in self._dialable(self._targets())]
        if times or any(True for _ in self._dialable(self._state.lost)):
            times.append(self._next_probe)
        times += [static.next_dial for static in self._state.statics.values() if self._static_waits(static)]
        return min(times, default=float("inf"))

    def __len__(self) -> int:
        return len(self._state.entries)

    def entries(self) -> list[Entry]:
        """Give every known peer, most recently successful first."""
        return sorted(self._state.entries.values(), key=lambda entry: (-entry.last_success, entry.node_id))

    def good_entries(self, now: float) -> list[Entry]:
        """Give peers fit to enter the network by, best first: seen alive over five minutes and within the last five days.

        Peers reached once come after them: a young network has no others. geth's seeds follow the same two limits.
        """
        oldest = now - SEED_AGE_SECONDS_MAX
        fit = [each for each in self._state.entries.values() if each.last_success >= oldest and each.addresses]
        fit = [each for each in fit if each.banned_until <= now]
        return sorted(fit, key=lambda each: (
            each.last_success - each.first_seen < SEED_LIVE_SECONDS, each.failures, -each.last_success, each.node_id,
        ))  # fmt: skip

    def entry(self, node_id: bytes) -> Entry | None:
        """Give what is known of one peer."""
        return self._state.entries.get(NodeId(node_id))

    def is_linked(self, node_id: bytes) -> bool:
        """Say whether a link to this peer stands."""
        return node_id in self._state.linked

    def is_banned(self, node_id: bytes, now: float) -> bool:
        """Say whether this peer is banned now."""
        entry = self._state.entries.get(NodeId(node_id))
        return entry is not None and entry.banned_until > now

    def may_dial(self, node_id: NodeId) -> bool:
        """Say whether this peer has any part in when the next dial is due."""
        return node_id in self._state.named or node_id in self._state.lost or self._plan.is_kept(node_id)

    def score(self, node_id: bytes, now: float) -> float:
        """Give a peer's score in [-100, 100], halfway back to 0 after an hour."""
        entry = self._state.entries.get(NodeId(node_id))
        return _decayed(entry, now) if entry else 0.0

    def unban(self, node_id: bytes) -> list[Effect]:
        """Lift a ban by the owner's wish."""
        entry = self._state.entries.get(NodeId(node_id))
        return [] if entry is None else self._put(replace(entry, banned_until=0.0, banned_for="", next_dial=0.0))

    def _on_heard(self, event: Heard, now: float) -> list[Effect]:
        if event.node_id == self._own_id:
            return []
        known = self._state.entries.get(event.node_id)
        if known is None:
            effects = self._make_room(now)
            if len(self._state.entries) >= self._settings.peers_max:
                return effects
            wait = YIELD_SECONDS if event.source == SOURCE_MDNS and self._own_id > event.node_id else 0.0
            entry = Entry(event.node_id, (), (), now, now, next_dial=now + wait)
            return effects + self._put(self._with_addresses(entry, event.addresses, event.source))
        changed = self._with_addresses(replace(known, last_seen=now), event.addresses, event.source)
        if changed.addresses[:1] != known.addresses[:1] or set(changed.addresses) - set(known.addresses):
            # A new address is a new chance: try it soon, whatever the old one cost.
            changed = replace(changed, failures=0, next_dial=min(changed.next_dial, now + self._settings.backoff_seconds / 2))
        self._state.put(changed)
        return [Save(changed)] if changed.addresses != known.addresses or changed.sources != known.sources else []

    def _on_link_up(self, event: LinkUp, now: float) -> list[Effect]:
        self._state.dialling.pop(event.node_id, None)
        static = self._state.statics.get(event.address)
        if static is not None:
            static.node_id, static.dialling, static.failures = event.node_id, False, 0
        if event.node_id == self._own_id:
            return []
        source = static.source if static is not None else SOURCE_BOOK if event.address else SOURCE_INBOUND
        known = self._state.entries.get(event.node_id)
        effects: list[Effect] = []
        if known is None:
            effects = self._make_room(now)
            known = Entry(event.node_id, (), (), now, now)
        reached = (event.address,) if event.address else ()
        addresses, sources = self._merged(known, event.claimed, source, reached)
        gain = 0.0 if event.node_id in self._state.linked else SUCCESS_GAIN
        if known.is_lost:
            effects.append(FoundAgain(event.node_id))
        entry = replace(
            known, addresses=addresses, sources=sources, last_seen=now, last_success=now, failures=0, next_dial=now,
            score=_gained(known, gain, now), score_at=now, is_lost=False,
        )  # fmt: skip
        self._state.linked[event.node_id] = None
        self._keep(entry)
        return effects + self._put(entry)

    def _keep(self, entry: Entry) -> None:
        """Enter the reasons that an entry's sources give for keeping the link that has just come up."""
        if SOURCE_STATIC in entry.sources:
            self._plan.want(entry.node_id, Why.STATIC)
        if SOURCE_MDNS in entry.sources:
            self._plan.want(entry.node_id, Why.LOCAL)
        if SOURCE_BOOTSTRAP in entry.sources and self._plan.needs_entry:
            self._plan.want(entry.node_id, Why.ENTRY)

    def _on_link_down(self, event: LinkDown, now: float) -> list[Effect]:
        self._state.linked.pop(event.node_id, None)
        self._plan.release(event.node_id, Why.LOCAL)
        self._plan.release(event.node_id, Why.ENTRY)
        if self._next_probe < now:
            # The probe is for peers that stay lost; a fresh loss waits for its own backoff.
            self._next_probe = now + self._settings.probe_seconds
        entry = self._state.entries.get(event.node_id)
        if entry is None:
            return []
        wait = self._settings.backoff_seconds * (0.5 + self._jitter() / 2)
        if event.reason in (Reason.SHUTTING_DOWN, Reason.TOO_MANY_CONNECTIONS, Reason.BANNED):
            wait *= 15
        for static in self._state.statics.values():
            if static.node_id == event.node_id:
                static.next_dial = now + wait
        if event.reason in QUIET_ENDS:
            # It was alive to the end, which is what makes it a good peer to come back to.
            return self._put(replace(entry, last_seen=now, last_success=now, next_dial=now + wait))
        return self._put(replace(entry, last_seen=now, next_dial=now + wait, is_lost=True))

    def _on_dial_failed(self, event: DialFailed, now: float) -> list[Effect]:
        static = self._state.statics.get(event.address)
        if event.node_id is None:
            if static is not None:
                static.dialling, static.failures = False, static.failures + 1
                static.next_dial = now + self._backoff(static.failures)
            return []
        self._state.dialling.pop(event.node_id, None)
        entry = self._state.entries.get(event.node_id)
        if entry is None or event.node_id in self._state.linked:
            return []
        failures = entry.failures + 1
        entry = replace(
            entry, last_failure=now, failures=failures, next_dial=now + self._backoff(failures),
            score=_gained(entry, -DIAL_FAILURE_COST, now), score_at=now, is_lost=entry.last_success > 0,
        )  # fmt: skip
        if event.reason is Reason.WRONG_PEER and event.address:
            entry = replace(entry, addresses=tuple(each for each in entry.addresses if each != event.address))
        return self._put(entry)

    def _on_misbehaved(self, event: Misbehaved, now: float) -> list[Effect]:
        entry = self._state.entries.get(event.node_id)
        if entry is None:
            return []
        entry = replace(entry, score=_gained(entry, -VIOLATION_COST, now), score_at=now)
        if event.reason not in BAN_CAUSES:
            return self._put(entry)
        length = min(self._settings.ban_seconds * 2.0 ** min(entry.bans, 16), self._settings.ban_seconds_max)
        until = max(entry.banned_until, now + length)
        entry = replace(entry, bans=entry.bans + 1, banned_until=until, banned_for=event.reason.value, next_dial=until)
        return [*self._put(entry), Disconnect(event.node_id, Reason.BANNED)]

    def _with_addresses(self, entry: Entry, claimed: Iterable[str], source: str) -> Entry:
        addresses, sources = self._merged(entry, claimed, source)
        if addresses == entry.addresses and sources is entry.sources:
            return entry
        return replace(entry, addresses=addresses, sources=sources)

    def _merged(
        self, entry: Entry, claimed: Iterable[str], source: str, reached: tuple[str, ...] = ()
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Give addresses and sources: what worked first, then the newest claims, then what was known; bounded."""
        addresses = tuple(dict.fromkeys((*reached, *claimed, *entry.addresses)))[: self._settings.addresses_max]
        return addresses, entry.sources if source in entry.sources else (*entry.sources, source)

    def _put(self, entry: Entry) -> list[Effect]:
        self._state.put(entry)
        return [Save(entry)]

    def _backoff(self, failures: int) -> float:
        longest = min(self._settings.backoff_seconds * 2.0 ** min(failures - 1, 32), self._settings.backoff_seconds_max)
        return longest * (0.5 + self._jitter() / 2)

    def _dials(self) -> int:
        return len(self._state.dialling) + sum(static.dialling for static in self._state.statics.values())

    def _targets(self) -> dict[NodeId, None]:
        """Give the peers that a link should be dialled for."""
        wanted = dict.fromkeys(self._plan.kept())
        has_local_room = self._plan.has_room(Why.LOCAL)
        for node_id in self._state.named:
            sources = self._state.entries[node_id].sources
            if (
                SOURCE_STATIC in sources
                or (SOURCE_MDNS in sources and has_local_room)
                or (SOURCE_BOOTSTRAP in sources and self._plan.needs_entry)
            ):
                wanted[node_id] = None
        return wanted

    def _dialable(self, among: Iterable[NodeId]) -> Iterator[Entry]:
        state = self._state
        for node_id in among:
            entry = state.entries.get(node_id)
            if entry is not None and entry.addresses and node_id not in state.linked and node_id not in state.dialling:
                yield entry

    def _due_entries(self, now: float) -> list[Entry]:
        candidates = [entry for entry in self._dialable(self._targets()) if entry.banned_until <= now]
        due = [entry for entry in candidates if entry.next_dial <= now]
        if now >= self._next_probe:
            # One lost peer at a time, the one tried least, whatever its backoff: this is how a healed partition is noticed.
            lost = [each for each in self._dialable(self._state.lost) if each.banned_until <= now and each not in due]
            lost = lost or ([] if due else candidates)
            if lost:
                due.append(min(lost, key=lambda entry: (entry.failures, -entry.last_success, entry.node_id)))
            self._next_probe = now + self._settings.probe_seconds
        return sorted(due, key=lambda entry: (entry.failures, -entry.last_success, entry.node_id))

    def _static_waits(self, static: _StaticAddress) -> bool:
        if static.dialling or (static.source == SOURCE_BOOTSTRAP and not self._plan.needs_entry):
            return False
        return static.node_id is None or static.node_id not in self._state.linked

    def _due_statics(self, now: float) -> list[_StaticAddress]:
        return [
            static
            for static in self._state.statics.values()
            if static.node_id is None and self._static_waits(static) and static.next_dial <= now
        ]

    def _forget_old(self, now: float) -> list[Effect]:
        oldest = now - self._settings.forget_seconds
        old = [entry.node_id for entry in self._state.entries.values() if self._may_go(entry) and entry.last_seen < oldest]
        return [self._remove(node_id) for node_id in old]

    def _make_room(self, now: float) -> list[Effect]:
        if len(self._state.entries) < self._settings.peers_max:
            return []
        worst = min(
            (entry for entry in self._state.entries.values() if self._may_go(entry)),
            key=lambda entry: (entry.last_success > 0, _decayed(entry, now), entry.last_seen),
            default=None,
        )
        return [] if worst is None else [self._remove(worst.node_id)]

    def _may_go(self, entry: Entry) -> bool:
        return (
            SOURCE_STATIC not in entry.sources
            and SOURCE_BOOTSTRAP not in entry.sources
            and not self._plan.is_kept(entry.node_id)
            and entry.node_id not in self._state.linked
            and entry.node_id not in self._state.dialling
        )

    def _remove(self, node_id: NodeId) -> Effect:
        self._state.remove(node_id)
        return Forget(node_id)


def _decayed(entry: Entry, now: float) -> float:
    return float(entry.score * 0.5 ** (max(0.0, now - entry.score_at) / SCORE_HALF_LIFE_SECONDS))


def _gained(entry: Entry, gain: float, now: float) -> float:
    return max(-SCORE_MAX, min(SCORE_MAX, _decayed(entry, now) + gain))

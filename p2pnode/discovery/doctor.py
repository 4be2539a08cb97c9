"""What is right and wrong with a node's place in the network, each with its evidence and what corrects it. Pure.

The facts are gathered by whoever has them (`api/routes_net.py`); here they become findings, so that each one can be tested.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from p2pnode.discovery.addresses import host_of, is_global

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"
# NTP keeps a clock within a tenth of a second; offers and quotes live for minutes; records may be ten minutes ahead.
SKEW_WARN_SECONDS: Final = 5.0
SKEW_FAIL_SECONDS: Final = 120.0
# Peers whose clocks must have been read before this node's own is blamed.
SKEW_PEERS_MIN: Final = 2
NAT_NONE: Final = "none"
NAT_CONE: Final = "cone"
NAT_SYMMETRIC: Final = "symmetric"
NAT_UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """what: the subject in a few words. state: ok, warn or fail. fix: the command or setting that corrects it, or empty."""

    what: str
    state: str
    evidence: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EntryTrial:
    """One configured bootstrap entry and what came of dialling it. error: empty when it answered."""

    entry: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a node. is_daemon: a running one, not one started for this question.

    profile: of the network settings. listen: the setting; bound: what is bound. reached, failed: groups of peers that could,
    and could not, dial back; confirmed: the addresses at which they did. seen_as: where peers see this node. ports: of links
    that this node dialled, the port sent from and the port seen. skew_seconds: median of `skew_peers` peers' clocks minus
    ours. publications: (name, acks, asked, is stored) of own records.
    """

    is_daemon: bool = True
    profile: str = "lan"
    listen: str = ""
    bound: tuple[str, ...] = ()
    own_addresses: tuple[str, ...] = ()
    mdns_state: str = "off"
    mdns_reason: str = ""
    mdns_advice: str = ""
    role: str = "client"
    reached: int = 0
    failed: int = 0
    confirmed: tuple[str, ...] = ()
    seen_as: tuple[str, ...] = ()
    ports: tuple[tuple[str, str], ...] = ()
    skew_seconds: float | None = None
    skew_peers: int = 0
    is_duplicate: bool = False
    entries: tuple[EntryTrial, ...] = ()
    peers_connected: int = 0
    peers_known: int = 0
    table_entries: int = 0
    network_size: int = 0
    publications: tuple[tuple[str, int, int, bool], ...] = ()


def nat_kind(facts: Facts) -> str:
    """Give the kind of address translation in front of this node: none, cone, symmetric or unknown.

    none: peers see one of this machine's own addresses. symmetric: its outgoing connections appear with other ports, or from
    several hosts, so nobody can guess where the next one comes from. cone: ports are kept.
    """
    own_hosts = {host_of(address) for address in facts.own_addresses}
    hosts = {host_of(address) for address in facts.seen_as}
    if not hosts:
        return NAT_UNKNOWN
    if hosts <= own_hosts:
        return NAT_NONE
    outside = hosts - own_hosts
    if len(outside) > 1 or any(sent != seen for sent, seen in facts.ports):
        return NAT_SYMMETRIC
    return NAT_CONE


def examine(facts: Facts) -> list[Finding]:
    """Give every finding, in the order in which a person would look: this machine, its doors, its peers, the hash table."""
    return [
        _daemon(facts),
        *_identity(facts),
        _multicast(facts),
        _listening(facts),
        _peers(facts),
        _reachable(facts),
        _own_address(facts),
        _nat(facts),
        _clock(facts),
        *[_entry(each) for each in facts.entries],
        *_entries_missing(facts),
        _table(facts),
        *_published(facts.publications),
    ]


def is_failing(findings: Sequence[Finding]) -> bool:
    """Say whether anything fails."""
    return any(finding.state == FAIL for finding in findings)


def _port(facts: Facts) -> str:
    return (facts.bound or facts.own_addresses or (":7470",))[0].partition(" ")[0].rpartition(":")[2]


def _daemon(facts: Facts) -> Finding:
    if facts.is_daemon:
        return Finding("daemon", OK, "it runs")
    return Finding("daemon", WARN, "not running; what follows comes from a node that was started for this question", "p2pnode up")


def _identity(facts: Facts) -> list[Finding]:
    if not facts.is_duplicate:
        return [Finding("identity", OK, "no other process with this identity was met")]
    fix = "stop the other one, or give this machine its own: set P2PNODE_HOME to a new folder and start again"
    return [Finding("identity", FAIL, "another node on the network runs with this very identity", fix)]


def _multicast(facts: Facts) -> Finding:
    what = "multicast (mDNS)"
    if facts.mdns_state == "working":
        return Finding(what, OK, facts.mdns_reason or "this node hears its own announcement")
    if facts.mdns_state == "off":
        if facts.profile == "public":
            return Finding(what, OK, "off, as the public profile has it")
        return Finding(what, WARN, "switched off: nodes on the local network do not find this one",
                       "p2pnode config set network.mdns true")  # fmt: skip
    fix = facts.mdns_advice or "allow UDP 5353 in and out, or name peers: p2pnode net add HOST:PORT"
    return Finding(what, FAIL if facts.mdns_state == "not-working" else WARN, facts.mdns_reason or facts.mdns_state, fix)


def _listening(facts: Facts) -> Finding:
    if not facts.bound:
        return Finding("port", FAIL, f"nothing is bound: {facts.listen}",
                       "p2pnode config set network.listen 0.0.0.0:7470, then restart")  # fmt: skip
    return Finding("port", OK, f"listening on {', '.join(facts.bound)}")


def _peers(facts: Facts) -> Finding:
    if facts.peers_connected:
        return Finding("peers", OK, f"{facts.peers_connected} connected, {facts.peers_known} known")
    if facts.peers_known:
        return Finding("peers", FAIL, f"none of {facts.peers_known} known peers is connected", "p2pnode net peers shows why")
    return Finding("peers", FAIL, "no peer is known", "p2pnode net join LINK, with a link from `p2pnode net invite` elsewhere")


def _reachable(facts: Facts) -> Finding:
    what, port = "reachable", _port(facts)
    if facts.reached and facts.role == "server":
        return Finding(what, OK, f"{facts.reached} networks have dialled back, at {', '.join(facts.confirmed)}")
    if facts.reached or facts.failed:
        evidence = f"{facts.failed} networks could not dial back, {facts.reached} could: this node asks and is not asked"
        fix = f"allow TCP {port} in the firewall, or forward it and: p2pnode config set network.announce OUTER-HOST:{port}"
        return Finding(what, WARN, evidence, fix)
    return Finding(what, WARN, "nobody has tried yet" if facts.peers_connected else "nobody is there to try",
                   "wait a minute and ask again")  # fmt: skip


def _own_address(facts: Facts) -> Finding:
    what = "own address"
    if not facts.seen_as:
        return Finding(what, WARN, f"no peer has said yet; this machine has {', '.join(facts.own_addresses) or 'none'}",
                       "wait until a peer is connected")  # fmt: skip
    evidence = f"peers see {', '.join(facts.seen_as)}; this machine has {', '.join(facts.own_addresses) or 'none'}"
    if facts.profile == "public" and not any(is_global(address) for address in (*facts.seen_as, *facts.own_addresses)):
        return Finding(what, WARN, evidence + "; none of them is a public one", "p2pnode config set network.profile lan")
    return Finding(what, OK, evidence)


def _nat(facts: Facts) -> Finding:
    kind = nat_kind(facts)
    ports = ", ".join(f"{sent}→{seen}" for sent, seen in facts.ports[:4])
    port = _port(facts)
    if kind == NAT_UNKNOWN:
        return Finding("NAT", WARN, "unknown until a peer says where it sees this node", "wait until a peer is connected")
    if kind == NAT_NONE:
        return Finding("NAT", OK, "none: peers see this machine's own address")
    if facts.role == "server":
        return Finding("NAT", OK, f"{kind}, and its port is forwarded: peers dial in")
    evidence = f"{kind}: peers see another host" + (f", ports {ports}" if ports else "")
    return Finding(
        "NAT", WARN, evidence, f"forward TCP {port} on the router, then: p2pnode config set network.announce HOST:{port}"
    )


def _clock(facts: Facts) -> Finding:
    if facts.skew_seconds is None:
        return Finding("clock", WARN, "no peer to compare with", "wait until a peer is connected")
    ahead = -facts.skew_seconds
    evidence = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the median of {facts.skew_peers} peers"
    fix = "let the system keep its time: timedatectl set-ntp true"
    if abs(ahead) < SKEW_WARN_SECONDS:
        return Finding("clock", OK, evidence)
    is_certain = facts.skew_peers >= SKEW_PEERS_MIN and abs(ahead) >= SKEW_FAIL_SECONDS
    return Finding("clock", FAIL if is_certain else WARN, evidence, fix)


def _entry(trial: EntryTrial) -> Finding:
    what = f"bootstrap {trial.entry}"
    if not trial.error:
        return Finding(what, OK, "answers")
    return Finding(what, FAIL, trial.error, "p2pnode net bootstrap --remove ENTRY, or ask its owner for a new link")


def _entries_missing(facts: Facts) -> list[Finding]:
    if facts.entries or facts.profile != "public":
        return []
    return [Finding("bootstrap", WARN, "no entry is configured: after a long absence nobody may be left to ask",
                    "p2pnode net join LINK")]  # fmt: skip


def _table(facts: Facts) -> Finding:
    evidence = f"{facts.table_entries} live entries, the network has about {facts.network_size} nodes"
    if facts.table_entries or not facts.peers_connected:
        return Finding(
            "hash table", OK if facts.table_entries else WARN, evidence, "" if facts.table_entries else "find peers first"
        )
    return Finding("hash table", WARN, evidence + ", and no connected peer is a server",
                   "p2pnode net peers shows why each peer is out")  # fmt: skip


def _published(publications: Sequence[tuple[str, int, int, bool]]) -> list[Finding]:
    found = []
    for name, acks, asked, is_stored in publications:
        evidence = f"{acks} of {asked} nodes hold it"
        fix = "" if is_stored else "nothing to do: it is tried again; if it stays so, see the findings above"
        found.append(Finding(f"record {name}", OK if is_stored else WARN, evidence, fix))
    return found

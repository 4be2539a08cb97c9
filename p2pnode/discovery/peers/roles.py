"""Server or client: whether strangers can reach this node, found out by asking peers to try. A pure machine.

Only a node that others have reached takes part in the hash table as a server; everybody else asks and is never handed out.
Keys on nodes that nobody can dial are keys lost (Petals PR #195, kubo PR #6977). The trial is that of AutoNAT v2: a peer dials
one address on the host it sees this node at and shows, over that new connection, the nonce that it was asked to show. A word
without the nonce counts for nothing.

Any peer may be asked, since it only has to dial out; servers are preferred. So the first two nodes of a network make servers
of each other. Answers count once per wide group (/16), the wanted number of groups shrinks to what can be asked, and failures
in a row take the role away again.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from p2pnode.discovery.addresses import host_of, is_address, is_wildcard, wide_group
from p2pnode.ids import NodeId

ADDRESSES_MAX: Final = 4
VERDICTS_MAX: Final = 32
OBSERVATIONS_MAX: Final = 64
ASKED_AT_ONCE_MAX: Final = 2
# A peer that was asked gives its answer within this time, its own dial included, or counts as silent.
ANSWER_SECONDS: Final = 15.0
SPACING_SECONDS: Final = 1.0
# One group is not asked twice within this time.
AGAIN_SECONDS: Final = 5.0
REACHED: Final = "reached"
UNREACHABLE: Final = "unreachable"
REFUSED: Final = "refused"
OUTCOMES: Final = (REACHED, UNREACHABLE, REFUSED)


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """confirmations: groups that must have reached this node, fewer where fewer can be asked; the same for its outer address.

    failures_max: so many failures without a success between them end the server role.
    recheck_seconds: how often a server is tried again. retry_seconds: how long a client waits after a first failure; doubles
    up to recheck_seconds. verdict_seconds: how long an answer counts.
    """

    confirmations: int = 3
    failures_max: int = 3
    recheck_seconds: float = 1800.0
    retry_seconds: float = 60.0
    verdict_seconds: float = 7200.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that could be asked. seen_address: where its bytes come from. is_linked: a link stands already."""

    node_id: NodeId
    seen_address: str
    is_server: bool
    is_linked: bool


@dataclass(frozen=True, slots=True)
class AskDialBack:
    """Ask this peer to dial one of these addresses; give a `Verdict` for it."""

    node_id: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a request. outcome: `reached` (the nonce has arrived), `unreachable`, `refused`; empty for no answer."""

    node_id: NodeId
    seen_address: str
    outcome: str
    address: str = ""


class Roles:
    """Decides between server and client and says whom to ask next.

    uniform: a float in [0, 1) each call. listen_ports: of this node's listeners, for the addresses that others see.
    """

    def __init__(self, settings: RoleSettings, uniform: Callable[[], float]) -> None:
        self.is_server = False
        self.listen_ports: tuple[str, ...] = ()
        self._settings = settings
        self._uniform = uniform
        self._own: tuple[str, ...] = ()
        self._reached: dict[str, _Reached] = {}
        self._failed: dict[str, float] = {}
        self._failures_in_a_row = 0
        self._asked: dict[NodeId, float] = {}
        self._asked_groups: dict[str, float] = {}
        self._asks_in_round = 0
        self._failed_rounds = 0
        self._seen: dict[str, str] = {}
        self._groups = 1
        self._next_ask = math.inf

    def apply(self, settings: RoleSettings) -> None:
        """Use new settings from now on."""
        self._settings = settings

    @property
    def is_decided(self) -> bool:
        """Say whether anybody has tried to reach this node yet."""
        return bool(self._reached or self._failed)

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return self._next_ask

    @property
    def confirmed(self) -> tuple[str, ...]:
        """Give the addresses at which others have reached this node."""
        return tuple(dict.fromkeys(each.address for each in self._reached.values()))

    @property
    def counts(self) -> tuple[int, int]:
        """Give how many groups have reached this node, and how many have tried and failed."""
        return len(self._reached), len(self._failed)

    @property
    def outer_host(self) -> str:
        """Give the host that enough groups see this node at; empty while they are too few or disagree."""
        hosts = [host_of(address) for address in self._seen.values()]
        best = max(dict.fromkeys(hosts), key=hosts.count, default="")
        return best if best and hosts.count(best) >= self._wanted() and hosts.count(best) * 2 > len(hosts) else ""

    @property
    def seen_addresses(self) -> tuple[str, ...]:
        """Give the addresses at which peers see this node, one per group."""
        return tuple(self._seen.values())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Give what peers are asked to try: the outer host with this node's ports first, then its own addresses."""
        host = self.outer_host
        outer = [f"{host}:{port}" for port in self.listen_ports] if host else []
        return tuple(dict.fromkeys((*outer, *self._own)))[:ADDRESSES_MAX]

    def set_addresses(self, addresses: Iterable[str], now: float) -> None:
        """Take this node's own addresses. A change of what can be dialled asks for a new trial soon."""
        before = self.addresses
        self._own = tuple(dict.fromkeys(each for each in addresses if is_address(each) and not is_wildcard(each)))
        self.listen_ports = tuple(dict.fromkeys(each.rpartition(":")[2] for each in self._own))
        self._changed(before, now)

    def observed(self, peer_address: str, own_address: str, now: float) -> None:
        """Take a peer's word about where it sees this node; the last word of each group counts."""
        if not is_address(own_address):
            return
        before = self.addresses
        group = wide_group(peer_address)
        _put(self._seen, group, own_address, OBSERVATIONS_MAX)
        self._changed(before, now)

    def peer_met(self, now: float) -> None:
        """A peer can be asked: do so soon if nobody has answered yet."""
        if not self.is_decided and not self._asked:
            self._next_ask = min(self._next_ask, now)

    def verdict(self, verdict: Verdict, now: float) -> bool:
        """Take an answer; say whether the role has changed by it."""
        self._asked.pop(verdict.node_id, None)
        group = wide_group(verdict.seen_address)
        if verdict.outcome == REACHED:
            self._failures_in_a_row = 0
            self._failed.pop(group, None)
            _put(self._reached, group, _Reached(verdict.address, now), VERDICTS_MAX)
        elif verdict.outcome == UNREACHABLE:
            self._failures_in_a_row += 1
            _put(self._failed, group, now, VERDICTS_MAX)
        return self._decide(now)

    def tick(self, candidates: Sequence[Candidate], now: float) -> list[AskDialBack]:
        """Give the requests that are due. candidates: every peer that could be asked now."""
        if now < self._next_ask:
            return []
        self._asked = {peer: at for peer, at in self._asked.items() if at + ANSWER_SECONDS > now}
        self._forget_old(now)
        addresses = self.addresses
        self._groups = max(1, len({wide_group(each.seen_address): None for each in candidates}))
        if not addresses or not candidates:
            self._next_ask = now + self._settings.retry_seconds
            return []
        if self._asks_in_round >= self._wanted() + self._settings.failures_max:
            self._rest(now)
            return []
        chosen = self._choose(candidates, now)[: max(0, ASKED_AT_ONCE_MAX - len(self._asked))]
        for each in chosen:
            self._asked[each.node_id] = now
            _put(self._asked_groups, wide_group(each.seen_address), now, VERDICTS_MAX)
        self._asks_in_round += len(chosen)
        self._next_ask = now + (SPACING_SECONDS if chosen else AGAIN_SECONDS)
        return [AskDialBack(each.node_id, addresses) for each in chosen]

    def _changed(self, before: tuple[str, ...], now: float) -> None:
        after = self.addresses
        if after != before:
            self._reached = {group: each for group, each in self._reached.items() if each.address in after}
            self._failed.clear()
            self._asks_in_round = self._failed_rounds = 0
            self._next_ask = min(self._next_ask, now)
            if not self._reached:
                self.is_server = False

    def _wanted(self) -> int:
        """The groups that must agree: the setting, but never more than can be asked."""
        return max(1, min(self._settings.confirmations, self._groups))

    def _decide(self, now: float) -> bool:
        before = self.is_server
        if not self._reached or self._failures_in_a_row >= self._settings.failures_max:
            self._reached.clear()
            self.is_server = False
        elif len(self._reached) >= self._wanted() and len(self._reached) > len(self._failed):
            self.is_server = True
        if self.is_server and not self._failures_in_a_row and len(self._reached) >= self._wanted():
            self._rest(now)
        elif self.is_server:
            self._next_ask = min(self._next_ask, now + AGAIN_SECONDS)
        return self.is_server != before

    def _rest(self, now: float) -> None:
        """Wait before the next round: long for a server, doubling for a client."""
        settings = self._settings
        self._asks_in_round = 0
        self._failed_rounds = 0 if self.is_server else self._failed_rounds + 1
        wait = settings.recheck_seconds
        if not self.is_server:
            wait = min(wait, settings.retry_seconds * 2.0 ** min(self._failed_rounds - 1, 16))
        self._next_ask = now + wait * (0.75 + self._uniform() / 2)

    def _choose(self, candidates: Sequence[Candidate], now: float) -> list[Candidate]:
        """Give one peer per group: groups that have not been asked for longest, servers, open links, then by chance."""
        busy = {wide_group(each.seen_address) for each in candidates if each.node_id in self._asked}
        free = [each for each in candidates if each.node_id not in self._asked]
        free.sort(key=lambda each: (
            self._asked_groups.get(wide_group(each.seen_address), -math.inf),
            not each.is_server, not each.is_linked, self._uniform(),
        ))  # fmt: skip
        chosen: dict[str, Candidate] = {}
        for each in free:
            group = wide_group(each.seen_address)
            if group not in busy and self._asked_groups.get(group, -math.inf) + AGAIN_SECONDS <= now:
                chosen.setdefault(group, each)
        return list(chosen.values())

    def _forget_old(self, now: float) -> None:
        oldest = now - self._settings.verdict_seconds
        self._reached = {group: each for group, each in self._reached.items() if each.at >= oldest}
        self._failed = {group: at for group, at in self._failed.items() if at >= oldest}
        if not self._reached:
            self.is_server = False


@dataclass(frozen=True, slots=True)
class _Reached:
    address: str
    at: float


Value = TypeVar("Value")


def _put(into: dict[str, Value], key: str, value: Value, most: int) -> None:
    """Enter a value as the newest one; the oldest goes when there are too many."""
    into.pop(key, None)
    if len(into) >= most:
        del into[next(iter(into))]
    into[key] = value

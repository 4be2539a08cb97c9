"""Dial-back over the real transport: asks peers to reach this node, and reaches others that ask. Drives `roles.Roles`.

As a dialler this node opens one connection to one address, and only on the host that the asker's own bytes come from, so that
nobody can be made to knock at a third party's door; addresses that are not global are left out in a public network. The new
connection expects the asker's own identity and carries the asker's nonce: proof to the asker, and to nobody else.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio

from p2pnode.discovery.addresses import host_of, is_address, is_global
from p2pnode.discovery.peers.roles import (
    ANSWER_SECONDS,
    OUTCOMES,
    REACHED,
    REFUSED,
    UNREACHABLE,
    AskDialBack,
    Candidate,
    Roles,
    Verdict,
)
from p2pnode.environment import Environment
from p2pnode.errors import PeerError, Refused
from p2pnode.ids import NodeId
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.limits import TokenBucket
from p2pnode.transport.link import Link
from p2pnode.transport.requests import Incoming
from p2pnode.transport.service import TransportService
from p2pnode.wire.messages.discovery import DialBack, DialBackProof, DialBackResult
from p2pnode.wire.messages.session import Done

DIALS_MAX: Final = 8
DIAL_SECONDS: Final = 8.0
# What one host may make us dial, and what all of them together may: a trial costs a connection and a handshake.
HOST_RATE: Final = 0.1
HOST_BURST: Final = 4.0
HOSTS_MAX: Final = 1024
TOTAL_RATE: Final = 10.0
TOTAL_BURST: Final = 64.0
NONCE_SIZE: Final = 16


class _Trial:
    """One request of ours: the peer that may show the nonce, and whether it has."""

    __slots__ = ("is_proven", "node_id")

    def __init__(self, node_id: NodeId) -> None:
        self.node_id = node_id
        self.is_proven = False


class DialBackService:
    """Both sides of dial-back. candidates: whom this node could ask now. meet: gives an open, introduced link with a peer.

    dials_private: also dial private and loopback addresses, as a local network needs. on_role: called when the role is first
    known and when it changes.
    """

    def __init__(
        self,
        environment: Environment,
        roles: Roles,
        transport: TransportService,
        metrics: Metrics,
        *,
        dials_private: bool,
        now: Callable[[], float],
        candidates: Callable[[], Sequence[Candidate]],
        meet: Callable[[NodeId], Awaitable[Link]],
        misbehaved: Callable[[bytes, Reason], None],
        on_role: Callable[[], None],
    ) -> None:
        self._environment = environment
        self._roles = roles
        self._transport = transport
        self._metrics = metrics
        self._dials_private = dials_private
        self._now = now
        self._candidates = candidates
        self._meet = meet
        self._misbehaved = misbehaved
        self._on_role = on_role
        self._trials: dict[bytes, _Trial] = {}
        self._hosts: dict[str, TokenBucket] = {}
        self._total = TokenBucket(TOTAL_RATE, TOTAL_BURST, 0.0)
        self._dials = 0
        self._nursery: trio.Nursery | None = None
        transport.on_aside = self._take_proof

    def start(self, nursery: trio.Nursery | None) -> None:
        """Ask and dial in this nursery from now on; None ends that."""
        self._nursery = nursery

    @property
    def deadline(self) -> float:
        """When `tick` should run next."""
        return self._roles.deadline

    def tick(self) -> None:
        """Ask whom the roles machine wants asked; cheap when nothing is due."""
        now = self._now()
        if self._nursery is None or now < self._roles.deadline:
            return
        was = self._roles.is_server
        for effect in self._roles.tick(self._candidates(), now):
            self._nursery.start_soon(self._ask, effect)
        if self._roles.is_server != was:
            self._on_role()

    def handle(self, incoming: Incoming) -> bool:
        """Answer a request for a dial-back, after trying; refuses what the rates do not allow."""
        message = incoming.message
        if not isinstance(message, DialBack):
            return False
        address = self._allowed(message.addresses, incoming.link.peer.seen_address)
        if not address or self._nursery is None:
            self._count(REFUSED)
            incoming.reply(DialBackResult(address="", outcome=REFUSED))
        elif self._dials >= DIALS_MAX or not self._take(host_of(address), is_global(address)):
            self._metrics.add("limit_hits_total", "dial_backs")
            incoming.refuse(Reason.RATE)
        else:
            self._dials += 1
            self._nursery.start_soon(self._dial_back, incoming, message, address)
        return True

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _ask(self, effect: AskDialBack) -> None:
        nonce = self._environment.entropy.token(NONCE_SIZE)
        trial = self._trials[nonce] = _Trial(effect.node_id)
        verdict = Verdict(effect.node_id, "", "")
        try:
            with trio.move_on_after(ANSWER_SECONDS):
                verdict = await self._asked(effect, nonce, trial)
        finally:
            del self._trials[nonce]
        was_decided = self._roles.is_decided
        if self._roles.verdict(verdict, self._now()) or self._roles.is_decided != was_decided:
            self._on_role()

    async def _asked(self, effect: AskDialBack, nonce: bytes, trial: _Trial) -> Verdict:
        seen = ""
        try:
            link = await self._meet(effect.node_id)
            seen = link.peer.seen_address
            # The introduction may just have told an outer address, so the roles machine is asked again for what to try.
            addresses = self._roles.addresses or effect.addresses
            answer = (await link.request(DialBack(addresses, nonce))).message
        except PeerError:
            return Verdict(effect.node_id, seen, "")
        honest = isinstance(answer, DialBackResult) and answer.outcome in OUTCOMES
        if not isinstance(answer, DialBackResult) or not honest:
            self._misbehaved(effect.node_id, Reason.WRONG_TYPE)
            return Verdict(effect.node_id, seen, "")
        if answer.outcome == REACHED and not (trial.is_proven and answer.address in addresses):
            # It says so and nothing has arrived: its word counts for nothing, neither way.
            return Verdict(effect.node_id, seen, REFUSED)
        return Verdict(effect.node_id, seen, answer.outcome, answer.address)

    def _take_proof(self, incoming: Incoming) -> None:
        """Take a nonce on a connection that the asked peer has opened for it."""
        message, peer = incoming.message, incoming.link.peer
        trial = self._trials.get(message.nonce) if isinstance(message, DialBackProof) else None
        if trial is None or trial.node_id != peer.node_id or not peer.inbound:
            incoming.refuse(Reason.UNKNOWN_MESSAGE)
            return
        trial.is_proven = True
        incoming.reply(Done())

    # --- dialling for others -----------------------------------------------------------------------------------------

    def _allowed(self, addresses: Sequence[str], seen_address: str) -> str:
        """Give the first address on the asker's own host that may be dialled; empty when there is none."""
        host = host_of(seen_address)
        for address in addresses:
            if is_address(address) and host_of(address) == host and (self._dials_private or is_global(address)):
                return address
        return ""

    def _take(self, host: str, is_limited: bool) -> bool:
        now = self._environment.clock.monotonic()
        bucket = self._hosts.get(host)
        if bucket is None:
            if len(self._hosts) >= HOSTS_MAX:
                del self._hosts[next(iter(self._hosts))]
            bucket = self._hosts[host] = TokenBucket(HOST_RATE, HOST_BURST, now)
        return (not is_limited or bucket.take(now)) and self._total.take(now)

    async def _dial_back(self, incoming: Incoming, message: DialBack, address: str) -> None:
        outcome = UNREACHABLE
        try:
            with trio.move_on_after(DIAL_SECONDS):
                proof = DialBackProof(message.nonce)
                answer = await self._transport.ask_aside(address, incoming.link.peer.node_id, proof)
                outcome = REACHED if isinstance(answer, Done) else REFUSED
        except Refused:
            outcome = REFUSED
        except PeerError:
            outcome = UNREACHABLE
        finally:
            self._dials -= 1
        self._count(outcome)
        incoming.reply(DialBackResult(address=address[:64], outcome=outcome))

    def _count(self, outcome: str) -> None:
        self._metrics.add("dial_backs_total", outcome)

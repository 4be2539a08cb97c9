"""The books of the market: what each document posts, how much credit a peer has, and how debts may be settled.

Mutual credit: a cheque is an IOU whose worth is what one would buy from its issuer. What two peers owe each other is set
off at once; what remains may be settled by a `Settlement`. Credit for unpaid work starts at one slice for a stranger and
grows with settled volume only, which a stranger cannot invent alone, and decays. Source: research on credit without a chain
(Seuken and Parkes 2011: no accounting mechanism is Sybil-proof, so the gain is bounded instead); Swarm's cumulative cheques.
"""

import sqlite3
from math import ceil
from typing import Final, Protocol

from p2pnode.crypto.hashing import document_hash
from p2pnode.environment import Clock, Database
from p2pnode.errors import ConfigError
from p2pnode.market.settings import MarketSettings
from p2pnode.store import accounts
from p2pnode.store.database import recall, remember

_DAY_MS: Final = 86_400_000


def post_cheque(connection: sqlite3.Connection, cheque_id: bytes, peer: bytes, amount: int, is_earned: bool, agreement: bytes,
                now_ms: int) -> None:  # fmt: skip
    """Post what a cheque adds, once, and set it off against what we owe each other. is_earned: we are the provider."""
    if amount == 0:
        return
    entries = accounts.earned(peer, amount) if is_earned else accounts.spent(peer, amount)
    if accounts.post(connection, cheque_id, "cheque", entries, now_ms, agreement=agreement):
        net_out(connection, cheque_id, peer, now_ms)


def net_out(connection: sqlite3.Connection, cause: bytes, peer: bytes, now_ms: int) -> int:
    """Set off both directions' debts and give the amount."""
    balance = accounts.peer_balance(connection, peer)
    amount = min(balance.owes, balance.owed)
    if amount > 0:
        accounts.post(connection, document_hash(b"netting" + cause), "netting", accounts.netted(peer, amount), now_ms)
    return max(amount, 0)


def settled_volume(connection: sqlite3.Connection, peer: bytes, now_ms: int, half_life_seconds: float) -> int:
    """Give what a peer has settled of its debts to us, in micro-credits, each day's part halved every half-life."""
    rows = connection.execute(
        """SELECT posted_ms / ?2, -sum(amount) FROM entries JOIN journals ON journals.id = entries.journal
           WHERE account = ?1 AND amount < 0 GROUP BY 1 ORDER BY 1""",
        (accounts.receivable(peer), _DAY_MS),
    )
    total = 0.0
    for day, amount in rows:
        age_seconds = max(0, now_ms - day * _DAY_MS) / 1000
        total += amount * 0.5 ** (age_seconds / half_life_seconds)
    return int(total)


def set_trust(connection: sqlite3.Connection, peer: bytes, slice_amount: int | None) -> None:
    """Let the operator fix a peer's slice in micro-credits; None goes back to the rule."""
    remember(connection, f"trust:{peer.hex()}", b"" if slice_amount is None else slice_amount.to_bytes(8, "big"))


def trust(connection: sqlite3.Connection, peer: bytes) -> int | None:
    """Give the operator's own limit for a peer, if there is one."""
    value = recall(connection, f"trust:{peer.hex()}")
    return int.from_bytes(value, "big") if value else None


def credit_limit(connection: sqlite3.Connection, peer: bytes, settings: MarketSettings, now_ms: int, backing: int = 0) -> int:
    """Give how much work a peer may have executed without a cheque, all its agreements together, in micro-credits.

    stranger_slice_amount + credit_growth_ppm / 10^6 * settled volume + backing, at most credit_slice_amount_max; the
    operator's own limit replaces the rule.
    """
    fixed = trust(connection, peer)
    if fixed is not None:
        return fixed
    grown = settled_volume(connection, peer, now_ms, settings.credit_half_life_seconds) * settings.credit_growth_ppm // 10**6
    return min(
        settings.stranger_slice_amount + grown + backing, max(settings.credit_slice_amount_max, settings.stranger_slice_amount)
    )


def left_unpaid(connection: sqlite3.Connection, peer: bytes, since_ms: int) -> int:
    """Give the micro-credits of receipts that a peer has left without a cheque in agreements that ended since a time."""
    row = connection.execute(
        """SELECT coalesce(sum(total - paid), 0) FROM agreements
           WHERE peer = ? AND role = 'provider' AND state = 'ended' AND ended_ms >= ?""",
        (peer, since_ms),
    ).fetchone()
    return int(row[0])


def write_off_room(connection: sqlite3.Connection, peer: bytes, settings: MarketSettings, now_ms: int) -> int:
    """Give how much a peer may withdraw of what was executed for it: answers do get lost, and nobody can prove that one was.

    In all one stranger's slice, which is what any identity may cost us; what was written off is forgotten by half-lives.
    """
    return max(0, settings.stranger_slice_amount - _written_off(connection, peer, now_ms, settings.credit_half_life_seconds))


def note_write_off(connection: sqlite3.Connection, peer: bytes, amount: int, now_ms: int, half_life_seconds: float) -> None:
    """Remember what a peer has withdrawn."""
    total = _written_off(connection, peer, now_ms, half_life_seconds) + amount
    remember(connection, f"written-off:{peer.hex()}", total.to_bytes(8, "big") + now_ms.to_bytes(8, "big"))


def _written_off(connection: sqlite3.Connection, peer: bytes, now_ms: int, half_life_seconds: float) -> int:
    value = recall(connection, f"written-off:{peer.hex()}")
    if not value:
        return 0
    amount, since_ms = int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")
    age_seconds = max(0, now_ms - since_ms) / 1000
    share: float = 0.5 ** (age_seconds / half_life_seconds)
    return ceil(amount * share)


def debt_room(connection: sqlite3.Connection, peer: bytes, settings: MarketSettings) -> int:
    """Give how much more a peer may owe us in cheques, in micro-credits, 0 or more."""
    return max(0, settings.debt_amount_max - accounts.peer_balance(connection, peer).owes)


class Settlement(Protocol):
    """How debts between peers leave the books. Anything with money behind it is a plug-in with this shape."""

    async def backing(self, peer: bytes) -> int:
        """Micro-credits of unpaid work that a peer can prove to be good for, beyond mutual credit."""
        ...

    async def settle(self, peer: bytes, amount: int, note: str) -> bytes | None:
        """Pay what we owe a peer; gives a 32-byte reference that is then posted, or None when nothing was paid."""
        ...


class NullSettlement:
    """Mutual credit only: debts are paid by work in the other direction."""

    async def backing(self, peer: bytes) -> int:
        """Nothing backs a peer but its work."""
        return 0

    async def settle(self, peer: bytes, amount: int, note: str) -> bytes | None:
        """Nothing is paid."""
        return None


class ManualSettlement:
    """The operator pays and is paid by hand, and marks it here."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def backing(self, peer: bytes) -> int:
        """Nothing backs a peer but its work and what was marked as paid."""
        return 0

    async def settle(self, peer: bytes, amount: int, note: str) -> bytes | None:
        """Mark that we paid a peer. Raises ConfigError for more than we owe."""
        return await self._post(peer, amount, note, is_ours=True)

    async def received(self, peer: bytes, amount: int, note: str) -> bytes:
        """Mark that a peer paid us. Raises ConfigError for more than it owes."""
        return await self._post(peer, amount, note, is_ours=False)

    async def _post(self, peer: bytes, amount: int, note: str, is_ours: bool) -> bytes:
        now_ms = self._clock.wall_ms()
        parts = [b"settlement", peer, str(amount).encode(), note.encode(), str(now_ms).encode(), bytes([is_ours])]
        reference = document_hash(b"\0".join(parts))

        def write(connection: sqlite3.Connection) -> None:
            balance = accounts.peer_balance(connection, peer)
            owed = balance.owed if is_ours else balance.owes
            if not 0 < amount <= owed:
                raise ConfigError(f"{amount} micro-credits are not between 1 and the {owed} that are owed")
            entries = accounts.settled_by_us(peer, amount) if is_ours else accounts.settled_by_peer(peer, amount)
            accounts.post(connection, reference, "settlement", entries, now_ms, note=note)

        await self._database.write(write)
        return reference

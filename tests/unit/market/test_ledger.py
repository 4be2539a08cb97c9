import pytest

from p2pnode.errors import ConfigError
from p2pnode.market import ledger
from p2pnode.market.ledger import ManualSettlement, NullSettlement
from p2pnode.market.settings import MarketSettings
from p2pnode.sim.database import InlineDatabase
from p2pnode.store import accounts
from p2pnode.store.database import memory

PEER, AGREEMENT, DAY = b"p" * 32, b"a" * 32, 86_400_000
SETTINGS = MarketSettings(stranger_slice_amount=1_000, credit_growth_ppm=500_000, credit_slice_amount_max=50_000)


@pytest.fixture
def books():
    connection = memory()
    yield connection
    accounts.check_balanced(connection)
    connection.close()


def cheque(books, name: bytes, amount: int, is_earned: bool, now_ms: int = DAY) -> None:
    ledger.post_cheque(books, name * 32, PEER, amount, is_earned, AGREEMENT, now_ms)


def test_a_cheque_is_posted_once(books) -> None:
    for _ in range(2):
        cheque(books, b"1", 700, True)
    assert accounts.peer_balance(books, PEER).owes == 700
    assert accounts.balance(books, accounts.INCOME) == -700
    cheque(books, b"2", 0, True)
    assert accounts.peer_balance(books, PEER).owes == 700


def test_both_directions_are_set_off(books) -> None:
    cheque(books, b"1", 700, True)
    cheque(books, b"2", 1000, False)
    balance = accounts.peer_balance(books, PEER)
    assert (balance.owes, balance.owed) == (0, 300)


def test_a_stranger_has_one_slice_and_credit_grows_with_settled_volume_only(books) -> None:
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 1_000
    cheque(books, b"1", 40_000, True)
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 1_000, "unsettled cheques prove nothing"
    cheque(books, b"2", 10_000, False)
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 1_000 + 5_000
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY + 30 * DAY) == 1_000 + 2_500, "it decays"
    cheque(books, b"3", 10**9, False)
    cheque(books, b"4", 10**9, True)
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 50_000, "and has a ceiling"


def test_the_operators_word_replaces_the_rule(books) -> None:
    ledger.set_trust(books, PEER, 0)
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 0
    ledger.set_trust(books, PEER, 10**12)
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 10**12
    ledger.set_trust(books, PEER, None)
    assert ledger.credit_limit(books, PEER, SETTINGS, DAY) == 1_000


def test_debt_has_room_until_its_maximum(books) -> None:
    settings = MarketSettings(debt_amount_max=1_000)
    cheque(books, b"1", 700, True)
    assert ledger.debt_room(books, PEER, settings) == 300
    cheque(books, b"2", 700, True)
    assert ledger.debt_room(books, PEER, settings) == 0


class Clock:
    def wall_ms(self) -> int:
        return DAY


async def test_manual_settlement_marks_what_was_paid_and_no_more() -> None:
    database = InlineDatabase()
    await database.write(lambda books: cheque(books, b"1", 700, True))
    manual = ManualSettlement(database, Clock())
    reference = await manual.received(PEER, 500, "cash")
    assert len(reference) == 32
    assert (await database.read(lambda books: accounts.peer_balance(books, PEER))).owes == 200
    with pytest.raises(ConfigError, match="200"):
        await manual.received(PEER, 201, "cash")
    with pytest.raises(ConfigError):
        await manual.settle(PEER, 1, "nothing is owed")
    await database.write(lambda books: cheque(books, b"2", 300, False))
    assert await manual.settle(PEER, 100, "bank")
    await database.read(accounts.check_balanced)


async def test_no_settlement_pays_nothing_and_backs_nobody() -> None:
    assert await NullSettlement().settle(PEER, 1, "") is None
    assert await NullSettlement().backing(PEER) == 0

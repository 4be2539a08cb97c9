"""The ledger conserves, whatever is posted, and posts each document once."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pnode.errors import LedgerError, StoreError
from p2pnode.store import accounts
from p2pnode.store.database import commit_group, memory

JOURNAL = "INSERT INTO journals (source, kind, posted_ms, note, entries)"
ALICE, BOB = b"a" * 32, b"b" * 32


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def test_earning_spending_netting_and_settling(connection):
    for number, entries in enumerate(
        (
            accounts.earned(ALICE, 700),
            accounts.spent(ALICE, 300),
            accounts.netted(ALICE, 300),
            accounts.settled_by_peer(ALICE, 150),
            accounts.spent(BOB, 90),
            accounts.settled_by_us(BOB, 40),
        )
    ):
        assert accounts.post(connection, bytes([number]) * 32, "cheque", entries, number * 10)
    assert accounts.peer_balance(connection, ALICE) == accounts.PeerBalance(250, 0)
    assert accounts.peer_balance(connection, BOB).net == -50
    assert accounts.peer_volume(connection, ALICE) == accounts.PeerBalance(700, 300)
    assert accounts.peer_volume(connection, ALICE, since_ms=5) == accounts.PeerBalance(0, 300)
    assert accounts.balance(connection, accounts.INCOME) == -700
    assert accounts.account_total(connection, accounts.SPEND, 15, 45) == 90
    assert [row.account for row in accounts.balances(connection, "payable:")] == sorted(
        [accounts.payable(ALICE), accounts.payable(BOB)]
    )
    exported = list(accounts.export_rows(connection, since_ms=10, until_ms=20))
    assert [row.amount for row in exported] == [300, -300]
    accounts.check_balanced(connection)


def test_the_same_document_is_never_paid_twice(connection):
    entries = accounts.spent(ALICE, 10)
    assert accounts.post(connection, b"d" * 32, "cheque", entries, 1)
    assert accounts.is_posted(connection, b"d" * 32)
    assert not accounts.post(connection, b"d" * 32, "cheque", entries, 2)
    assert accounts.balance(connection, accounts.SPEND) == 10
    with pytest.raises(LedgerError, match="before with other entries"):
        accounts.post(connection, b"d" * 32, "cheque", accounts.spent(ALICE, 11), 3)


@pytest.mark.parametrize(
    "entries",
    [
        (("a", 1), ("b", -2)),
        (("a", 0), ("b", 0)),
        (("a", 1),),
        ((), ()),
        (("", 1), ("b", -1)),
        (("a", 2**63), ("b", -(2**63))),
    ],
)
def test_wrong_entries_are_refused(connection, entries):
    with pytest.raises((LedgerError, ValueError)):
        accounts.post(connection, b"d" * 32, "cheque", entries, 1)
    assert not accounts.is_posted(connection, b"d" * 32)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET amount = amount + 1",
        "DELETE FROM entries",
        "DELETE FROM journals",
        "UPDATE journals SET note = 'x'",
        "INSERT INTO entries VALUES (1, 2, 'a', 5)",
        "INSERT INTO entries VALUES (9, 0, 'a', 5)",
        f"{JOURNAL} VALUES (zeroblob(32), 'x', 0, '', '[[\"a\",1],[\"b\",1]]')",
        f"{JOURNAL} VALUES (zeroblob(32), 'x', 0, '', '[[\"a\",1.5],[\"b\",-1.5]]')",
        f"{JOURNAL} VALUES (zeroblob(32), 'x', 0, '', '[]')",
    ],
)
def test_the_tables_refuse_what_the_functions_never_do(connection, statement):
    accounts.post(connection, b"d" * 32, "cheque", accounts.spent(ALICE, 10), 1)
    with pytest.raises((LedgerError, StoreError)):
        commit_group(connection, [lambda c: c.execute(statement)])[0].unwrap()
    accounts.check_balanced(connection)


@pytest.mark.parametrize(
    ("sabotage", "complaint"),
    [
        ("UPDATE balances SET amount = amount + 1 WHERE account = 'spend'", "account spend"),
        ("DROP TRIGGER entries_keep; UPDATE entries SET amount = 11 WHERE amount = 10", "journal 1"),
        ("DROP TRIGGER entries_stay; DELETE FROM entries", "journal 1"),
        (
            "DROP TRIGGER entries_keep; UPDATE entries SET account = account || 'x';UPDATE balances SET account = account || 'x'",
            "does not say",
        ),
    ],
)
def test_the_check_finds_damage(connection, sabotage, complaint):
    accounts.post(connection, b"d" * 32, "cheque", accounts.spent(ALICE, 10), 1)
    connection.executescript(sabotage)
    with pytest.raises(LedgerError, match=complaint):
        accounts.check_balanced(connection)


names = st.sampled_from([accounts.INCOME, accounts.SPEND, accounts.OUTSIDE, accounts.receivable(ALICE), accounts.payable(BOB)])
amounts = st.integers(-(10**12), 10**12)


class Ledger(RuleBasedStateMachine):
    """Random postings, right, wrong and repeated, against a dict."""

    def __init__(self):
        super().__init__()
        self.connection = memory()
        self.posted = {}
        self.model = {}

    @rule(source=st.integers(0, 20), legs=st.lists(st.tuples(names, amounts), min_size=1, max_size=5))
    def post(self, source, legs):
        entries = (*legs, (accounts.OUTSIDE, -sum(amount for _, amount in legs)))
        key = bytes([source]) * 32
        valid = all(amount for _, amount in entries) and self.posted.get(key, entries) == entries
        (result,) = commit_group(self.connection, [lambda c: accounts.post(c, key, "test", entries, source)])
        if not valid:
            with pytest.raises(LedgerError):
                result.unwrap()
            return
        assert result.unwrap() == (key not in self.posted)
        if key not in self.posted:
            self.posted[key] = entries
            for name, amount in entries:
                self.model[name] = self.model.get(name, 0) + amount

    @rule(data=st.data())
    def repeat(self, data):
        if self.posted:
            key = data.draw(st.sampled_from(sorted(self.posted)))
            assert not accounts.post(self.connection, key, "test", self.posted[key], 99)

    @rule(source=st.integers(21, 30), name=names, amount=amounts.filter(bool), off=st.integers(1, 9))
    def post_unbalanced(self, source, name, amount, off):
        with pytest.raises(LedgerError):
            accounts.post(self.connection, bytes([source]) * 32, "test", ((name, amount), ("outside", off - amount)), 0)

    @invariant()
    def conserves(self):
        accounts.check_balanced(self.connection)
        assert {row.account: row.amount for row in accounts.balances(self.connection)} == self.model
        assert sum(self.model.values()) == 0

    def teardown(self):
        self.connection.close()


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)

"""The checkers themselves: each one is silent about a good network and speaks up about a broken one."""

import sqlite3

import pytest

from p2pnode.sim import book_checkers
from p2pnode.sim.checkers import GROWTH_MAX, SAMPLES_MIN, FlatTasks, TablesNeverEmpty
from p2pnode.store.database import memory
from p2pnode.wire.messages.discovery import Contact

ALICE, BOB = b"A" * 32, b"B" * 32
AGREEMENT = b"g" * 32


class Network:
    """A driver and a population in one, as far as checkers look at them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tables = {0: [b"x"], 1: [b"y"]}
        self.tasks = 10.0
        self.nodes = 2
        self.found: dict[bytes, sqlite3.Connection] = {}

    @property
    def up_since(self):
        return dict.fromkeys(range(self.nodes), 0.0)

    def settled(self):
        return list(self.tables)

    def table(self, index):
        return self.tables[index]

    def counters(self):
        return {"tasks": self.tasks}

    def books(self):
        return self.found

    def contact(self, index):
        return Contact((ALICE, BOB)[index], ())


def look_for(checker, network, seconds, step=60.0) -> list[str]:
    found = []
    end = network.now + seconds
    while network.now < end:
        found += checker.look(network, network)
        network.now += step
    return found


def test_an_empty_table_is_forgiven_for_five_minutes_and_no_longer() -> None:
    network, checker = Network(), TablesNeverEmpty()
    assert look_for(checker, network, 600) == []
    network.tables[1] = []
    assert look_for(checker, network, 280) == []
    network.tables[1] = [b"x"]
    assert look_for(checker, network, 60) == []
    network.tables[1] = []
    (sentence,) = look_for(checker, network, 400)
    assert "node 1" in sentence


@pytest.mark.parametrize(
    ("late_tasks", "late_nodes", "speaks"),
    [(10_000.0, 2, False), (10_000.0 * GROWTH_MAX + 1, 2, True), (40_000.0, 8, False)],
)
def test_growth_is_a_leak_unless_there_are_more_nodes(late_tasks, late_nodes, speaks) -> None:
    network, checker = Network(), FlatTasks()
    network.tasks = 10_000.0
    look_for(checker, network, SAMPLES_MIN * 30)
    network.tasks, network.nodes = late_tasks, late_nodes
    look_for(checker, network, SAMPLES_MIN * 30)
    assert bool(checker.end(network, network)) is speaks


def test_a_burst_in_one_sample_is_no_leak() -> None:
    network, checker = Network(), FlatTasks()
    network.tasks = 1000.0
    look_for(checker, network, SAMPLES_MIN * 60)
    network.tasks = 50_000.0
    look_for(checker, network, 30)
    network.tasks = 1000.0
    look_for(checker, network, 60)
    assert checker.end(network, network) == []


def a_book(role: str, paid: int = 10, cheque: int = 10, calls: int = 1) -> sqlite3.Connection:
    """One side's book of an agreement with one receipt of 10 over one call of 10, and a cheque over it."""
    book = memory()
    peer = BOB if role == "client" else ALICE
    book.execute(
        """INSERT INTO agreements (id, role, peer, model_id, quote, job, state, amount_max, slice_amount, chain_anchor,
           chain_length, opened_ms, deadline_ms, total, paid, slices, slices_paid, chain_tip, ended_ms, end_reason)
           VALUES (?, ?, ?, ?, ?, ?, 'ended', 100, 20, ?, 9, 0, 9, 10, ?, 1, 1, ?, 9, 'completed')""",
        (AGREEMENT, role, peer, bytes(32), bytes(32), b"j" * 32, bytes(32), paid, bytes(32)),
    )
    for number in range(calls):
        book.execute(
            "INSERT INTO calls VALUES (?, ?, 0, ?, ?, x'', x'', 10, 'receipted')", (AGREEMENT, number, number, b"i" * 32)
        )
    book.execute("INSERT INTO receipts VALUES (?, 0, ?, 1, ?, 1, 10, 10, 'cpu', 9)", (AGREEMENT, b"r" * 32, bytes(32)))
    book.execute("INSERT INTO cheques VALUES (?, 0, ?, ?, ?, ?, 9)", (AGREEMENT, b"c" * 32, b"r" * 32, cheque, bytes(32)))
    return book


def a_job(book: sqlite3.Connection, state: str = "ended", kind: str = "map", item: str = "done") -> None:
    reason = "completed" if state == "ended" else ""
    book.execute(
        """INSERT INTO jobs (id, kind, name, model_id, spec, state, budget_max, created_ms, end_reason)
           VALUES (?, ?, '', ?, x'', ?, 100, 0, ?)""",
        (b"j" * 32, kind, bytes(32), state, reason),
    )
    book.execute("INSERT INTO items (job, position, state, input_hash) VALUES (?, 0, ?, ?)", (b"j" * 32, item, b"i" * 32))


def broken(network) -> list[str]:
    checkers = (book_checkers.NoLostJob(), book_checkers.NoDoublePayment(), book_checkers.CreditsConserved())
    return [sentence for checker in checkers for sentence in checker.look(network, network) + checker.end(network, network)]


def market(**client) -> Network:
    network = Network()
    network.found = {ALICE: a_book("client", **client), BOB: a_book("provider")}
    return network


def test_good_books_are_passed_in_silence() -> None:
    network = market()
    a_job(network.found[ALICE])
    assert broken(network) == []


def test_a_job_that_never_ended_is_lost() -> None:
    network = market()
    a_job(network.found[ALICE], state="running")
    assert any("is running at the end" in sentence for sentence in broken(network))
    network.nodes = 0
    assert broken(network) == [], "its machine never came back, and may end it when it does"


def test_a_complete_job_without_its_answers_is_a_lie() -> None:
    network = market()
    a_job(network.found[ALICE], item="placed")
    assert any("lacks 1 answers" in sentence for sentence in broken(network))


def test_an_item_paid_in_two_calls_is_found() -> None:
    network = market(calls=2)
    a_job(network.found[ALICE])
    found = broken(network)
    assert any("has paid item 0" in sentence for sentence in found)
    assert any("receipt of 10 over calls of 20" in sentence for sentence in found)


def test_a_cheque_beyond_the_receipts_or_never_issued_is_found() -> None:
    assert any("cheques of 15 over receipts of 10" in sentence for sentence in broken(market(cheque=15)))
    network = market()
    network.found[ALICE].execute("DELETE FROM cheques")
    found = broken(network)
    assert any("0 were issued" in sentence for sentence in found)


def test_the_two_sides_of_an_agreement_must_agree_up_to_one_slice() -> None:
    network = market(paid=0)
    assert any("paid 0, received 10" in sentence for sentence in broken(network))


def test_books_that_do_not_sum_to_zero_are_found() -> None:
    network = market()
    book = network.found[BOB]
    book.execute("INSERT INTO balances VALUES ('income', 5)")
    assert any("balance income" in sentence for sentence in broken(network))
    for trigger in ("entries_belong", "entries_count"):
        book.execute(f"DROP TRIGGER {trigger}")
    book.execute("INSERT INTO journals VALUES (1, ?, 'cheque', NULL, 0, '', '[[\"income\", 5], [\"spend\", -5]]')", (b"s" * 32,))
    book.execute("INSERT INTO entries VALUES (1, 7, 'income', 5)")
    assert any("sum to 5" in sentence for sentence in broken(network))

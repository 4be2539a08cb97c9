"""What must never happen to jobs and money, read from the nodes' own SQLite books by plain SQL, not by the code that keeps them.

They judge when a run is over and everybody has had time to settle: jobs have ended, and what the two sides of an agreement
hold can be laid side by side.
"""

import sqlite3
from collections.abc import Mapping

from p2pnode.sim.driver import Driver
from p2pnode.sim.population import Population

Books = Mapping[bytes, sqlite3.Connection]


class NoLostJob:
    """Every job that was ever saved has ended for a reason, and one that is complete has every answer.

    The books of machines that never came back are left out: their jobs wait for them.
    """

    def look(self, driver: Driver, population: Population) -> list[str]:
        """Jobs may be under way."""
        return []

    def end(self, driver: Driver, population: Population) -> list[str]:
        """Look through every node's jobs."""
        here = {driver.contact(index).node_id: None for index in population.up_since}
        return lost_jobs({node_id: book for node_id, book in driver.books().items() if node_id in here})


class NoDoublePayment:
    """No call is paid twice, no item of a job is paid twice, and nobody holds a cheque that was not issued."""

    def look(self, driver: Driver, population: Population) -> list[str]:
        """Look at every client's calls; a payment is final at any moment."""
        return paid_twice(driver.books())

    def end(self, driver: Driver, population: Population) -> list[str]:
        """Look once more."""
        return paid_twice(driver.books())


class CreditsConserved:
    """Every book sums to zero, and what one node has earned from another is what that one has spent there."""

    def look(self, driver: Driver, population: Population) -> list[str]:
        """No money comes from nothing, not even for a moment."""
        return unbalanced(driver.books())

    def end(self, driver: Driver, population: Population) -> list[str]:
        """Lay the two sides of every agreement side by side."""
        books = driver.books()
        return unbalanced(books) + disagreements(books)


def lost_jobs(books: Books) -> list[str]:
    """Give jobs that have not ended, and complete ones that lack an answer."""
    found = []
    for node_id, book in books.items():
        name = node_id.hex()[:8]
        for job, kind, state in book.execute("SELECT hex(id), kind, state FROM jobs WHERE state <> 'ended'"):
            found.append(f"job {job[:8]} ({kind}) of node {name} is {state} at the end")
        query = """SELECT hex(job), count(*) FROM items JOIN jobs ON jobs.id = items.job
                   WHERE jobs.end_reason = 'completed' AND jobs.kind = 'map' AND items.state <> 'done' GROUP BY job"""
        for job, count in book.execute(query):
            found.append(f"job {job[:8]} of node {name} is called complete and lacks {count} answers")
    return found


def paid_twice(books: Books) -> list[str]:
    """Give calls, items and cheques that were paid more than once or never issued."""
    found = []
    issued: dict[bytes, int] = {}
    for node_id, book in books.items():
        name = node_id.hex()[:8]
        # A cheque's total only grows, by exactly what its receipts say.
        query = """SELECT hex(receipts.agreement), max(cheques.total), sum(receipts.amount) FROM cheques
                   JOIN receipts ON receipts.agreement = cheques.agreement AND receipts.slice = cheques.slice
                   GROUP BY receipts.agreement HAVING max(cheques.total) <> sum(receipts.amount)"""
        for agreement, total, amount in book.execute(query):
            found.append(f"node {name} has cheques of {total} over receipts of {amount} in agreement {agreement[:8]}")
        # The paid calls of one agreement are different ones, and cost what their receipt says.
        query = """SELECT hex(r.agreement), r.slice, r.amount, coalesce(sum(calls.amount), 0) FROM receipts AS r
                   JOIN agreements ON agreements.id = r.agreement AND agreements.role = 'client'
                   LEFT JOIN calls ON calls.agreement = r.agreement AND calls.slice = r.slice AND calls.state = 'receipted'
                   GROUP BY r.agreement, r.slice HAVING r.amount <> coalesce(sum(calls.amount), 0)"""
        for agreement, number, amount, calls in book.execute(query):
            found.append(f"node {name} has a receipt of {amount} over calls of {calls} in slice {number} of {agreement[:8]}")
        # An item of a map is paid for once, whoever did it.
        query = """SELECT hex(items.job), items.position, count(*) FROM items JOIN jobs ON jobs.id = items.job
                   JOIN agreements ON agreements.job = items.job AND agreements.role = 'client'
                   JOIN calls ON calls.agreement = agreements.id AND calls.input_hash = items.input_hash
                   WHERE jobs.kind = 'map' AND calls.state = 'receipted' AND calls.amount > 0
                   AND items.input_hash <> x'' GROUP BY items.job, items.position HAVING count(*) > 1"""
        for job, position, count in book.execute(query):
            found.append(f"node {name} has paid item {position} of job {job[:8]} {count} times")
        issued.update(_cheques(book, "client"))
    for node_id, book in books.items():
        for agreement, total in _cheques(book, "provider"):
            if total > issued.get(agreement, 0):
                name = node_id.hex()[:8]
                found.append(
                    f"node {name} holds cheques of {total} in {agreement.hex()[:8]}, {issued.get(agreement, 0)} were issued"
                )
    return found


def unbalanced(books: Books) -> list[str]:
    """Give books whose entries do not sum to zero, or whose balances are not the sums of their entries."""
    found = []
    for node_id, book in books.items():
        name = node_id.hex()[:8]
        (total,) = book.execute("SELECT coalesce(sum(amount), 0) FROM entries").fetchone()
        if total:
            found.append(f"the books of node {name} sum to {total}")
        query = """SELECT account FROM (SELECT account, amount FROM entries UNION ALL SELECT account, -amount FROM balances)
                   GROUP BY account HAVING sum(amount) <> 0"""
        found += [f"balance {account} of node {name} is not its entries' sum" for (account,) in book.execute(query)]
    return found


def disagreements(books: Books) -> list[str]:
    """Give agreements in which provider and client have unlike ideas of what was paid.

    A cheque that its client issued and that never arrived, because one of the two was gone for good, is at most one slice.
    """
    found = []
    for node_id, book in books.items():
        for agreement, received in _cheques(book, "provider"):
            peer, slice_amount = book.execute("SELECT peer, slice_amount FROM agreements WHERE id = ?", (agreement,)).fetchone()
            other = books.get(peer)
            row = (
                other.execute("SELECT paid FROM agreements WHERE id = ?", (agreement,)).fetchone() if other is not None else None
            )
            paid = row[0] if row is not None else 0
            if not received <= paid <= received + slice_amount:
                found.append(f"agreement {agreement.hex()[:8]}: paid {paid}, received {received} by node {node_id.hex()[:8]}")
    return found


def _cheques(book: sqlite3.Connection, role: str) -> list[tuple[bytes, int]]:
    query = """SELECT cheques.agreement, max(cheques.total) FROM cheques JOIN agreements ON agreements.id = cheques.agreement
               WHERE agreements.role = ? GROUP BY cheques.agreement"""
    return [(bytes(agreement), int(total)) for agreement, total in book.execute(query, (role,))]

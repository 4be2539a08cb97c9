"""Opening, migrating and locking the one database file, and running transactions on it.

A transaction is a plain function of a `sqlite3.Connection` that neither begins nor commits. `commit_group` runs many of them
under one COMMIT, each in its own savepoint, so that one fsync serves all and one failure harms only its author. The real
database (`node/aio.py`) and the simulated one (`sim/database.py`) both run their transactions through it.
"""

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from outcome import Error, Outcome, Value

from p2pnode.errors import ConfigError, LedgerError, P2PNodeError, StoreError

Transaction = Callable[[sqlite3.Connection], Any]
Backup = Callable[[sqlite3.Connection, int], None]

APPLICATION_ID: Final = 0x70327031  # "p2p1": another program's database is refused instead of migrated
SQLITE_VERSION_MIN: Final = (3, 37, 0)  # STRICT tables
_MEMORY_PAGE_BYTES: Final = 1024
_LEDGER_MARK: Final = "ledger:"
_MEMORY_PRAGMAS: Final = ("foreign_keys=ON", "temp_store=MEMORY")
# FULL, because a receipt that was sent must survive a power cut; the group commit pays its fsync once for many.
_FILE_PRAGMAS: Final = ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "journal_size_limit=16777216")


def open_file(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a database file (0600, made when missing) with the pragmas every connection needs. Raises StoreError.

    read_only: the connection refuses to write; it sees the last commit and never waits for a writer (WAL).
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"the database {path} cannot be opened: {error}") from error
    try:
        for pragma in _FILE_PRAGMAS + _MEMORY_PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")
    except sqlite3.Error as error:
        connection.close()
        raise StoreError(f"the database {path} cannot be read: {error}; put a backup in its place") from error
    return connection


class _InMemory(sqlite3.Connection):
    """A database that is gone with its last user: nobody has to close it, which Python asks for from 3.13 on."""

    def __del__(self) -> None:
        self.close()


def memory() -> sqlite3.Connection:
    """Give a migrated database that lives in memory only: for the simulation and for tests."""
    connection = sqlite3.connect(
        ":memory:", isolation_level=None, check_same_thread=False, cached_statements=256, factory=_InMemory
    )
    # Copying an empty database takes a sixth of the time of making one, and small pages a third of the memory: a simulation
    # has a thousand of them.
    _empty().backup(connection)
    for pragma in _MEMORY_PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    return connection


@cache
def _empty() -> sqlite3.Connection:
    template = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=_InMemory)
    template.execute(f"PRAGMA page_size={_MEMORY_PAGE_BYTES}")
    migrate(template)
    return template


def check_integrity(connection: sqlite3.Connection) -> None:
    """Raise StoreError, with SQLite's own words, when the file is damaged."""
    try:
        problems = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    except sqlite3.DatabaseError as error:
        problems = [str(error)]
    if problems != ["ok"]:
        raise StoreError(f"the database is damaged ({'; '.join(problems)}); put the newest backup beside it in its place")


def migrate(connection: sqlite3.Connection, backup: Backup | None = None) -> int:
    """Bring the schema up to date, one numbered file per transaction, and give its version.

    backup: called once, before the first change to a database that already holds a schema, with the connection and the old
    version. Raises StoreError for a newer schema, another program's file, or a migration that fails (nothing is changed).
    """
    if sqlite3.sqlite_version_info < SQLITE_VERSION_MIN:
        raise StoreError(f"this Python has SQLite {sqlite3.sqlite_version}; use one with SQLite 3.37 or newer")
    steps = migrations()
    try:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        application: int = connection.execute("PRAGMA application_id").fetchone()[0]
        foreign = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] and application != APPLICATION_ID
    except sqlite3.Error as error:
        raise StoreError(f"the database cannot be read: {error}; put a backup in its place") from error
    if foreign:
        raise StoreError("the database file belongs to another program; choose another folder with P2PNODE_HOME")
    if version > len(steps):
        raise StoreError(
            f"the database has schema {version} and this p2pnode knows up to {len(steps)}; "
            "install the newer p2pnode that wrote it, or put back the backup made before it was upgraded"
        )
    if version == len(steps):
        return version
    if version and backup is not None:
        backup(connection, version)
    for number, script in enumerate(steps[version:], version + 1):
        _apply(connection, number, script)
    return len(steps)


def _apply(connection: sqlite3.Connection, number: int, script: str) -> None:
    marks = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={number};"
    try:
        connection.executescript(f"BEGIN IMMEDIATE;\n{script}\n{marks} COMMIT;")
    except sqlite3.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise StoreError(f"migration {number} failed and changed nothing: {error}") from error


@cache
def migrations() -> tuple[str, ...]:
    """Give the SQL of every migration; the first has number 1."""
    folder = resources.files("p2pnode.store") / "migrations"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    for number, entry in enumerate(files, 1):
        if not entry.name.startswith(f"{number:04d}_"):
            raise StoreError(f"migration {number:04d} is missing; install p2pnode again")
    return tuple(entry.read_text(encoding="utf-8") for entry in files)


def backup_to_file(path: Path) -> Backup:
    """Give a backup function for `migrate` that copies to `<path>.schema-<version>`, whole or not at all."""

    def backup(connection: sqlite3.Connection, version: int) -> None:
        target = path.with_name(f"{path.name}.schema-{version}")
        part = target.with_name(target.name + ".part")
        try:
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            copy = sqlite3.connect(part, isolation_level=None)
            try:
                connection.backup(copy)
            finally:
                copy.close()
            _sync(part)
            part.replace(target)
            _sync(path.parent)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the backup before the upgrade failed: {error}; free some space in {path.parent}") from error

    return backup


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the single-writer lock `<path>.lock` for the block. Raises ConfigError, naming folder and process, when taken.

    The kernel drops the lock when the process dies in any way, so no stale lock can be left.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the data folder {path.parent} cannot be written: {error.strerror}; correct its permissions"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ConfigError(
                f"the data folder {path.parent} is in use by process {owner}; "
                "stop it with `p2pnode down` or choose another folder with P2PNODE_HOME"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def commit_group(connection: sqlite3.Connection, transactions: Sequence[Transaction]) -> list[Outcome[Any]]:
    """Run transactions under one COMMIT and give one outcome each, in order.

    A transaction that raises is undone alone. When the commit itself fails (disk full, I/O error) all of them are undone and
    all get StoreError: nobody is told that something is durable which is not.
    """
    outcomes: list[Outcome[Any]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        # extend() keeps what came before an exception, so that transactions that had failed by themselves keep their own error.
        outcomes.extend(_attempt(connection, transaction) for transaction in transactions)
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        own = [outcome if isinstance(outcome, Error) else None for outcome in outcomes]
        own += [None] * (len(transactions) - len(own))
        return [outcome or Error(translated(error)) for outcome in own]
    return outcomes


def _attempt(connection: sqlite3.Connection, transaction: Transaction) -> Outcome[Any]:
    connection.execute("SAVEPOINT intent")
    try:
        result = transaction(connection)
    except Exception as error:  # one transaction's error must not undo its neighbours
        if not connection.in_transaction:
            # SQLite undid the whole group by itself (disk full, out of memory): there is no savepoint left to return to.
            raise sqlite3.OperationalError(f"the group was undone: {error}") from error
        connection.execute("ROLLBACK TO intent")
        connection.execute("RELEASE intent")
        return Error(translated(error))
    connection.execute("RELEASE intent")
    return Value(result)


def read_group(connection: sqlite3.Connection, queries: Sequence[Transaction]) -> list[Outcome[Any]]:
    """Run functions that only read, all on one consistent view, and give one outcome each."""
    outcomes: list[Outcome[Any]] = []
    try:
        connection.execute("BEGIN")
        for query in queries:
            try:
                outcomes.append(Value(query(connection)))
            except Exception as error:  # one query's error must not hide the others' answers
                outcomes.append(Error(translated(error)))
    except sqlite3.Error as error:
        return [Error(translated(error)) for _ in queries]
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return outcomes


def translated(error: Exception) -> Exception:
    """Give what a caller sees for an exception in a transaction: StoreError or LedgerError for SQLite's, else itself."""
    if isinstance(error, P2PNodeError) or not isinstance(error, sqlite3.Error):
        return error
    kind = LedgerError if _LEDGER_MARK in str(error) else StoreError
    result = kind(f"the database refused: {error}")
    result.__cause__ = error
    return result


@cache
def columns(row_type: type) -> str:
    """Give a row dataclass's fields as an SQL column list, so that `row_type(*row)` fits the SELECT."""
    return ", ".join(f'"{field.name}"' for field in fields(row_type))


@cache
def placeholders(row_type: type) -> str:
    """Give as many `?` as a row dataclass has fields."""
    return ", ".join("?" for _ in fields(row_type))


def numbered(*values: Any) -> dict[str, Any]:
    """Give the values for a statement with `?1`, `?2` …: to sqlite3 those are names, and from Python 3.14 nothing else."""
    return {str(number): value for number, value in enumerate(values, 1)}


def remember(connection: sqlite3.Connection, key: str, value: bytes) -> None:
    """Keep one small value of the node itself under a name, such as the last offer's sequence."""
    connection.execute(
        "INSERT INTO remembered (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value)
    )


def recall(connection: sqlite3.Connection, key: str) -> bytes | None:
    """Give a value kept by `remember`, or None."""
    row = connection.execute("SELECT value FROM remembered WHERE key = ?", (key,)).fetchone()
    return None if row is None else bytes(row[0])

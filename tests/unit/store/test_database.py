"""Migrations, the lock, and groups of transactions."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import p2pnode
from p2pnode.errors import ConfigError, LedgerError, StoreError
from p2pnode.store import database
from p2pnode.store.database import (
    backup_to_file,
    check_integrity,
    commit_group,
    locked,
    memory,
    migrate,
    numbered,
    open_file,
    read_group,
    recall,
    remember,
)


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def test_a_new_file_is_private_durable_and_migrated(tmp_path):
    connection = open_file(tmp_path / "node.db")
    assert migrate(connection) == len(database.migrations())
    assert migrate(connection) == len(database.migrations())
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    remember(connection, "k", b"v")
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    connection.close()


def test_an_upgrade_backs_up_first_and_keeps_the_rows(tmp_path, monkeypatch):
    path = tmp_path / "node.db"
    connection = open_file(path)
    first = migrate(connection)
    remember(connection, "k", b"old")
    known = database.migrations()
    monkeypatch.setattr(database, "migrations", lambda: (*known, "CREATE TABLE extra (x INTEGER) STRICT; nonsense;"))
    with pytest.raises(StoreError, match="changed nothing"):
        migrate(connection, backup_to_file(path))
    assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'extra'").fetchone() is None
    assert connection.execute("PRAGMA user_version").fetchone() == (first,)
    monkeypatch.setattr(database, "migrations", lambda: (*known, "CREATE TABLE extra (x INTEGER) STRICT;"))
    assert migrate(connection, backup_to_file(path)) == first + 1
    assert recall(connection, "k") == b"old"
    connection.close()
    copy = sqlite3.connect(tmp_path / f"node.db.schema-{first}")
    assert recall(copy, "k") == b"old"
    assert copy.execute("PRAGMA user_version").fetchone() == (first,)
    copy.close()
    assert not list(tmp_path.glob("*.part"))


def test_no_upgrade_without_its_backup(connection, monkeypatch):
    more = (*database.migrations(), "CREATE TABLE extra (x INTEGER) STRICT;")
    monkeypatch.setattr(database, "migrations", lambda: more)

    def full(_connection, _version):
        raise StoreError("disk full")

    with pytest.raises(StoreError, match="disk full"):
        migrate(connection, full)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(more) - 1,)


def test_a_newer_schema_is_refused_with_what_to_do(connection):
    connection.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match=r"schema 99 .* install the newer p2pnode .*, or put back the backup"):
        migrate(connection)


def test_another_programs_file_is_refused():
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE bookmarks (url)")
    with pytest.raises(StoreError, match="another program"):
        migrate(connection)
    connection.close()


def test_a_damaged_file_is_reported(tmp_path):
    path = tmp_path / "node.db"
    connection = open_file(path)
    migrate(connection)
    for number in range(300):
        remember(connection, f"key{number}", os.urandom(500))
    check_integrity(connection)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with path.open("r+b") as file:
        file.seek(-4096 * 20, os.SEEK_END)
        file.write(b"\xff" * 4096 * 20)
    connection = open_file(path)
    with pytest.raises(StoreError, match="damaged"):
        check_integrity(connection)
    connection.close()


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    path = tmp_path / "node.db"
    code = "import sys;from pathlib import Path;from p2pnode.store.database import locked\nwith locked(Path(sys.argv[1])): pass"
    with locked(path):
        message = rf"{tmp_path} is in use by process {os.getpid()}; stop it with"
        with pytest.raises(ConfigError, match=message), locked(path):
            pass
        environment = {**os.environ, "PYTHONPATH": str(Path(p2pnode.__file__).parents[1])}
        other = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, env=environment
        )
        assert f"process {os.getpid()}" in other.stderr
    with locked(path):
        pass


def test_a_failing_transaction_harms_only_itself(connection):
    def fails(inner):
        remember(inner, "lost", b"1")
        raise ValueError("mine")

    def breaks_a_rule(inner):
        inner.execute("INSERT INTO remembered (key, value) VALUES ('a', NULL)")

    outcomes = commit_group(connection, [lambda c: remember(c, "a", b"1"), fails, breaks_a_rule, lambda c: recall(c, "a")])
    assert outcomes[3].unwrap() == b"1"
    with pytest.raises(ValueError, match="mine"):
        outcomes[1].unwrap()
    with pytest.raises(StoreError):
        outcomes[2].unwrap()
    assert recall(connection, "lost") is None
    assert not connection.in_transaction


def test_a_full_disk_fails_the_whole_group_and_the_next_one_works(tmp_path):
    connection = open_file(tmp_path / "node.db")
    migrate(connection)
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages + 4}")
    outcomes = commit_group(
        connection, [lambda c: remember(c, "small", b"1"), lambda c: remember(c, "large", bytes(1_000_000)), recall_small]
    )
    for result in outcomes:
        with pytest.raises(StoreError):
            result.unwrap()
    assert recall(connection, "small") is None
    commit_group(connection, [lambda c: remember(c, "small", b"2")])[0].unwrap()
    assert recall(connection, "small") == b"2"
    connection.close()


def recall_small(connection):
    return recall(connection, "small")


def test_a_transaction_that_commits_by_itself_is_refused(connection):
    (result,) = commit_group(connection, [lambda c: c.execute("COMMIT")])
    with pytest.raises(StoreError):
        result.unwrap()
    assert not connection.in_transaction


def test_reads_cannot_write(tmp_path):
    path = tmp_path / "node.db"
    writer = open_file(path)
    migrate(writer)
    reader = open_file(path, read_only=True)
    outcomes = read_group(reader, [lambda c: remember(c, "k", b"v"), lambda c: recall(c, "k")])
    with pytest.raises(StoreError, match="readonly"):
        outcomes[0].unwrap()
    assert outcomes[1].unwrap() is None
    reader.close()
    writer.close()


def test_the_ledgers_triggers_are_ledger_errors(connection):
    insert = "INSERT INTO journals (source, kind, posted_ms, note, entries) VALUES (zeroblob(32), 'x', 0, '', ?)"
    (result,) = commit_group(connection, [lambda c: c.execute(insert, ('[["a",1],["b",2]]',))])
    with pytest.raises(LedgerError, match="sum to zero"):
        result.unwrap()


def test_numbered_values_may_be_named_in_any_order_and_twice():
    connection = memory()
    assert connection.execute("SELECT ?2, ?1, ?2", numbered("a", "b")).fetchone() == ("b", "a", "b")
    connection.close()

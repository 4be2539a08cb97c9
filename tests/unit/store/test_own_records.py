"""Own records on disk."""

import sqlite3

import pytest

from p2pnode.errors import StoreError
from p2pnode.store import database
from p2pnode.store.database import backup_to_file, memory, migrate, open_file, recall, remember
from p2pnode.store.records import OwnRecordRow, list_own_records, remove_own_record, save_own_record


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def row(sequence=1, salt=b"s", **changes):
    fields = {"value": b"v", "life_ms": 1000, "expires_ms": 5000, "envelope": b"e%d" % sequence} | changes
    return OwnRecordRow(salt=salt, sequence=sequence, **fields)


def test_records_are_kept_by_salt(connection):
    save_own_record(connection, row(1, b"b"))
    save_own_record(connection, row(2, b"a", stored_ms=7, acks=3, asked=4))
    save_own_record(connection, row(3, b"b", value=b"new"))
    assert list_own_records(connection) == [row(2, b"a", stored_ms=7, acks=3, asked=4), row(3, b"b", value=b"new")]
    remove_own_record(connection, b"a")
    assert [kept.salt for kept in list_own_records(connection)] == [b"b"]


def test_a_late_save_does_not_bring_back_an_older_sequence(connection):
    save_own_record(connection, row(5))
    save_own_record(connection, row(4, value=b"old"))
    assert list_own_records(connection) == [row(5)]
    save_own_record(connection, row(5, acks=1, asked=2))
    assert list_own_records(connection)[0].acks == 1


@pytest.mark.parametrize("bad", [{"salt": b"x" * 65}, {"value": b"x" * 1001}, {"sequence": 0}, {"acks": 2, "asked": 1}])
def test_a_row_out_of_bounds_is_refused(connection, bad):
    with pytest.raises(sqlite3.IntegrityError):
        save_own_record(connection, row(**{"sequence": 1, "salt": b"s"} | bad))


def test_a_database_from_before_own_records_is_backed_up_and_upgraded(tmp_path, monkeypatch):
    path = tmp_path / "node.db"
    known = database.migrations()
    connection = open_file(path)
    monkeypatch.setattr(database, "migrations", lambda: known[:1])
    assert migrate(connection) == 1
    remember(connection, "k", b"old")
    monkeypatch.setattr(database, "migrations", lambda: known)
    assert migrate(connection, backup_to_file(path)) == len(known)
    assert recall(connection, "k") == b"old"
    save_own_record(connection, row())
    assert list_own_records(connection) == [row()]
    connection.close()
    copy = sqlite3.connect(tmp_path / "node.db.schema-1")
    assert recall(copy, "k") == b"old"
    assert copy.execute("SELECT name FROM sqlite_master WHERE name = 'own_records'").fetchone() is None
    copy.close()
    monkeypatch.setattr(database, "migrations", lambda: known[:1])
    connection = open_file(path)
    with pytest.raises(StoreError, match="install the newer p2pnode"):
        migrate(connection)
    connection.close()

"""Documents by id and prefix, and the audit log."""

import pytest

from p2pnode.errors import LedgerError
from p2pnode.ids import DOCUMENT, id_text
from p2pnode.store.database import commit_group, memory
from p2pnode.store.documents import (
    DocumentRow,
    append_log,
    attach_document,
    check_log,
    find_documents,
    get_document,
    list_documents,
    log_head,
    read_log,
    remove_documents,
    save_document,
    save_own_document,
)


@pytest.fixture
def connection():
    connection = memory()
    yield connection
    connection.close()


def document(number, kind=44, agreement=None, stored_ms=0):
    return DocumentRow(bytes([number]) * 32, kind, b"s" * 32, agreement, stored_ms, b"envelope %d" % number)


def test_a_document_is_kept_once_with_its_bytes(connection):
    assert save_document(connection, document(1))
    assert not save_document(connection, document(1))
    assert get_document(connection, bytes([1]) * 32) == document(1)
    assert get_document(connection, bytes(32)) is None


def test_documents_by_filter_and_prefix(connection):
    order = b"o" * 32
    for row in (document(1, 40), document(2, 44, order, 5), document(3, 45, order, 9)):
        save_document(connection, row)
    assert [row.kind for row in list_documents(connection, agreement=order)] == [44, 45]
    assert [row.kind for row in list_documents(connection, kind=44, signer=b"s" * 32)] == [44]
    assert [row.kind for row in list_documents(connection, since_ms=6)] == [45]
    text = id_text(DOCUMENT, bytes([2]) * 32)
    for typed in (text, text[:9], text[4:12], text.upper()):
        assert find_documents(connection, typed) == [document(2, 44, order, 5)]
    assert len(find_documents(connection, "a")) == 3
    with pytest.raises(ValueError, match="character"):
        find_documents(connection, "doc-18!")


def test_only_loose_documents_are_removed(connection):
    for number in (1, 2):
        save_document(connection, document(number, 41))
    attach_document(connection, bytes([1]) * 32, b"o" * 32)
    assert remove_documents(connection, 41, before_ms=10) == 1
    assert get_document(connection, bytes([1]) * 32).agreement == b"o" * 32


def test_the_audit_log_links_and_shows_tampering(connection):
    for number in range(1, 6):
        assert save_own_document(connection, document(number, stored_ms=number))
    assert not save_own_document(connection, document(5))
    assert check_log(connection) == 5
    assert [entry.sequence for entry in read_log(connection, after=3)] == [4, 5]
    assert read_log(connection)[1].previous == read_log(connection)[0].hash
    for attack in (
        "UPDATE audit_log SET kind = 1",
        "DELETE FROM audit_log WHERE sequence = 5",
        "INSERT INTO audit_log VALUES (9, zeroblob(32), 1, 1, zeroblob(32), zeroblob(32))",
        "INSERT INTO audit_log VALUES (6, zeroblob(32), 1, 1, zeroblob(32), zeroblob(32))",
    ):
        with pytest.raises(LedgerError, match="audit log"):
            commit_group(connection, [lambda c, attack=attack: c.execute(attack)])[0].unwrap()
    connection.execute("DROP TRIGGER audit_log_keeps")
    connection.execute("UPDATE audit_log SET kind = 1 WHERE sequence = 3")
    with pytest.raises(LedgerError, match="entry 3"):
        check_log(connection)


def test_an_empty_log(connection):
    assert log_head(connection) is None
    assert check_log(connection) == 0
    assert append_log(connection, b"d" * 32, 44, 7).sequence == 1

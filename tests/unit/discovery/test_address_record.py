"""Where a node can be reached, found by its id alone."""

import msgpack
import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.records.address_record import ADDRESS_SALT, address_key, decode_addresses, encode_addresses
from p2pnode.discovery.records.record import make_record, open_record
from p2pnode.errors import ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.messages.discovery import Contact, Record

NOW = 1_800_000_000.0
NETWORK = b"n" * 32
ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)


def published(value, identity=ALICE, salt=ADDRESS_SALT):
    made = make_record(identity, NETWORK, Record(salt, 1, round((NOW + 60) * 1000), value))
    return open_record(made.data, NETWORK, NOW)


def test_whoever_knows_the_id_finds_the_addresses():
    record = published(encode_addresses(("8.8.8.8:7470", "[2a00::1]:7470"), True, True))
    assert record.key == address_key(ALICE.node_id)
    assert decode_addresses(record, ALICE.node_id) == Contact(ALICE.node_id, ("8.8.8.8:7470", "[2a00::1]:7470"))


def test_the_value_is_a_map_that_another_implementation_can_make():
    value = encode_addresses(("8.8.8.8:1",), False, True)
    assert value == msgpack.packb({"addresses": ["8.8.8.8:1"], "role": "client"})
    foreign = msgpack.packb({"addresses": ["8.8.8.8:1"], "role": "client", "zz_relays": ["later"]})
    assert decode_addresses(published(foreign), ALICE.node_id).addresses == ("8.8.8.8:1",)


def test_the_addresses_of_another_node_are_not_taken():
    value = encode_addresses(("8.8.8.8:1",), True, True)
    for record in (published(value, BOB), published(value, salt=b"other")):
        with pytest.raises(ProtocolViolation) as caught:
            decode_addresses(record, ALICE.node_id)
        assert caught.value.reason is Reason.WRONG_SIGNER


@pytest.mark.parametrize("value", [b"", b"\xc1", msgpack.packb({"addresses": "8.8.8.8:1", "role": "x"}), msgpack.packb([1])])
def test_a_value_that_is_no_address_record_is_a_violation(value):
    with pytest.raises(ProtocolViolation):
        decode_addresses(published(value), ALICE.node_id)


def test_only_well_formed_addresses_are_given_each_once_and_at_most_four():
    listed = ["nonsense", "8.8.8.8:0", "8.8.8.8:1", "8.8.8.8:1", "8.8.8.8:2", "8.8.8.8:3", "8.8.8.8:4", "8.8.8.8:5"]
    record = published(msgpack.packb({"addresses": listed, "role": "server"}))
    assert decode_addresses(record, ALICE.node_id).addresses == ("8.8.8.8:1", "8.8.8.8:2", "8.8.8.8:3", "8.8.8.8:4")


def test_what_only_the_local_network_can_reach_is_published_only_there():
    addresses = ("192.168.1.7:1", "8.8.8.8:1", "127.0.0.1:1", "8.8.8.8:1")
    assert msgpack.unpackb(encode_addresses(addresses, True, is_public=True))["addresses"] == ["8.8.8.8:1"]
    assert msgpack.unpackb(encode_addresses(addresses, True, is_public=False))["addresses"] == list(addresses[:3])


def test_long_addresses_are_dropped_from_the_end_until_they_fit():
    long = tuple(f"{letter * 250}:1" for letter in "abcd")
    value = encode_addresses(long, True, is_public=False)
    assert len(value) <= 1000
    assert msgpack.unpackb(value)["addresses"] == list(long[:3])

"""Rule 9: limits per network count globally routable addresses only, by /24, /48 or registered name."""

import pytest

from p2pnode.discovery.diversity import contact_group, group_of, has_room
from p2pnode.wire.messages.discovery import Contact


def contact(number, *addresses):
    return Contact(number.to_bytes(32, "big"), addresses)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("8.8.8.1:1", "8.8.8.200:9", True),
        ("8.8.8.1:1", "8.8.9.1:1", False),
        ("[2a00:1450:4001::1]:1", "[2a00:1450:4001:ffff::2]:1", True),
        ("[2a00:1450:4001::1]:1", "[2a00:1450:4002::1]:1", False),
        ("[::ffff:8.8.8.1]:1", "8.8.8.7:1", True),
        ("[2002:808:808::1]:1", "8.8.8.7:1", True),
        ("a.example.org:1", "b.example.org:1", True),
        ("a.example.org:1", "a.example.net:1", False),
    ],
)
def test_rule_9_one_group_is_a_slash_24_a_slash_48_or_a_domain(left, right, same):
    assert (group_of(left) == group_of(right)) is same
    assert group_of(left)


@pytest.mark.parametrize(
    "address", ["10.0.0.1:1", "192.168.7.7:1", "127.0.0.1:1", "[fe80::1%eth0]:1", "[fd00::1]:1", "100.64.0.1:1"]
)
def test_rule_9_addresses_that_are_not_global_count_only_when_strict(address):
    assert group_of(address) == ""
    assert group_of(address, strict=True)


def test_a_contact_counts_to_its_first_address():
    assert contact_group(contact(1, "8.8.8.1:1", "9.9.9.1:1")) == group_of("8.8.8.2:1")
    assert contact_group(contact(1)) == ""


def test_has_room_counts_only_what_it_let_in():
    groups = {}
    assert [has_room(groups, "a", 2) for _ in range(4)] == [True, True, False, False]
    assert groups == {"a": 2}
    assert has_room(groups, "", 0)

"""Links that invite: they survive copying, and whatever is wrong with one is said in words."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.discovery.peers.invitations import Invitation, check_invitation, make_link, parse_link
from p2pnode.errors import ConfigError, InputError
from p2pnode.ids import NodeId, node_text

ALICE = NodeId(b"\7" * 32)
BOB = NodeId(b"\x08" * 32)
ADDRESSES = ("203.0.113.7:7470", "[2001:db8::7]:7470", "192.168.1.5:7470")


def test_a_link_says_who_where_and_which_network():
    said = parse_link(make_link(ALICE, ADDRESSES, "main", 1234))
    assert said == Invitation(1, ALICE, ADDRESSES, "main", 1234)
    assert said.entries()[1] == f"{node_text(ALICE)}@[2001:db8::7]:7470"


def test_a_link_means_nothing_to_a_shell():
    assert re.fullmatch(r"p2pnode://[a-z2-7]+", make_link(ALICE, ADDRESSES, "a $(network) & 'more'"))


@pytest.mark.parametrize("wrap", ["  {}\n", "<{}>", '"{}"', "{}/"])
def test_what_mail_and_chat_put_around_a_link_is_passed_over(wrap):
    link = make_link(ALICE, ADDRESSES, "main")
    assert parse_link(wrap.format(link)).node_id == ALICE
    half = len(link) // 2
    assert parse_link(f"{link[:half]}\r\n   {link[half:]}").node_id == ALICE
    assert parse_link(link.upper()).node_id == ALICE


@given(st.data())
def test_one_changed_or_lost_letter_is_noticed(data):
    link = make_link(ALICE, ADDRESSES, "main")
    position = data.draw(st.integers(len("p2pnode://"), len(link) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
    changed = link[:position] + letter + link[position + 1 :]
    shorter = link[:position] + link[position + 1 :]
    for broken in {changed, shorter} - {link}:
        try:
            assert parse_link(broken) == parse_link(link), "only the padding bits of the last letter may differ"
        except InputError:
            continue


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "starts with p2pnode://"),
        ("https://example.org/x", "starts with p2pnode://"),
        ("p2pnode://", "checksum"),
        ("p2pnode://!!!", "character"),
        ("p2pnode://aaaaaaaaaaaaaaaaaaaaaaaa", "checksum"),
        ("p2pnode://" + "a" * 5000, "at most 4096"),
    ],
)
def test_what_is_no_link_is_refused_in_words(text, words):
    with pytest.raises((ConfigError, InputError), match=words):
        parse_link(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"addresses": ("nonsense",)}, "an address that is none"),
        ({"addresses": ()}, "cannot be read"),
        ({"node_id": b"short"}, "cannot be read"),
    ],
)
def test_a_well_made_link_with_bad_contents_is_refused(changes, words):
    import base64

    import msgspec

    from p2pnode.discovery.peers.invitations import SCHEME, _checksum

    said = {"version": 1, "node_id": ALICE, "addresses": ADDRESSES, "network": "main", "expires_ms": 0, **changes}
    body = msgspec.msgpack.encode(said)
    text = SCHEME + base64.b32encode(body + _checksum(body)).decode().lower().rstrip("=")
    with pytest.raises((ConfigError, InputError), match=words):
        parse_link(text)


@pytest.mark.parametrize(
    ("own", "network", "now_ms", "words"),
    [
        (BOB, "other", 0, "network.id main"),
        (ALICE, "main", 0, "this node's own"),
        (BOB, "main", 1_000_000_000 + 30 * 60_000, "expired 30 minutes ago"),
    ],
)
def test_a_link_for_somebody_else_is_refused_with_what_to_do(own, network, now_ms, words):
    invitation = parse_link(make_link(ALICE, ADDRESSES, "main", 1_000_000_000))
    with pytest.raises((ConfigError, InputError), match=words):
        check_invitation(invitation, own, network, now_ms)
    check_invitation(invitation, BOB, "main", 999_999_999)


def test_a_node_without_an_address_cannot_invite():
    with pytest.raises(InputError, match="--address"):
        make_link(ALICE, ("nothing",), "main")


def test_only_the_best_addresses_go_in():
    many = tuple(f"203.0.113.{n}:7470" for n in range(1, 9))
    assert parse_link(make_link(ALICE, many, "main")).addresses == many[:4]

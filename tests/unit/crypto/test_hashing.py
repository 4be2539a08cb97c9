"""Hashes and domain tags."""

import hashlib

import pytest
from blake3 import blake3

from p2pnode.crypto.hashing import DOMAINS, TAG_SIZE, blake3_256, document_hash, signing_input, tagged_hash


def test_blake3_of_parts_is_that_of_their_concatenation() -> None:
    assert blake3_256(b"ab", memoryview(b"cd"), bytearray(b"")) == blake3(b"abcd").digest()
    # The published hash of nothing, from the BLAKE3 repository's test_vectors.json.
    assert blake3_256().hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_document_hash_is_blake2b_with_32_bytes() -> None:
    assert document_hash(b"abc") == hashlib.blake2b(b"abc", digest_size=32).digest()


def test_tags_are_distinct_and_of_one_size() -> None:
    assert {len(tag) for tag in DOMAINS.values()} == {TAG_SIZE}
    assert len(set(DOMAINS.values())) == len(DOMAINS)


def test_signing_input_separates_purpose_network_and_body() -> None:
    inputs = {
        signing_input(domain, network, body)
        for domain in ("offer", "quote")
        for network in (b"n", b"nn")
        for body in (b"", b"n", b"offer")
    }
    assert len(inputs) == 12
    assert signing_input("offer", b"net", b"body") == DOMAINS["offer"] + b"net" + document_hash(b"body")


def test_an_unlisted_domain_is_a_bug_of_ours() -> None:
    with pytest.raises(KeyError):
        signing_input("something", b"", b"")


def test_tagged_hashes_differ_by_domain() -> None:
    assert tagged_hash("chain", b"x") != tagged_hash("identity-puzzle", b"x")
    assert tagged_hash("chain", b"x", b"y") == tagged_hash("chain", b"xy")

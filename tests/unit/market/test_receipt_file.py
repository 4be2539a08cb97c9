import numpy as np
import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.market.cheques import HashChain
from p2pnode.market.receipt_file import ReceiptBundle, is_verified, read_bundle, verify_bundle, write_bundle
from p2pnode.market.slices import leaf_path, slice_root
from p2pnode.wire.envelope import document_id, encode_envelope, seal
from p2pnode.wire.messages.market import Agreement, Cheque, InputShape, Leaf, Order, Quote, Receipt
from p2pnode.wire.tensors import encode_values, values_hash

ALICE, BOB, EVE, NETWORK = Identity(b"a" * 32), Identity(b"b" * 32), Identity(b"e" * 32), b"net"
CHAIN = HashChain(b"s" * 32, 10)
INPUTS = {"x": np.arange(4, dtype=np.float32)}
OUTPUTS = {"y": np.arange(2, dtype=np.int64)}


def hash_of(values: dict) -> bytes:
    headers, chunks, _ = encode_values(values)
    return values_hash(headers, chunks)


def bundle(provider=ALICE, client=BOB, amount=30, **changes) -> ReceiptBundle:
    quote = Quote(
        client.node_id, bytes(32), b"m" * 32, "fast", (InputShape("x", (4,)),), 10**9, 4, 30, 0, 1, 200, 10**13, bytes(16)
    )
    quoted = seal(quote, provider, NETWORK)
    order = Order(
        document_id(quoted), provider.node_id, b"m" * 32, "fast", 1000, 10**13, 0, 0, 8, 1000, 200, CHAIN.value(0), 10, b"",
        True, False, 10**13, bytes(16),
    )  # fmt: skip
    ordered = seal(order, client, NETWORK)
    agreed = seal(Agreement(document_id(ordered), client.node_id, 1), provider, NETWORK)
    leaves = [Leaf(n, hash_of(INPUTS) if n == 2 else bytes(32), hash_of(OUTPUTS), b"", amount) for n in range(5)]
    receipt = Receipt(document_id(ordered), 0, 5, slice_root(leaves), 5, 5 * amount, 5 * amount, "cpu", "fast", 1, 2, b"")
    receipted = seal(receipt, provider, NETWORK)
    cheque = Cheque(document_id(ordered), provider.node_id, 0, document_id(receipted), 5 * amount, CHAIN.value(1), 3)
    parts = {
        "format": 1, "network_id": NETWORK, "quote": encode_envelope(quoted), "order": encode_envelope(ordered),
        "agreement": encode_envelope(agreed), "receipt": encode_envelope(receipted),
        "cheque": encode_envelope(seal(cheque, client, NETWORK)), "leaf": leaves[2], "position": 2,
        "path": leaf_path(leaves, 2),
    }  # fmt: skip
    return ReceiptBundle(**(parts | changes))


def failed(data: bytes, *tensors: dict) -> list[str]:
    return [check.name for check in verify_bundle(data, *tensors) if not check.ok]


def test_a_right_bundle_passes_every_check_offline() -> None:
    data = write_bundle(bundle())
    checks = verify_bundle(data, INPUTS, OUTPUTS)
    assert is_verified(checks), checks
    assert len(checks) >= 15
    assert read_bundle(data) == bundle()


def test_other_tensors_do_not_match() -> None:
    data = write_bundle(bundle())
    assert failed(data, OUTPUTS, INPUTS) == ["input matches", "output matches"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"network_id": b"other"}, "quote signature"),
        ({"position": 1}, "receipt covers the call"),
        ({"leaf": Leaf(2, bytes(32), bytes(32), b"", 1)}, "receipt covers the call"),
        ({"path": ()}, "receipt covers the call"),
        ({"cheque": b""}, "cheque"),
        ({"receipt": bundle(amount=20).receipt}, "receipt covers the call"),
        ({"order": bundle(client=EVE).order}, "one client"),
        ({"quote": bundle(provider=EVE).quote}, "one provider"),
        ({"agreement": bundle(client=EVE).agreement}, "agreement is for the order"),
        ({"cheque": bundle(client=EVE).cheque}, "cheque pays the receipt"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_one_false_part_fails_by_name(changes: dict, name: str) -> None:
    assert name in failed(write_bundle(bundle(**changes)))


def test_a_price_beyond_the_quote_fails() -> None:
    assert "price is the quote's" in failed(write_bundle(bundle(amount=31)))


def test_every_altered_byte_is_noticed() -> None:
    data = write_bundle(bundle())
    for position in range(0, len(data), 7):
        altered = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        assert not is_verified(verify_bundle(altered, INPUTS, OUTPUTS)), position


def test_bytes_that_are_no_bundle_are_one_failed_check() -> None:
    for data in (b"", b"\x80", b"hello", write_bundle(bundle())[:-5]):
        checks = verify_bundle(data)
        assert [check.ok for check in checks] == [False]

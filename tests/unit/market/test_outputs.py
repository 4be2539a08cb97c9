from p2pnode.market.outputs import KeptOutputs

A, B = b"a" * 32, b"b" * 32


def test_outputs_are_copied_and_given_back() -> None:
    outputs, buffer = KeptOutputs(100, 50), bytearray(b"abc")
    assert outputs.keep(A, 1, (), memoryview(buffer), 5, "cpu")
    buffer[:] = b"xyz"
    kept = outputs.get(A, 1)
    assert kept is not None
    assert (kept.payload, kept.work_us, kept.engine) == (b"abc", 5, "cpu")
    assert outputs.get(B, 1) is None


def test_the_oldest_make_room_and_the_count_of_bytes_is_right() -> None:
    outputs = KeptOutputs(100, 60)
    for number in range(4):
        assert outputs.keep(A, number, (), memoryview(bytes(40)), 0, "")
    assert [outputs.get(A, number) is not None for number in range(4)] == [False, False, True, True]
    assert outputs.size_bytes == 80
    outputs.keep(A, 3, (), memoryview(bytes(10)), 0, "")
    assert outputs.size_bytes == 50
    outputs.drop(A, (2, 9))
    assert outputs.size_bytes == 10


def test_one_output_too_large_is_not_kept() -> None:
    outputs = KeptOutputs(100, 60)
    assert not outputs.keep(A, 1, (), memoryview(bytes(61)), 0, "")
    assert outputs.get(A, 1) is None


def test_an_agreement_is_dropped_whole() -> None:
    outputs = KeptOutputs(100, 60)
    outputs.keep(A, 1, (), memoryview(bytes(5)), 0, "")
    outputs.keep(B, 1, (), memoryview(bytes(7)), 0, "")
    outputs.drop_agreement(A)
    assert outputs.size_bytes == 7
    assert outputs.get(B, 1) is not None

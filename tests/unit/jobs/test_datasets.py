"""Data sets: every kind is read item by item and written back as the same kind; what does not fit is refused in words."""

import csv
import json

import numpy as np
import pytest

from p2pnode.errors import ConfigError, StoreError
from p2pnode.jobs.datasets import fingerprint, open_dataset
from p2pnode.jobs.feeds import ValueInfo
from p2pnode.jobs.outputs import (
    Part,
    assemble,
    claim_parts,
    output_kind,
    part_path,
    parts_folder,
    read_part,
    remove_parts,
    write_part,
)

X = ValueInfo("x", "tensor(float)", (None, 3))
Y = ValueInfo("y", "tensor(int64)", (None,))
ROWS = np.arange(15, dtype=np.float32).reshape(5, 3)


def write(path, kind):
    if kind == ".npy":
        np.save(path, ROWS)
    elif kind == ".npz":
        np.savez(path, x=ROWS)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"x": row.tolist()}) + "\n" for row in ROWS))
    elif kind == ".csv":
        path.write_text("a,b,c\n" + "".join(",".join(map(str, row)) + "\n" for row in ROWS))
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"x": [row.tolist() for row in ROWS]}), path)
    return path


@pytest.mark.parametrize("kind", [".npy", ".npz", ".jsonl", ".csv", ".parquet"])
def test_rows_are_split_in_batches_along_the_first_axis(tmp_path, kind):
    dataset = open_dataset(write(tmp_path / f"data{kind}", kind), [X], 2)
    assert (dataset.kind, dataset.items, dataset.rows) == (kind, 3, 5)
    assert [dataset.rows_of(position) for position in range(3)] == [2, 2, 1]
    parts = [dataset.read(position)["x"] for position in (0, 1, 2)]
    assert all(part.dtype == np.float32 for part in parts)
    assert np.array_equal(np.concatenate(parts), ROWS)


def test_a_folder_is_one_item_a_file(tmp_path):
    np.save(tmp_path / "b.npy", ROWS[:2])
    np.savez(tmp_path / "a.npz", x=ROWS[2:])
    (tmp_path / "note.txt").write_text("not data")
    dataset = open_dataset(tmp_path, [X], 64)
    assert dataset.names == ("a.npz", "b.npy")
    assert dataset.read(0)["x"].shape == (3, 3)
    assert dataset.read(1)["x"].shape == (2, 3)


def test_an_array_without_axes_goes_with_every_item(tmp_path):
    np.savez(tmp_path / "d.npz", x=ROWS, rate=np.int64(16000))
    dataset = open_dataset(tmp_path / "d.npz", [X, ValueInfo("rate", "tensor(int64)")], 2)
    assert dataset.read(2)["rate"] == 16000
    assert dataset.read(2)["x"].shape == (1, 3)


def test_a_fixed_first_axis_sets_the_batch(tmp_path):
    np.save(tmp_path / "d.npy", ROWS)
    fixed = ValueInfo("x", "tensor(float)", (1, 3))
    assert open_dataset(tmp_path / "d.npy", [fixed], 64).items == 5
    with pytest.raises(ConfigError, match="exactly 2 rows"):
        open_dataset(tmp_path / "d.npy", [ValueInfo("x", "tensor(float)", (2, 3))], 64)


def test_numbers_are_converted_within_their_kind_only(tmp_path):
    np.save(tmp_path / "d.npy", ROWS.astype(np.float64))
    assert open_dataset(tmp_path / "d.npy", [X], 5).read(0)["x"].dtype == np.float32
    integer = ValueInfo("x", "tensor(int64)", (None, 3))
    assert open_dataset(tmp_path / "d.npy", [integer], 5).read(0)["x"].dtype == np.float64


def test_csv_columns_by_name_by_number_and_with_gaps(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("y,x_0,x_1,x_2\n7,1,,3\n8,4,5,6\n")
    item = open_dataset(path, [X, Y], 2).read(0)
    assert item["y"].tolist() == [7, 8]
    assert np.isnan(item["x"][0, 1])
    path.write_text('text\nhello\n"a,b"\n')
    assert open_dataset(path, [ValueInfo("text", "tensor(string)", (None,))], 2).read(0)["text"].tolist() == ["hello", "a,b"]


def test_jsonl_takes_bare_values_for_a_model_with_one_input(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("[1, 2, 3]\n\n[4, 5, 6]\n")
    assert open_dataset(path, [X], 2).read(0)["x"].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.txt", b"x", "not a data set"),
        ("d.npy", b"", "2 inputs"),
        ("d.npz", b"not a zip", "could not be read"),
        ("d.csv", b"", "first line"),
        ("d.csv", b"a,b\n1,2\n", "the data lacks"),
        ("d.parquet", b"PAR1", "could not be read"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        open_dataset(tmp_path / name, [X, Y], 2)


def test_a_damaged_npy_is_refused(tmp_path):
    (tmp_path / "d.npy").write_bytes(b"not numpy")
    with pytest.raises(ConfigError, match="could not be read"):
        open_dataset(tmp_path / "d.npy", [X], 2)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "d.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError):
        open_dataset(tmp_path / "d.npy", [X], 1)


def test_rows_that_lack_an_input_or_differ_in_shape_are_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"x": [1, 2, 3]}\n{"z": 1}\n')
    with pytest.raises(ConfigError, match="has no 'x'"):
        open_dataset(path, [X], 2).read(0)
    path.write_text('{"x": [1, 2, 3]}\n{"x": [1]}\n')
    with pytest.raises(ConfigError, match="one array"):
        open_dataset(path, [X], 2).read(0)


def test_the_fingerprint_follows_the_data(tmp_path):
    path = write(tmp_path / "d.npy", ".npy")
    first = fingerprint(path)
    assert fingerprint(path) == first
    np.save(path, ROWS[:1])
    assert fingerprint(path) != first


PARTS = [
    Part("", 2, {"y": np.array([1.5, 2.5], np.float32), "label": np.array(["a", "b"], object)}),
    Part("", 1, {"y": np.array([3.5], np.float32), "label": np.array(["c"], object)}),
]


@pytest.mark.parametrize("kind", [".npz", ".jsonl", ".csv", ".parquet"])
def test_parts_become_one_file_of_the_kind(tmp_path, kind):
    output = tmp_path / f"out{kind}"
    assemble(output, kind, lambda: iter(PARTS))
    if kind == ".npz":
        with np.load(output) as whole:
            assert whole["y"].tolist() == [1.5, 2.5, 3.5]
            assert whole["label"].tolist() == ["a", "b", "c"]
    elif kind == ".jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert rows == [{"y": 1.5, "label": "a"}, {"y": 2.5, "label": "b"}, {"y": 3.5, "label": "c"}]
    elif kind == ".csv":
        with output.open(newline="") as lines:
            assert list(csv.reader(lines)) == [["y", "label"], ["1.5", "a"], ["2.5", "b"], ["3.5", "c"]]
    else:
        from pyarrow import parquet

        assert parquet.read_table(output).to_pydict() == {"y": [1.5, 2.5, 3.5], "label": ["a", "b", "c"]}
    assert list(tmp_path.iterdir()) == [output]


def test_a_npy_holds_one_output(tmp_path):
    parts = [Part("", 2, {"y": ROWS[:2]}), Part("", 3, {"y": ROWS[2:]})]
    assemble(tmp_path / "o.npy", ".npy", lambda: iter(parts))
    assert np.array_equal(np.load(tmp_path / "o.npy"), ROWS)
    with pytest.raises(ConfigError, match="one output"):
        assemble(tmp_path / "p.npy", ".npy", lambda: iter(PARTS))
    assert not (tmp_path / "p.npy").exists()


def test_a_folder_gets_a_file_for_each_of_its_files(tmp_path):
    parts = [Part("a.npy", 1, {"y": ROWS}), Part("b.npz", 1, {"y": ROWS})]
    assemble(tmp_path / "out", "folder", lambda: iter(parts))
    assert np.array_equal(np.load(tmp_path / "out" / "a.npy"), ROWS)
    with np.load(tmp_path / "out" / "b.npz") as whole:
        assert np.array_equal(whole["y"], ROWS)


def test_sequences_and_maps_go_to_jsonl_row_by_row(tmp_path):
    part = Part("", 2, {"scores": [{1: 0.5}, {1: 0.25}]})
    assemble(tmp_path / "o.jsonl", ".jsonl", lambda: iter([part]))
    assert (tmp_path / "o.jsonl").read_text() == '{"scores": {"1": 0.5}}\n{"scores": {"1": 0.25}}\n'
    with pytest.raises(ConfigError, match="jsonl"):
        assemble(tmp_path / "o.npz", ".npz", lambda: iter([part]))


def test_the_kind_follows_the_output_or_else_the_data(tmp_path):
    assert output_kind(tmp_path / "o.jsonl", ".csv") == ".jsonl"
    assert output_kind(tmp_path / "results", ".csv") == ".csv"
    assert output_kind(tmp_path / "results", "folder") == "folder"
    with pytest.raises(ConfigError):
        output_kind(tmp_path / "o.npz", "folder")


def test_a_part_is_whole_or_absent(tmp_path):
    path = part_path(tmp_path / "o.npy", 7)
    write_part(path, {"y": ROWS, "s": [np.array(["ä"], object)]})
    values = read_part(path)
    assert np.array_equal(values["y"], ROWS)
    assert values["s"][0].tolist() == ["ä"]
    data = path.read_bytes()
    for size in (0, 10, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(StoreError):
            read_part(path)
    assert [item.name for item in path.parent.iterdir()] == ["000000007.part"]


def test_parts_of_other_work_are_removed_and_own_ones_kept(tmp_path):
    output = tmp_path / "o.npy"
    claim_parts(output, b"first")
    write_part(part_path(output, 0), {"y": ROWS})
    claim_parts(output, b"first")
    assert part_path(output, 0).exists()
    claim_parts(output, b"second")
    assert not part_path(output, 0).exists()
    remove_parts(output)
    assert not parts_folder(output).exists()

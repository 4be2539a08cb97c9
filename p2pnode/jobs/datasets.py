"""Reading a data set item by item: a folder of .npy/.npz files, or one .npy, .npz, .jsonl, .parquet or .csv file of rows.

An item is what one call takes: a whole file of a folder, or `batch` rows along the first axis. Items are read when they
are needed, so the data may be larger than the memory (.npy is mapped, .jsonl indexed; .csv, .npz and .parquet are held).
"""

import csv
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from p2pnode.errors import InputError, WorkError
from p2pnode.jobs.feeds import ValueInfo, as_value

KINDS = ("folder", ".npy", ".npz", ".jsonl", ".parquet", ".csv")
FOLDER_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True, slots=True)
class Dataset:
    """Numbered items. rows: of the whole set; names: of the items (files of a folder); read: one item's inputs."""

    kind: str
    items: int
    rows: int
    names: tuple[str, ...]
    read: Callable[[int], dict[str, Any]]
    rows_of: Callable[[int], int]


def dataset_kind(path: Path) -> str:
    """Give one of KINDS. Raises InputError for anything else, or when there is nothing."""
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise InputError(f"there is no data at {path}")
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise InputError(f"{path.name} is not a data set: use a folder, or {', '.join(KINDS[1:])}")
    return suffix


def fingerprint(path: Path) -> bytes:
    """Give 32 bytes that change when the data changed: names, sizes and times of its files, not their contents."""
    digest = hashlib.blake2b(digest_size=32)
    files = sorted(item for item in path.iterdir() if item.suffix in FOLDER_SUFFIXES) if path.is_dir() else [path]
    for item in files:
        facts = item.stat()
        digest.update(f"{item.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return digest.digest()


def open_dataset(path: Path, inputs: Sequence[ValueInfo], batch: int) -> Dataset:
    """Open a data set for a model with these inputs. Raises InputError, in words, when they do not fit."""
    kind = dataset_kind(path)
    if kind == "folder":
        return _folder(path, inputs)
    try:
        rows, read_rows = _ROW_READERS[kind](path, inputs)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} could not be read as {kind}: {error}") from error
    size = _rows_per_item(inputs, batch, rows)
    count = -(-rows // size)

    def read(position: int) -> dict[str, Any]:
        start = position * size
        return read_rows(start, min(start + size, rows))

    def rows_of(position: int) -> int:
        return min((position + 1) * size, rows) - position * size

    return Dataset(kind, count, rows, (), read, rows_of)


def _rows_per_item(inputs: Sequence[ValueInfo], batch: int, rows: int) -> int:
    """Rows of one call: the batch, unless the model's first axis is fixed."""
    fixed = {info.shape[0] for info in inputs if info.is_tensor and info.shape and isinstance(info.shape[0], int)}
    fixed.discard(-1)
    if len(fixed) != 1:
        return max(batch, 1)
    size = fixed.pop()
    if not isinstance(size, int) or size < 1 or rows % size:
        raise InputError(f"the model takes exactly {size} rows a call and {rows} rows are not a multiple of that")
    return size


def _folder(path: Path, inputs: Sequence[ValueInfo]) -> Dataset:
    files = sorted(item for item in path.iterdir() if item.suffix in FOLDER_SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no .npy or .npz file")

    def read(position: int) -> dict[str, Any]:
        file = files[position]
        try:
            if file.suffix == ".npz":
                with np.load(file, allow_pickle=False) as archive:
                    return _fit(inputs, {name: archive[name] for name in archive.files})
            return _fit(inputs, {_only(inputs).name: np.load(file, allow_pickle=False)})
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{file} could not be read: {error}") from error

    return Dataset("folder", len(files), len(files), tuple(item.name for item in files), read, lambda _: 1)


_Rows = tuple[int, Callable[[int, int], dict[str, Any]]]


def _npy(path: Path, inputs: Sequence[ValueInfo]) -> _Rows:
    info = _only(inputs)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim == 0:
        raise InputError(f"{path} holds a single number, not rows")
    return array.shape[0], lambda start, stop: _fit(inputs, {info.name: np.array(array[start:stop])})


def _npz(path: Path, inputs: Sequence[ValueInfo]) -> _Rows:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    _require(inputs, arrays)
    lengths = {array.shape[0] for array in arrays.values() if array.ndim}
    if len(lengths) != 1:
        raise InputError(f"the arrays of {path.name} have different first axes: {sorted(lengths)}")
    # An array without axes is a constant of the model (a sample rate, say) and goes with every item.
    return lengths.pop(), lambda start, stop: _fit(
        inputs, {name: array[start:stop] if array.ndim else array for name, array in arrays.items()}
    )


def _jsonl(path: Path, inputs: Sequence[ValueInfo]) -> _Rows:
    offsets: list[int] = []
    position = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                offsets.append(position)
            position += len(line)

    def read(start: int, stop: int) -> dict[str, Any]:
        rows: list[Mapping[str, Any]] = []
        with path.open("rb") as lines:
            for offset in offsets[start:stop]:
                lines.seek(offset)
                row = json.loads(lines.readline())
                rows.append(row if isinstance(row, dict) else {_only(inputs).name: row})
        return _stack(inputs, rows)

    return len(offsets), read


def _csv(path: Path, inputs: Sequence[ValueInfo]) -> _Rows:
    with path.open(newline="", encoding="utf-8-sig") as lines:
        table = [row for row in csv.reader(lines) if row]
    if not table:
        raise InputError(f"{path} is empty: the first line should name the columns")
    header, body = [name.strip() for name in table[0]], table[1:]
    columns = _csv_columns(header, inputs)

    def read(start: int, stop: int) -> dict[str, Any]:
        rows = body[start:stop]
        values: dict[str, Any] = {}
        for info in inputs:
            if info.name not in columns:
                continue
            cells = [[row[index] for index in columns[info.name]] for row in rows]
            flat = len(columns[info.name]) == 1 and len(info.shape) < 2
            values[info.name] = _csv_array(info, [row[0] for row in cells] if flat else cells)
        return values

    return len(body), read


def _csv_columns(header: list[str], inputs: Sequence[ValueInfo]) -> dict[str, list[int]]:
    """Which columns feed which input: its own name, `name_0 name_1 …`, or all columns for a model's only input."""
    found: dict[str, list[int]] = {}
    for info in inputs:
        if info.name in header:
            found[info.name] = [header.index(info.name)]
        elif f"{info.name}_0" in header:
            count = sum(1 for index in range(len(header)) if f"{info.name}_{index}" in header)
            found[info.name] = [header.index(f"{info.name}_{index}") for index in range(count)]
    required = [info for info in inputs if not info.is_optional]
    if not found and len(required) == 1:
        return {required[0].name: list(range(len(header)))}
    _require(inputs, found)
    return found


def _csv_array(info: ValueInfo, cells: list[Any]) -> Any:
    if info.element is np.object_:
        return as_value(info, cells)
    if info.element is np.bool_:
        texts = np.char.lower(np.asarray(cells, dtype=str))
        return (texts == "true") | (texts == "1")
    array = np.asarray(cells, dtype=str)
    # An empty cell is a missing number, where the type has one.
    return np.where(array == "", "nan", array).astype(np.float64 if info.element is None else info.element)


def _parquet(path: Path, inputs: Sequence[ValueInfo]) -> _Rows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("reading .parquet needs pyarrow: install it with `pip install 'p2pnode[tables]'`") from error
    table = parquet.read_table(path, memory_map=True)
    header = list(table.column_names)
    columns = _csv_columns(header, inputs)

    def read(start: int, stop: int) -> dict[str, Any]:
        part = table.slice(start, stop - start)
        values: dict[str, Any] = {}
        for info in inputs:
            indexes = columns.get(info.name)
            if indexes is None:
                continue
            cells = [part.column(index).to_pylist() for index in indexes]
            several = len(indexes) > 1 or (len(info.shape) == 2 and not isinstance(cells[0][0], list))
            values[info.name] = _list_value(info, [list(row) for row in zip(*cells, strict=True)] if several else cells[0])
        return values

    return table.num_rows, read


def _stack(inputs: Sequence[ValueInfo], rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    values = {}
    for info in inputs:
        if all(info.name in row for row in rows):
            values[info.name] = _list_value(info, [row[info.name] for row in rows])
        elif not info.is_optional:
            raise InputError(f"a row has no {info.name!r}; the model's inputs are {', '.join(item.name for item in inputs)}")
    return values


def _list_value(info: ValueInfo, cells: list[Any]) -> Any:
    cells = [np.nan if cell is None and info.element in (np.float32, np.float64, np.float16) else cell for cell in cells]
    try:
        return as_value(ValueInfo(info.name, f"tensor({_element_name(info)})", info.shape), cells)
    except WorkError as error:
        raise InputError(f"the rows of {info.name!r} do not make one array of {info.type}") from error


def _element_name(info: ValueInfo) -> str:
    return info.type.rsplit("tensor(", 1)[-1].split(")", 1)[0]


def _fit(inputs: Sequence[ValueInfo], arrays: dict[str, Any]) -> dict[str, Any]:
    """Keep the model's inputs and convert numbers within their kind (float64 to float32, never float to int)."""
    _require(inputs, arrays)
    values = {}
    for info in inputs:
        if info.name not in arrays:
            continue
        array = np.asarray(arrays[info.name])
        wanted = info.element
        if (
            wanted is not None
            and wanted is not np.object_
            and array.dtype != wanted
            and np.can_cast(array.dtype, wanted, "same_kind")
        ):
            array = array.astype(wanted)
        values[info.name] = as_value(info, array)
    return values


def _require(inputs: Sequence[ValueInfo], present: Mapping[str, Any]) -> None:
    missing = [info.name for info in inputs if info.name not in present and not info.is_optional]
    if missing:
        raise InputError(f"the data lacks {', '.join(missing)}; it has {', '.join(present) or 'nothing'}")


def _only(inputs: Sequence[ValueInfo]) -> ValueInfo:
    required = [info for info in inputs if not info.is_optional] or list(inputs)
    if len(required) != 1:
        names = ", ".join(info.name for info in required)
        raise InputError(f"the model takes {len(required)} inputs ({names}): use .npz or .jsonl, which name them")
    return required[0]


_ROW_READERS: dict[str, Callable[[Path, Sequence[ValueInfo]], _Rows]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}

"""Writing a map's results: each item as a part, put in place by one atomic rename, and the parts assembled at the end.

A part is complete or absent, whatever kills the process, and is written before its item is marked done. A part holds the
values in the wire's own tensor form behind their header, so every kind of value survives.
"""

import csv
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from p2pnode.errors import InputError, StoreError
from p2pnode.jobs.datasets import KINDS
from p2pnode.wire.tensors import decode_values, encode_values, headers_bytes, parse_headers

_PART_HEAD = struct.Struct("<8sQQ")
_PART_MAGIC = b"p2ppart1"


@dataclass(frozen=True, slots=True)
class Part:
    """One item's results. rows: how many rows of input it answers; name: the input file's name in a folder."""

    name: str
    rows: int
    values: Mapping[str, Any]


def output_kind(path: Path, data_kind: str) -> str:
    """Give the kind to write: as the output's suffix says, else as the data. Raises InputError when they cannot fit."""
    suffix = path.suffix.lower()
    if data_kind == "folder":
        if suffix in KINDS:
            raise InputError(f"the data is a folder, so the output is one too: {path.name} looks like a file")
        return "folder"
    return suffix if suffix in KINDS else data_kind


def parts_folder(output: Path) -> Path:
    """Give the folder that holds the parts until the end: beside the output, so that renames stay on one disk."""
    return output.with_name(output.name + ".parts")


def part_path(output: Path, position: int) -> Path:
    """Give the file of one part."""
    return parts_folder(output) / f"{position:09d}.part"


def claim_parts(output: Path, key: bytes) -> None:
    """Keep the parts that an earlier attempt at the same work left, and remove those of other work."""
    if not owns_parts(output, key):
        remove_parts(output)
        _replace(_owner(output), lambda file: file.write(key))


def owns_parts(output: Path, key: bytes) -> bool:
    """Say whether the parts that lie there are those of this work."""
    try:
        return _owner(output).read_bytes() == key
    except OSError:
        return False


def release_parts(output: Path, key: bytes) -> None:
    """Remove what a complete map left behind, unless other work has taken its place by now."""
    if owns_parts(output, key) or not parts_folder(output).exists():
        remove_parts(output)


def _owner(output: Path) -> Path:
    return parts_folder(output) / "work"


def write_part(path: Path, values: Mapping[str, Any]) -> None:
    """Write one part durably: bytes, flush to disk, rename. Raises StoreError; a half-written file never has the name."""
    headers, chunks, size = encode_values(values)
    head = headers_bytes(headers)

    def write(file: BinaryIO) -> None:
        file.write(_PART_HEAD.pack(_PART_MAGIC, len(head), size))
        file.write(head)
        for chunk in chunks:
            file.write(chunk)

    _replace(path, write)


def read_part(path: Path) -> dict[str, Any]:
    """Read one part. Raises StoreError when it is damaged."""
    try:
        data = path.read_bytes()
        magic, head_size, size = _PART_HEAD.unpack_from(data)
        if magic != _PART_MAGIC or len(data) != _PART_HEAD.size + head_size + size:
            raise StoreError(f"{path} is not a complete part")
        headers = parse_headers(data[_PART_HEAD.size : _PART_HEAD.size + head_size])
        return decode_values(headers, memoryview(data)[_PART_HEAD.size + head_size :])
    except (OSError, struct.error) as error:
        raise StoreError(f"the part {path} could not be read: {error}") from error


def assemble(output: Path, kind: str, parts: Callable[[], Iterator[Part]]) -> None:
    """Write the whole output from its parts, in order, by one rename; then the parts may go.

    parts: gives a fresh iterator each time it is called. Raises InputError when the values do not fit the kind.
    """
    if kind == "folder":
        _folder(output, parts)
    else:
        _WRITERS[kind](output, parts)


def remove_parts(output: Path) -> None:
    """Remove the parts, all at once for whoever looks: half of them would seem to be items that are still to be done."""
    folder = parts_folder(output)
    waste = folder.with_name(folder.name + ".waste")
    shutil.rmtree(waste, ignore_errors=True)
    with suppress(OSError):
        folder.rename(waste)
    shutil.rmtree(waste, ignore_errors=True)


def _folder(output: Path, parts: Callable[[], Iterator[Part]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for part in parts():
        stem = Path(part.name)
        arrays = _arrays(part, stem.suffix)
        if stem.suffix == ".npy" and len(arrays) == 1:
            _replace(output / stem.name, lambda file, arrays=arrays: np.save(file, next(iter(arrays.values()))))  # type: ignore[misc]
        else:
            _replace(output / f"{stem.stem}.npz", lambda file, arrays=arrays: np.savez(file, **arrays))  # type: ignore[misc]


def _npy(output: Path, parts: Callable[[], Iterator[Part]]) -> None:
    shapes, dtype, name = [], None, ""
    for part in parts():
        arrays = _arrays(part, ".npy")
        if len(arrays) != 1:
            raise InputError(f"a .npy file holds one output and the model gave {', '.join(arrays)}: choose one, or write .npz")
        name, array = next(iter(arrays.items()))
        shapes.append(_rows_first(array).shape)
        dtype = array.dtype
    if dtype is None:
        return
    if len({shape[1:] for shape in shapes}) > 1:
        raise InputError(f"the parts of {name!r} have different shapes: write .jsonl")
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": whole}
        )
        for part in parts():
            file.write(np.ascontiguousarray(_rows_first(next(iter(_arrays(part, ".npy").values())))).tobytes())

    _replace(output, write)


def _npz(output: Path, parts: Callable[[], Iterator[Part]]) -> None:
    columns: dict[str, list[Any]] = {}
    for part in parts():
        for name, array in _arrays(part, ".npz").items():
            columns.setdefault(name, []).append(_rows_first(array))
    try:
        whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    except ValueError as error:
        raise InputError(f"the parts have different shapes ({error}): write .jsonl") from error
    _replace(output, lambda file: np.savez(file, **whole))  # type: ignore[arg-type]


def _jsonl(output: Path, parts: Callable[[], Iterator[Part]]) -> None:
    def write(file: BinaryIO) -> None:
        for part in parts():
            for row in _rows(part):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    _replace(output, write)


def _csv(output: Path, parts: Callable[[], Iterator[Part]]) -> None:
    temporary = output.with_name(output.name + ".writing")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header: list[str] | None = None
        for part in parts():
            for row in _rows(part):
                flat = dict(_flatten(row))
                if header is None:
                    header = list(flat)
                    writer.writerow(header)
                if list(flat) != header:
                    raise InputError("the rows have different numbers of columns: write .jsonl")
                writer.writerow(list(flat.values()))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(output)


def _parquet(output: Path, parts: Callable[[], Iterator[Part]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("writing .parquet needs pyarrow: install it with `pip install 'p2pnode[tables]'`") from error
    temporary = output.with_name(output.name + ".writing")
    writer = None
    for part in parts():
        table = pyarrow.Table.from_pylist(list(_rows(part)))
        if writer is None:
            writer = parquet.ParquetWriter(temporary, table.schema)
        writer.write_table(table.cast(writer.schema))
    if writer is not None:
        writer.close()
        temporary.replace(output)


def _arrays(part: Part, kind: str) -> dict[str, Any]:
    arrays = {}
    for name, value in part.values.items():
        if not isinstance(value, np.ndarray):
            raise InputError(f"output {name!r} is not an array, which {kind} cannot hold: write .jsonl")
        # Pickled objects would run code when they are read; fixed-width text does not.
        arrays[name] = value.astype(str) if value.dtype == object else value
    return arrays


def _rows_first(array: Any) -> Any:
    return array if array.ndim else array.reshape(1)


def _rows(part: Part) -> Iterator[dict[str, Any]]:
    """Give the part row by row; a value that has no row for each input row goes whole into a part of one row."""
    plain = {name: _plain(value) for name, value in part.values.items()}
    if part.rows == 1:
        yield {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in plain.items()}
        return
    for name, value in plain.items():
        if not isinstance(value, list) or len(value) != part.rows:
            raise InputError(f"output {name!r} does not have one value for each of the {part.rows} rows: use --batch 1")
    for index in range(part.rows):
        yield {name: value[index] for name, value in plain.items()}


def _plain(value: Any) -> Any:
    """Give a value as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return [value.real, value.imag] if isinstance(value, complex) else value


def _flatten(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, list):
            yield from _flatten({f"{name}_{index}": item for index, item in enumerate(value)})
        elif isinstance(value, Mapping):
            yield from _flatten({f"{name}_{key}": item for key, item in value.items()})
        else:
            yield name, value


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error}") from error


_WRITERS: dict[str, Callable[[Path, Callable[[], Iterator[Part]]], None]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}

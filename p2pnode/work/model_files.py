"""Reading an owner's model file for the confined child: the .onnx file, and the external data files that it names.

The child cannot open files, so the daemon does, for the names that the child found. A name may only lead to a plain file in
the model's own folder: a model from elsewhere must not make its owner publish another file of the machine.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

from p2pnode.environment import Environment
from p2pnode.errors import StoreError, WorkError
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import InitializerEntry
from p2pnode.work.settings import WorkSettings

# The same name as `inspection.BLOB_LOCATION`, which is not imported: it would load onnx into the daemon.
BLOB_LOCATION: Final = "weights.bin"
_ROUNDING_BYTES: Final = 16 << 20

# (name, dtype, shape, offset in the blob, size in bytes)
Place: TypeAlias = tuple[str, int, tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class SplitModel:
    """Where the parts of a split model lie in the child's output. initializers: (name, dtype, shape, offset, size)."""

    graph_size: int
    blob_offset: int
    blob_size: int
    initializers: tuple[Place, ...]


def entries(places: Sequence[Place]) -> tuple[InitializerEntry, ...]:
    """Give the manifest's form of initialisers that all lie in blob 1."""
    return tuple(InitializerEntry(name, dtype, shape, 1, offset, size) for name, dtype, shape, offset, size in places)


def places(initializers: Sequence[InitializerEntry]) -> tuple[Place, ...]:
    """Give the workers' form of a manifest's initialisers."""
    return tuple((entry.name, entry.dtype, entry.shape, entry.offset, entry.size) for entry in initializers)


def parse_places(raw: Any) -> tuple[Place, ...]:
    """Check initialisers as a confined child told them. Raises WorkError(BAD_MODEL) when they are malformed."""
    try:
        return tuple(
            (str(name), int(dtype), tuple(int(size) for size in shape), int(offset), int(size))
            for name, dtype, shape, offset, size in raw
        )
    except (TypeError, ValueError) as error:
        raise WorkError(Reason.BAD_MODEL, f"inspecting it gave no sound answer ({error})") from error


async def split_file(path: Path, environment: Environment, settings: WorkSettings) -> tuple[SplitModel, bytes]:
    """Read a model and let a confined child split it. Gives the places and the bytes.

    Raises WorkError for an unsound model, EXTERNAL_DATA for a file outside its folder; StoreError when a file cannot be read.
    """
    data = await environment.executor.run(_read, path, settings.model_bytes_max)
    arguments: dict[str, Any] = {"graph_size": len(data), "external": {}, "graph_bytes_max": settings.graph_bytes_max}
    result, output = await _split(arguments, data, environment, settings)
    if result.get("missing"):
        locations = [str(location) for location in result["missing"]]
        data, external = await environment.executor.run(_with_external, path, data, locations, settings.model_bytes_max)
        result, output = await _split({**arguments, "external": external}, data, environment, settings)
        if result.get("missing"):
            raise WorkError(Reason.EXTERNAL_DATA, "the model names too many external files")
    return _parse(result, len(output)), output


async def _split(
    arguments: dict[str, Any], data: bytes, environment: Environment, settings: WorkSettings
) -> tuple[dict[str, Any], bytes]:
    # Larger models take longer to copy: 100 MB/s is a tenth of what was measured.
    seconds = settings.inspect_seconds + len(data) / 100e6
    # Each initialiser may gain up to 63 bytes of alignment.
    room = len(data) + len(data) // 8 + _ROUNDING_BYTES
    return await environment.runtime.confined("split", arguments, data, room, seconds)


def _parse(raw: dict[str, Any], output_size: int) -> SplitModel:
    """Check the child's answer: it had a stranger's bytes in it."""
    try:
        initializers = parse_places(raw["initializers"])
        model = SplitModel(int(raw["graph_size"]), int(raw["blob_offset"]), int(raw["blob_size"]), initializers)
    except (KeyError, TypeError, ValueError) as error:
        raise WorkError(Reason.BAD_MODEL, f"splitting it gave no sound answer ({error})") from error
    if not 0 < model.graph_size <= model.blob_offset or model.blob_size < 0 or model.blob_offset + model.blob_size > output_size:
        raise WorkError(Reason.BAD_MODEL, "splitting it gave no sound answer")
    return model


def _read(path: Path, size_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise StoreError(f"{path.name} is not a file")
            if info.st_size > size_max:
                raise WorkError(Reason.MODEL_TOO_LARGE, f"{path.name} has {info.st_size} bytes, more than {size_max}")
            return file.read()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error


def _with_external(path: Path, data: bytes, locations: list[str], size_max: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    parts, external, total = [data], {}, len(data)
    for location in locations:
        content = _read(_beside(path, location), size_max)
        external[location] = (total, len(content))
        parts.append(content)
        total += len(content)
        if total > size_max:
            raise WorkError(Reason.MODEL_TOO_LARGE, f"the model and its data have more than {size_max} bytes")
    return b"".join(parts), external


def _beside(path: Path, location: str) -> Path:
    """Give the file that a location names, if it is one in the model's own folder and not a way out of it."""
    pure = PurePosixPath(location)
    if pure.is_absolute() or ".." in pure.parts or "\\" in location or "\0" in location:
        raise WorkError(Reason.EXTERNAL_DATA, f"external data {location[:100]!r} is not in the model's folder")
    folder = path.resolve().parent
    try:
        target = (folder / pure).resolve(strict=True)
    except OSError as error:
        raise WorkError(Reason.EXTERNAL_DATA, f"external data {location[:100]!r} is not beside the model") from error
    if not target.is_relative_to(folder):
        raise WorkError(Reason.EXTERNAL_DATA, f"external data {location[:100]!r} leads out of the model's folder")
    return target

"""The text of `config.toml`: read it, change one value and keep every other line, write it whole or not at all."""

import json
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

from p2pnode.errors import ConfigError

_FILE_SIZE_MAX: Final = 1 << 20


def read_text(path: Path) -> str:
    """Give the file's text, empty when there is none. Raises ConfigError."""
    try:
        if path.stat().st_size > _FILE_SIZE_MAX:
            raise ConfigError(f"{path} is too large for a settings file; put a smaller one in its place")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def values_in(text: str, where: str) -> dict[str, str]:
    """Give dotted name -> text of every value in a file's text. Raises ConfigError for what is no settings file."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    found: dict[str, str] = {}
    for section, table in tree.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {section!r} must stand in a section, such as [provide]")
        for name, value in table.items():
            found[f"{section}.{name}"] = _value_text(value, f"{section}.{name}", where)
    return found


def literal(value: Any, text: str) -> str:
    """Give a parsed setting as TOML: numbers and truth values bare, lists as arrays, the rest as human text in quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_quoted(part) for part in text.split(",") if part) + "]"
    return text if re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", text) and isinstance(value, (int, float)) else _quoted(text)


def with_value(text: str, name: str, value: str) -> str:
    """Give the text with one setting changed or added. value: TOML. All other lines and comments stay."""
    section, _, key = name.partition(".")
    lines = text.splitlines()
    start, end = _section(lines, section)
    new_line = f"{key} = {value}"
    if start is None:
        return "\n".join([*lines, *([""] if lines else []), f"[{section}]", new_line]) + "\n"
    first, last = _key(lines, start, end, key)
    if first is None:
        while end > start + 1 and not lines[end - 1].strip():
            end -= 1
        return "\n".join([*lines[:end], new_line, *lines[end:]]) + "\n"
    return "\n".join([*lines[:first], new_line, *lines[last:]]) + "\n"


def without_value(text: str, name: str) -> str:
    """Give the text without one setting."""
    section, _, key = name.partition(".")
    lines = text.splitlines()
    start, end = _section(lines, section)
    if start is None:
        return text
    first, last = _key(lines, start, end, key)
    return text if first is None else "\n".join([*lines[:first], *lines[last:]]) + "\n"


def write_atomically(path: Path, data: bytes) -> None:
    """Put data into a file (0600) so that a crash leaves the old or the new content, never a part. Raises ConfigError."""
    part = write_part(path, data)
    try:
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_part(path: Path, data: bytes) -> Path:
    """Write data to a new file (0600) beside `path`, on disk when this returns; the caller moves or removes it."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        part = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    return part


def sync_folder(folder: Path) -> None:
    """Wait until a folder's new names are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> ConfigError:
    """Give the error for a file that cannot be written."""
    return ConfigError(f"{path} cannot be written: {error.strerror}; correct the folder's permissions or space")


def _value_text(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, str)):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, (int, float, str)) for part in value):
        return ",".join(str(part) for part in value)
    raise ConfigError(f"{name} in {where} must be a text, a number, true, false or a list of them")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _section(lines: list[str], section: str) -> tuple[int | None, int]:
    """Give the line number of a section's header and of the first line after the section."""
    start = None
    for number, line in enumerate(lines):
        header = re.match(r"\s*\[+\s*[\"']?([^\]\"']+?)[\"']?\s*\]+\s*(#.*)?$", line)
        if header is None:
            continue
        if start is not None:
            return start, number
        if header[1] == section:
            start = number
    return start, len(lines)


def _key(lines: list[str], start: int, end: int, key: str) -> tuple[int | None, int]:
    """Give the first line of a key's value in a section and the first line after it; arrays may span lines."""
    for number in range(start + 1, end):
        if not re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", lines[number]):
            continue
        for last in range(number + 1, end + 1):
            try:
                tomllib.loads("\n".join(lines[number:last]))
            except tomllib.TOMLDecodeError:
                continue
            return number, last
    return None, end

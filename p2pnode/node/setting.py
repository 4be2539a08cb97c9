"""What one setting is: its kind of value, its text form, its documentation. The settings themselves are in `node/config.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

from p2pnode import ids, units
from p2pnode.errors import ConfigError

FILE_PREFIX: Final = "file:"
_LIST_SIZE_MAX: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value. parse raises ValueError, in words; format gives what parse takes. unit: for people."""

    name: str
    parse: Callable[[str], Any]
    format: Callable[[Any], str]
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table of settings.

    name: dotted, `section.field`. live: a running node applies a change at once. environment: the variable that wins over
    the file. default_text: the default in human units, before any network profile.
    """

    name: str
    kind: Kind
    default: Any
    doc: str
    live: bool

    @property
    def environment(self) -> str:
        """The name of the environment twin."""
        return "P2PNODE_" + self.name.upper().replace(".", "_")

    @property
    def default_text(self) -> str:
        """The default as text; empty for an empty list or an unset value."""
        return self.kind.format(self.default)

    @property
    def unit(self) -> str:
        """The unit, for people."""
        return self.kind.unit


def setting(default: Any, kind: Kind, doc: str, *, live: bool = True) -> Any:
    """Declare a field of a settings dataclass together with its row in the table."""
    return field(default=default, metadata={"kind": kind, "doc": doc, "live": live})


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.strip().lower() not in known:
        raise ValueError(f"{text!r} is neither true nor false")
    return known[text.strip().lower()]


def whole(low: int, high: int = 2**53, unit: str = "") -> Kind:
    """A whole number within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{text!r} must lie between {low} and {high}")
        return value

    return Kind("whole number", parse, str, unit)


def number(low: float, high: float) -> Kind:
    """A decimal number within bounds."""

    def parse(text: str) -> float:
        try:
            value = float(Decimal(text.strip()))
        except InvalidOperation:
            raise ValueError(f"{text!r} is not a number") from None
        if not low <= value <= high:
            raise ValueError(f"{text!r} must lie between {low:g} and {high:g}")
        return value

    return Kind("number", parse, lambda value: f"{value:g}")


def choice(*options: str) -> Kind:
    """One of a few words."""

    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in options:
            raise ValueError(f"{text!r} is none of {', '.join(options)}")
        return word

    return Kind(" | ".join(options), parse, str)


def listed(item: Kind) -> Kind:
    """A list of values, separated by commas."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(item.parse(part) for part in text.split(",") if part.strip()))

    return Kind(f"list of {item.name}s", parse, lambda values: ",".join(item.format(value) for value in values), item.unit)


def optional(kind: Kind) -> Kind:
    """A value that may be left empty; None inside."""
    return Kind(
        kind.name,
        lambda text: kind.parse(text) if text.strip() else None,
        lambda value: "" if value is None else kind.format(value),
        kind.unit,
    )


def identifier(prefix: str) -> Kind:
    """The text of an id; 32 bytes inside."""
    return Kind(f"{prefix} id", lambda text: ids.parse_id(prefix, text), lambda value: ids.id_text(prefix, value))


def _size_text(value: int) -> str:
    for suffix, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value and value % size == 0:
            return f"{value // size}{suffix}"
    return str(value)


def _duration(text: str) -> float:
    value = units.parse_duration(text)
    if value > 10 * 365 * 86400:
        raise ValueError(f"{text!r} is longer than ten years")
    return value


def _duration_text(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    if milliseconds % 1000:
        return f"{milliseconds}ms"
    rest, parts = milliseconds // 1000, ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        parts += f"{count}{unit}" if count else ""
    return parts or "0s"


def _word(text: str) -> str:
    word = text.strip()
    if not word or len(word) > 64 or not word.isprintable():
        raise ValueError(f"{text!r} must have 1 to 64 printable characters")
    return word


def check_address(text: str) -> str:
    """Give `host:port` (`[host]:port` for IPv6) as it is. Raises ValueError, in words."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535 or len(text) > 262:
        raise ValueError(f"{text!r} is not an address, such as 192.168.1.7:7470")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{text!r} needs brackets around its IPv6 address, such as [fe80::1]:7470")
    return text.strip()


def _peer_address(text: str) -> str:
    node, at, address = text.strip().rpartition("@")
    if at:
        ids.parse_id(ids.NODE, node)
    check_address(address)
    return text.strip()


def _bootstrap_entry(text: str) -> str:
    if text.strip().startswith(FILE_PREFIX):
        if not text.strip().removeprefix(FILE_PREFIX):
            raise ValueError(f"{text!r} names no file")
        return text.strip()
    return _peer_address(text)


def read_entries(path: Path) -> tuple[str, ...]:
    """Give the peers in a file: one a line, `#` begins a comment. Raises ConfigError that names the file and the line."""
    try:
        with path.expanduser().open(encoding="utf-8") as file:
            text = file.read(_LIST_SIZE_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list of bootstrap peers {path} cannot be read: {error}") from error
    if len(text) > _LIST_SIZE_MAX:
        raise ConfigError(f"the list of bootstrap peers {path} is too large; put a smaller one in its place")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if entry:
            try:
                found.append(_peer_address(entry))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    return tuple(found)


def _processors(text: str) -> str:
    stripped = text.strip()
    if stripped.endswith("%"):
        if units.parse_fraction(stripped) <= 0:
            raise ValueError(f"{text!r} must be more than 0%")
        return stripped
    return str(whole(1, 4096).parse(stripped))


BOOLEAN: Final = Kind("true | false", _boolean, lambda value: "true" if value else "false")
TEXT: Final = Kind("text", str.strip, str)
WORD: Final = Kind("word", _word, str)
CREDITS: Final = Kind("amount", units.parse_credits, units.format_credits, "credits")
SIZE: Final = Kind("size", units.parse_size, _size_text, "bytes")
DURATION: Final = Kind("duration", _duration, _duration_text, "seconds")
FRACTION: Final = Kind("fraction", units.parse_fraction, lambda value: f"{round(value * 100, 6):g}%")
ADDRESS: Final = Kind("address", check_address, str)
BOOTSTRAP_ENTRY: Final = Kind("address or file", _bootstrap_entry, str)
PEER_ADDRESS: Final = Kind("address", _peer_address, str)
PROCESSORS: Final = Kind("processors", _processors, str, "cores or % of them")

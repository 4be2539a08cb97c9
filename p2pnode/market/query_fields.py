"""The fields by which offers are searched: what each means, its unit, where its value comes from.

`docs/reference/offer-queries.md` shows this table, and a test keeps the two equal. What an offer says of its provider is the
provider's own word; what this node has seen itself, and what monitors say, is marked so.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from p2pnode.discovery.addresses import is_global
from p2pnode.ids import MODEL, NODE, id_range, node_text
from p2pnode.market.listings import Listed
from p2pnode.units import MICRO, parse_duration, parse_fraction, parse_size
from p2pnode.wire.version import PROTOCOL_VERSION

GIGA: Final = 10**9
_MEBI: Final = 1 << 20
UNKNOWN: Final = "unknown"


class Sort(Enum):
    """What a field's values are, and so which operators fit."""

    NUMBER = "number"
    FLAG = "flag"
    TEXT = "text"
    TEXTS = "texts"
    ID = "id"


class Source(Enum):
    """Whose word a value is."""

    OFFER = "offer"
    OWN = "own"
    MONITORS = "monitors"


@dataclass(frozen=True, slots=True)
class Field:
    """One field.

    read: gives a value from a literal as typed, or raises ValueError in words; for ids the range of those that fit.
    get: gives the value from a listing, for fields of an offer. is_part: a text field fits when it contains the literal.
    """

    name: str
    sort: Sort
    source: Source
    unit: str
    meaning: str
    read: Callable[[str], Any]
    get: Callable[[Listed, int], Any] | None = None
    is_part: bool = False


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{text!r} is not a number")
    return value


def _gigabytes(text: str) -> float:
    """Give GB (10^9 bytes): `8` and `8GB` are the same, `8g` and `8GiB` a little more."""
    return _number(text) if re.fullmatch(r"[\d.]+", text) else parse_size(text) / GIGA


def _seconds(text: str) -> float:
    return parse_duration(text)


def _share(text: str) -> float:
    return parse_fraction(text)


def _flag(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise ValueError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def _text(text: str) -> str:
    return text.lower()


def _node_range(text: str) -> tuple[bytes, bytes]:
    return id_range(NODE, text)


def _model_range(text: str) -> tuple[bytes, bytes]:
    low, high = id_range(MODEL, text)
    return low[:8], high[:8]


def _vram_each(listed: Listed, now_ms: int) -> float:
    listing = listed.listing
    return listing.gpu_memory_mib * _MEBI / GIGA / max(1, len(listing.gpus))


def _reach(listed: Listed, now_ms: int) -> str:
    addresses = listed.listing.addresses
    return "none" if not addresses else "public" if any(is_global(address) for address in addresses) else "private"


def _lower(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text.lower() for text in texts)


_OFFER, _OWN = Source.OFFER, Source.OWN
_TABLE: Final = (
    Field("price", Sort.NUMBER, _OFFER, "credits", "price of 10^12 operations of a model's cost, as in provide.price", _number,
          lambda listed, now: listed.listing.price * 1000 / MICRO),
    Field("call_price", Sort.NUMBER, _OFFER, "credits", "fixed price of each call, beside its operations", _number,
          lambda listed, now: listed.listing.call_price / MICRO),
    Field("cores", Sort.NUMBER, _OFFER, "", "processor cores", _number, lambda listed, now: listed.listing.cores),
    Field("memory", Sort.NUMBER, _OFFER, "GB", "main memory", _gigabytes,
          lambda listed, now: listed.listing.memory_mib * _MEBI / GIGA),
    Field("gpus", Sort.NUMBER, _OFFER, "", "number of graphics processors", _number,
          lambda listed, now: len(listed.listing.gpus)),
    Field("gpu", Sort.TEXTS, _OFFER, "", "name of a graphics processor; a part of it fits", _text,
          lambda listed, now: _lower(listed.listing.gpus), is_part=True),
    Field("vram", Sort.NUMBER, _OFFER, "GB", "memory of one graphics processor: that of all, divided by their number", _gigabytes,
          _vram_each),
    Field("vram_total", Sort.NUMBER, _OFFER, "GB", "memory of all graphics processors together", _gigabytes,
          lambda listed, now: listed.listing.gpu_memory_mib * _MEBI / GIGA),
    Field("speed", Sort.NUMBER, _OFFER, "10^9/s", "operations a second, as the provider measured itself", _number,
          lambda listed, now: listed.listing.gigaops),
    Field("sandbox", Sort.TEXT, _OFFER, "", "how the provider confines models: full, gpu, simulated or reduced:…", _text,
          lambda listed, now: listed.listing.sandbox.lower()),
    Field("engine", Sort.TEXTS, _OFFER, "", "execution provider of the model runtime, such as cpu or cuda", _text,
          lambda listed, now: _lower(listed.listing.engines)),
    Field("class", Sort.TEXTS, _OFFER, "", "class of results, such as fast or exact", _text,
          lambda listed, now: _lower(listed.listing.classes)),
    Field("model", Sort.ID, _OFFER, "", "a model the provider holds, by the start of its id; up to 16 are listed", _model_range,
          lambda listed, now: listed.listing.models),
    Field("models", Sort.NUMBER, _OFFER, "", "number of models the provider holds", _number,
          lambda listed, now: listed.listing.model_count),
    Field("region", Sort.TEXTS, _OFFER, "", "a label of where the provider is", _text,
          lambda listed, now: _lower(listed.listing.region)),
    Field("provider", Sort.ID, _OFFER, "", "the provider, by the start of its node id", _node_range,
          lambda listed, now: (listed.provider,)),
    Field("reach", Sort.TEXT, _OFFER, "", "where its addresses can be dialled from: public, private or none", _text, _reach),
    Field("version", Sort.NUMBER, _OFFER, "", "protocol version", _number, lambda listed, now: listed.listing.version),
    Field("compatible", Sort.FLAG, _OFFER, "", "whether this node speaks that version", _flag,
          lambda listed, now: abs(listed.listing.version - PROTOCOL_VERSION) <= 1),
    Field("expires", Sort.NUMBER, _OFFER, "s", "how long the offer stands unless it is renewed", _seconds,
          lambda listed, now: (listed.listing.expires_ms - now) / 1000),
    Field("reliability", Sort.NUMBER, _OWN, "", "share of our own calls that were answered; unknown before the first", _share),
    Field("latency", Sort.NUMBER, _OWN, "s", "median time of our own calls; unknown before the first", _seconds),
    Field("calls", Sort.NUMBER, _OWN, "", "calls this node has made there, recent ones weighing more", _number),
    Field("rating", Sort.NUMBER, _OWN, "", "our score of the peer's conduct, -100 to 100; unknown for strangers", _number),
    Field("new", Sort.FLAG, _OWN, "", "whether this node never made a call there", _flag),
    Field("linked", Sort.FLAG, _OWN, "", "whether a link to the provider stands", _flag),
    Field("banned", Sort.FLAG, _OWN, "", "whether this node keeps away from the peer for a while", _flag),
    Field("suspected", Sort.FLAG, Source.MONITORS, "", "whether its monitors could not reach it: it is likely gone", _flag),
)  # fmt: skip
FIELDS: Final[dict[str, Field]] = {field.name: field for field in _TABLE}

# What an own field is while nothing is known of a peer; the others are unknown then.
STRANGER: Final[Mapping[str, Any]] = {"calls": 0, "new": True, "linked": False, "banned": False, "suspected": False}
# Where a bare word is looked for.
SEARCHED: Final = ("gpu", "engine", "region", "class", "sandbox")


def shown(name: str, value: Any) -> Any:
    """Give a field's value as plain JSON holds it and people read it."""
    if name == "provider":
        return node_text(value[0])
    if isinstance(value, tuple):
        return [item.hex() if isinstance(item, bytes) else item for item in value]
    return round(value, 6) if isinstance(value, float) else value

"""Money, sizes, durations and fractions: integers inside, human units at the edges.

Money is an integer number of micro-credits; one credit is 10^6 of them. Nothing in p2pnode computes money in floats.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import NewType

MicroCredits = NewType("MicroCredits", int)
MICRO = 1_000_000

_SIZE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_credits(text: str) -> MicroCredits:
    """Give micro-credits for decimal credits such as `0.25`. Raises ValueError beyond six decimals or below zero."""
    try:
        micro = Decimal(text.strip()) * MICRO
    except InvalidOperation:
        raise ValueError(f"{text!r} is not an amount of credits, such as 0.25") from None
    if not micro.is_finite() or micro < 0 or micro != micro.to_integral_value():
        raise ValueError(f"{text!r} must be at least 0 and have at most six decimals")
    return MicroCredits(int(micro))


def format_credits(amount: int) -> str:
    """Give decimal credits without trailing zeros: 250000 -> '0.25'."""
    sign, amount = ("-" if amount < 0 else ""), abs(amount)
    whole, fraction = divmod(amount, MICRO)
    decimals = f"{fraction:06d}".rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def parse_size(text: str) -> int:
    """Give bytes for `512`, `1.5GiB`, `200MB` or `64k` (k, m, g, t are powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(f"{text!r} is not a size, such as 512MB or 1.5GiB")
    return int(Decimal(match[1]) * _SIZE_UNITS[match[2].lower()])


def format_size(size_bytes: int) -> str:
    """Give a size in binary units with three digits: 1536 -> '1.5 KiB'."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def parse_duration(text: str) -> float:
    """Give seconds for `90`, `90s`, `1h30m`, `2min` or `250ms`."""
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]*)", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise ValueError(f"{text!r} is not a duration, such as 90s or 1h30m")
    if any(unit not in _TIME_UNITS for _, unit in parts):
        raise ValueError(f"{text!r} has an unknown unit; use ms, s, m, h or d")
    return sum(float(number) * _TIME_UNITS[unit] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """Give a duration with its two largest units: 5400 -> '1h 30m', 0.25 -> '250ms'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    rest, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def parse_fraction(text: str) -> float:
    """Give a fraction in [0, 1] for `10%` or `0.1`."""
    stripped = text.strip()
    try:
        value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
    except ValueError:
        raise ValueError(f"{text!r} is not a fraction, such as 10% or 0.1") from None
    if not 0 <= value <= 1:
        raise ValueError(f"{text!r} must lie between 0 and 100%")
    return value

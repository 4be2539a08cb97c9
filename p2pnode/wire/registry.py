"""Message numbers: each message class has one, listed once, never reused.

Blocks of numbers: 1-19 session, 20-39 discovery, 40-79 market, 80-119 work, 120-159 verification, 160-199 training.
"""

from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

Message = msgspec.Struct
MessageType = TypeVar("MessageType", bound=type[msgspec.Struct])

_BY_NUMBER: Final[dict[int, type[Message]]] = {}
_NUMBERS: Final[dict[type[Message], int]] = {}


def message(number: int) -> Callable[[MessageType], MessageType]:
    """Register a message class under its number. Refuses a repeat at import."""

    def register(cls: MessageType) -> MessageType:
        if number in _BY_NUMBER:
            raise RuntimeError(f"message number {number} belongs to {_BY_NUMBER[number].__name__}")
        _BY_NUMBER[number] = cls
        _NUMBERS[cls] = number
        return cls

    return register


def number_of(cls: type[Message]) -> int:
    """Give a message class's number."""
    return _NUMBERS[cls]


def class_of(number: int) -> type[Message] | None:
    """Give the class behind a number, or None for an unknown message."""
    return _BY_NUMBER.get(number)


def registered() -> dict[int, type[Message]]:
    """Give every known number and class, in order of number."""
    return dict(sorted(_BY_NUMBER.items()))

"""What happened in a simulated world, one line per event, and the digest that tells two runs apart.

    0.010000 d n2 n1 connected          a line: virtual seconds, kind, who, whom, what

The same seed and options give the same lines in every process. A replay is the same run again with the lines of an earlier one
beside it: the first line that differs is where something that should not depends on the machine.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

LEGEND: Final[dict[str, str]] = {
    "+": "a node starts",
    "-": "a node stops in order",
    "x": "a node's machine crashes (what: reset or silent)",
    "d": "a connection attempt ends (what: connected, refused, dropped)",
    "q": "a request arrives (what: message, request number)",
    "r": "a reply arrives",
    "n": "a refusal arrives",
    "l": "a request or reply is lost",
    "f": "a fault begins or ends (what: which)",
    "s": "the scenario says something",
}
_EVENTS: Final = frozenset("+-xfs")
_BATCH: Final = 512


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a replay left the recorded run. line: its number, from 1; expected or found is empty at an early end."""

    line: int
    expected: str
    found: str


class Trace:
    """Takes a world's events; made before the world and read after it.

    level: `messages` (everything), `events` (no messages and dials, for long runs) or `off`. file: lines are written there.
    keep: so many of the last lines stay in memory. recorded: the lines of an earlier run, to be compared.
    """

    def __init__(
        self, level: str = "messages", *, file: Path | None = None, keep: int = 0, recorded: Iterable[str] | None = None
    ) -> None:
        self.level = level
        self.has_messages = level == "messages"
        self.count = 0
        self.divergence: Divergence | None = None
        self.last: deque[str] = deque(maxlen=keep)
        self._is_off = level == "off"
        self._hash = hashlib.blake2b(digest_size=16)
        self._batch: list[str] = []
        self._recorded: Iterator[str] | None = None if recorded is None else iter(recorded)
        self._file: TextIO | None = None if file is None else file.open("w", encoding="utf-8")

    def head(self, lines: Iterable[str]) -> None:
        """Write comment lines: the legend and the run's options. They are no events and count in no digest."""
        if self._file is not None:
            legend = [f"{kind} {meaning}" for kind, meaning in LEGEND.items()]
            self._file.writelines(f"# {line}\n" for line in (*lines, "time kind who whom what", *legend))

    def add(self, now: float, kind: str, who: str, whom: str = "-", what: str = "-") -> None:
        """Enter one event. kind: one of the LEGEND."""
        if self._is_off or not (self.has_messages or kind in _EVENTS):
            return
        self._batch.append(f"{now:.6f} {kind} {who} {whom} {what}")
        if len(self._batch) >= _BATCH:
            self._flush()

    def digest(self) -> str:
        """Give the digest over all lines so far, 32 hexadecimal characters."""
        self._flush()
        return self._hash.copy().hexdigest()

    def close(self) -> None:
        """Write the digest as the last line and close the file; a replay that ends early is a divergence too."""
        digest = self.digest()
        if self._recorded is not None and self.divergence is None:
            expected = next(self._recorded, "")
            if expected:
                self.divergence = Divergence(self.count + 1, expected, "")
        if self._file is not None:
            self._file.write(f"# digest {digest} of {self.count} lines\n")
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if not batch:
            return
        text = "\n".join(batch) + "\n"
        self._hash.update(text.encode())
        if self._file is not None:
            self._file.write(text)
        if self.last.maxlen:
            self.last.extend(batch)
        if self._recorded is not None and self.divergence is None:
            for offset, line in enumerate(batch, self.count + 1):
                expected = next(self._recorded, "")
                if expected != line:
                    self.divergence = Divergence(offset, expected, line)
                    break
        self.count += len(batch)


def recorded_lines(path: Path) -> Iterator[str]:
    """Give the events of a trace file, without its comments. Raises OSError."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                yield line.rstrip("\n")

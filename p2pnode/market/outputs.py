"""Outputs of executed calls, kept until the cheque, so that a client that lost an answer fetches it instead of paying twice.

Bounded in bytes: the oldest make room. An output that is gone is not lost to the client: the same call sent again is
executed again without charge.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from p2pnode.wire.messages.work import ValueHeader


@dataclass(frozen=True, slots=True)
class KeptOutput:
    """One output. work_us: time in the worker."""

    headers: tuple[ValueHeader, ...]
    payload: bytes
    work_us: int
    engine: str


class KeptOutputs:
    """All kept outputs of a provider, by (agreement, call number)."""

    def __init__(self, bytes_max: int, output_bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._output_bytes_max = output_bytes_max
        self._outputs: OrderedDict[tuple[bytes, int], KeptOutput] = OrderedDict()
        self.size_bytes = 0

    def keep(
        self, agreement: bytes, number: int, headers: tuple[ValueHeader, ...], payload: memoryview, work_us: int, engine: str
    ) -> bool:
        """Copy an output; False when it is larger than one output may be."""
        size = len(payload)
        if size > self._output_bytes_max or size > self._bytes_max:
            return False
        self.drop(agreement, (number,))
        while self.size_bytes + size > self._bytes_max:
            _, oldest = self._outputs.popitem(last=False)
            self.size_bytes -= len(oldest.payload)
        self._outputs[agreement, number] = KeptOutput(headers, bytes(payload), work_us, engine)
        self.size_bytes += size
        return True

    def get(self, agreement: bytes, number: int) -> KeptOutput | None:
        """Give an output that is still kept."""
        return self._outputs.get((agreement, number))

    def drop(self, agreement: bytes, numbers: Iterable[int]) -> None:
        """Forget outputs."""
        for number in numbers:
            kept = self._outputs.pop((agreement, number), None)
            if kept is not None:
                self.size_bytes -= len(kept.payload)

    def drop_agreement(self, agreement: bytes) -> None:
        """Forget every output of an agreement."""
        self.drop(agreement, [number for key, number in self._outputs if key == agreement])

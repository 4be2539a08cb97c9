"""What a client gets for a call, and the handle of a call that is under way."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import msgspec

from p2pnode.environment import Buffer
from p2pnode.errors import P2PNodeError, ProtocolViolation
from p2pnode.reasons import Reason
from p2pnode.wire.messages.work import Call, CallResult, FetchResult, ValueHeader
from p2pnode.wire.tensors import Value, values_hash

if TYPE_CHECKING:
    from p2pnode.market.buying import ClientAgreement


class CallAnswer(msgspec.Struct, frozen=True):
    """One call's outcome. amount: micro-credits; seconds: in the provider's worker; provider: node id.

    payload: the outputs' bytes with `headers`, when the caller prefers them to `outputs`. The receipt that covers the call
    comes later: `ClientAgreement.receipt(number)`.
    """

    outputs: Mapping[str, Value]
    amount: int
    provider: bytes
    seconds: float
    agreement: bytes
    number: int
    input_hash: bytes
    output_hash: bytes
    engine: str
    headers: Sequence[ValueHeader]
    payload: memoryview


OnAnswer = Callable[["CallAnswer | P2PNodeError"], None]


class OutgoingCall:
    """A call under way; `cancel` gives it up. deadline: on the node's clock, when `on_answer` is told TooSlow."""

    __slots__ = ("_agreement", "amount", "chunks", "deadline", "is_over", "link", "message", "on_answer", "request")

    def __init__(
        self,
        agreement: "ClientAgreement",
        message: Call | FetchResult,
        chunks: Sequence[Buffer],
        amount: int,
        on_answer: OnAnswer,
        deadline: float = inf,
    ) -> None:
        self._agreement = agreement
        self.deadline = deadline
        self.message = message
        self.chunks = chunks
        self.amount = amount
        self.on_answer = on_answer
        self.link: Any = None
        self.request = -1
        self.is_over = False

    @property
    def number(self) -> int:
        """The call's number within its agreement."""
        return self.message.number

    def poll(self) -> None:
        """Wait a moment for an answer that comes at once, in which nothing else runs; see `transport.link.Link.poll`."""
        if self.link is not None:
            self.link.poll()

    def cancel(self) -> None:
        """Give the call up: `on_answer` will not run. If the provider has executed it by then, it is paid all the same."""
        self._agreement.cancel(self)


def open_result(reply: Any) -> tuple[CallResult, memoryview]:
    """Give a reply's result and the bytes of its outputs. Raises ProtocolViolation when they are not what is to be receipted."""
    result, payload = reply.message, reply.attachment
    if type(result) is not CallResult:
        raise ProtocolViolation(Reason.WRONG_TYPE, "a call is answered with its result")
    if values_hash(result.outputs, payload) != result.output_hash:
        raise ProtocolViolation(Reason.WRONG_HASH, "the outputs do not have the hash that is to be receipted")
    return result, payload

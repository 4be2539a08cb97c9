"""What both sides' agreement machines share: the frozen terms, the events they take and the effects they give.

The machines are `sold_agreement.SoldAgreement` (provider) and `bought_agreement.BoughtAgreement` (client). Neither signs
nor touches a disk: an effect names the unsigned document, and the service seals it, saves it and only then sends it.
Times are seconds on the node's clock for deadlines and Unix milliseconds inside documents.
"""

from dataclasses import dataclass
from enum import Enum

import msgspec

from p2pnode.reasons import EndReason
from p2pnode.wire.messages.market import AgreementState, Cheque, Leaf, Order, Quote, Receipt


@dataclass(frozen=True, slots=True)
class Terms:
    """What an agreement froze. agreement_id: document hash of the order. provider, client: node ids; keys: Ed25519.

    amount_max may be lower than the order's where the provider's trust in the client ends sooner.
    """

    agreement_id: bytes
    provider: bytes
    client: bytes
    provider_key: bytes
    client_key: bytes
    order: Order
    quote: Quote
    agreed_ms: int
    amount_max: int


class Phase(Enum):
    """Open: calls flow. Closing: the last receipts and cheques. Ended: nothing more happens."""

    OPEN = "open"
    CLOSING = "closing"
    ENDED = "ended"


class Now(msgspec.Struct, frozen=True):
    """The present: monotonic seconds for deadlines, Unix milliseconds for documents."""

    seconds: float
    wall_ms: int


# Events.


@dataclass(frozen=True, slots=True)
class LinkUp:
    """There is a connection to the other side (again)."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection is gone."""


@dataclass(frozen=True, slots=True)
class EndAsked:
    """This agreement should end: by the client's wish, or because this node stops."""

    reason: EndReason


@dataclass(frozen=True, slots=True)
class ChequeArrived:
    """To the provider: a cheque whose signature was verified."""

    cheque: Cheque


@dataclass(frozen=True, slots=True)
class ReceiptRefused:
    """To the provider: the client will not pay for what a receipt says."""


@dataclass(frozen=True, slots=True)
class ReceiptArrived:
    """To the client: a receipt whose signature was verified. document: its hash."""

    receipt: Receipt
    document: bytes


@dataclass(frozen=True, slots=True)
class LeavesArrived:
    """To the client: what the provider says stands behind a receipt."""

    slice: int
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class StateArrived:
    """To the client: the provider's answer to a resumption."""

    state: AgreementState


@dataclass(frozen=True, slots=True)
class CallsWithdrawn:
    """To the client: the provider has answered a withdrawal of `numbers`: it charges nothing for any but the charged ones.

    freed: those that it has executed; they keep their places.
    """

    numbers: tuple[int, ...]
    freed: frozenset[int]
    charged: frozenset[int]


@dataclass(frozen=True, slots=True)
class EndConfirmed:
    """To the client: the provider has the last cheque, or nothing was owed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: the deadline was reached, or a call changed what is due."""


Event = (
    LinkUp | LinkDown | EndAsked | ChequeArrived | ReceiptRefused | ReceiptArrived | LeavesArrived | StateArrived
    | CallsWithdrawn | EndConfirmed | Tick
)  # fmt: skip

# Effects, to be performed in order; a Save completes before the Send after it.


@dataclass(frozen=True, slots=True)
class SaveReceipt:
    """Sign (provider) and store a receipt with its leaves. document: its hash."""

    receipt: Receipt
    document: bytes
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """Deliver a saved receipt."""

    slice: int


@dataclass(frozen=True, slots=True)
class ReplaceReceipts:
    """Sign and store receipts anew that have no cheque, each with its hash and leaves: what they charge has shrunk.

    amount: what is written off, also where no receipt charged it yet, micro-credits.
    """

    receipts: tuple[SaveReceipt, ...]
    amount: int


@dataclass(frozen=True, slots=True)
class AnswerWithdrawal:
    """Provider: answer the client's withdrawal, now that what comes of it is saved."""

    freed: tuple[int, ...]
    charged: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SaveCheque:
    """Sign (client) and store a cheque. amount: what it adds to the cheques before it, in micro-credits."""

    cheque: Cheque
    amount: int


@dataclass(frozen=True, slots=True)
class SendCheque:
    """Deliver the last saved cheque as the answer to this slice's receipt."""

    slice: int


@dataclass(frozen=True, slots=True)
class AskLeaves:
    """Ask the provider what stands behind a slice's receipt."""

    slice: int


@dataclass(frozen=True, slots=True)
class FetchOutputs:
    """Ask for answers that the receipt names and this client does not hold: (number, input hash) each."""

    calls: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Provider: these calls are paid, their kept outputs may go. Client: these calls are lost without charge, run them again."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RefuseReceipt:
    """Answer a slice's receipt with a refusal: it does not cover this client's own calls."""

    slice: int
    detail: str


@dataclass(frozen=True, slots=True)
class SendEnd:
    """Client: ask the provider for the last receipt and the end."""

    reason: EndReason


@dataclass(frozen=True, slots=True)
class Finished:
    """The agreement has ended. unpaid: micro-credits of signed receipts without a cheque."""

    reason: EndReason
    unpaid: int


Effect = (
    SaveReceipt | SendReceipt | ReplaceReceipts | AnswerWithdrawal | SaveCheque | SendCheque | AskLeaves | FetchOutputs | Forget
    | RefuseReceipt | SendEnd | Finished
)  # fmt: skip

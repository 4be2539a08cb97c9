"""The one closed list of reasons: why something was refused, and how something ended.

A `Reason` travels on the wire as its text, is counted per side (`refusals_total{reason}`) and is what `p2pnode why` and
`p2pnode job why` print. Texts are never reused for another meaning; new ones are only appended to their group.
"""

from enum import Enum


class Reason(str, Enum):
    """Why a message, a session, a model or a piece of work was refused."""

    # The bytes are wrong (wire).
    TRUNCATED = "truncated"
    TRAILING_BYTES = "trailing-bytes"
    TOO_LARGE = "too-large"
    TOO_DEEP = "too-deep"
    TOO_MANY_ITEMS = "too-many-items"
    EXTENSION_TYPE = "extension-type"
    DUPLICATE_KEY = "duplicate-key"
    NOT_MINIMAL = "not-minimal"
    BAD_UTF8 = "bad-utf8"
    BAD_KEY = "bad-key"
    RESERVED_BYTE = "reserved-byte"
    WRONG_TYPE = "wrong-type"
    UNKNOWN_MESSAGE = "unknown-message"
    BAD_TENSOR = "bad-tensor"
    # Who says it is wrong (crypto).
    BAD_SIGNATURE = "bad-signature"
    WRONG_SIGNER = "wrong-signer"
    WRONG_NETWORK = "wrong-network"
    WRONG_VERSION = "wrong-version"
    WRONG_PEER = "wrong-peer"
    SELF_DIAL = "self-dial"
    BAD_HANDSHAKE = "bad-handshake"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    REPLAYED = "replayed"
    # The session's limits (transport).
    BAD_FRAME = "bad-frame"
    FLOW_CONTROL = "flow-control"
    TOO_MANY_REQUESTS = "too-many-requests"
    TOO_MANY_STREAMS = "too-many-streams"
    TOO_MANY_CONNECTIONS = "too-many-connections"
    RATE = "rate"
    TOO_SLOW = "too-slow"
    IDLE = "idle"
    CONNECTION_LOST = "connection-lost"
    DEADLINE = "deadline"
    SHUTTING_DOWN = "shutting-down"
    DUPLICATE_SESSION = "duplicate-session"
    DUPLICATE_IDENTITY = "duplicate-identity"
    BANNED = "banned"
    # The model (work).
    NOT_ONNX = "not-onnx"
    BAD_MODEL = "bad-model"
    MODEL_TOO_LARGE = "model-too-large"
    OPSET = "opset"
    CUSTOM_OPERATOR = "custom-operator"
    EXTERNAL_DATA = "external-data"
    RANDOM_OPERATOR = "random-operator"
    INITIALIZER_SHAPE = "initializer-shape"
    UNKNOWN_MODEL = "unknown-model"
    WRONG_HASH = "wrong-hash"
    # The input and the run (work).
    MISSING_INPUT = "missing-input"
    UNKNOWN_INPUT = "unknown-input"
    UNKNOWN_OUTPUT = "unknown-output"
    WRONG_SHAPE = "wrong-shape"
    WRONG_DTYPE = "wrong-dtype"
    MEMORY = "memory"
    TIME_LIMIT = "time-limit"
    OUTPUT_TOO_LARGE = "output-too-large"
    RUN_FAILED = "run-failed"
    WORKER_DIED = "worker-died"
    CANCELLED = "cancelled"
    # The owner (admission).
    BUSY = "busy"
    PAUSED = "paused"
    DRAINING = "draining"
    DENIED = "denied"
    MODEL_DENIED = "model-denied"
    DISK = "disk"
    BANDWIDTH = "bandwidth"
    SANDBOX_LEVEL = "sandbox-level"
    NOT_SELLING = "not-selling"
    # The market.
    PRICE = "price"
    CREDIT = "credit"
    CLASS = "class"
    SHAPE_OVER_QUOTE = "shape-over-quote"
    UNKNOWN_QUOTE = "unknown-quote"
    UNKNOWN_AGREEMENT = "unknown-agreement"
    AGREEMENT_ENDED = "agreement-ended"
    ALREADY_USED = "already-used"
    CALL_MISMATCH = "call-mismatch"
    RECEIPT_MISMATCH = "receipt-mismatch"
    CHEQUE_MISMATCH = "cheque-mismatch"
    UNPAID = "unpaid"
    BUDGET = "budget"
    UNKNOWN_CALL = "unknown-call"
    OUTPUT_GONE = "output-gone"
    # Records (discovery).
    LIFETIME = "lifetime"
    STALE = "stale"
    TWO_VERSIONS = "two-versions"
    CONDITION = "condition"
    STORE_FULL = "store-full"
    # Our own fault; carries no detail to the peer.
    INTERNAL = "internal"


class EndReason(str, Enum):
    """How a job, an agreement or a call ended: exactly one, the same on both sides."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    BUDGET = "budget"
    REFUSED = "refused"
    FAILED = "failed"
    UNPAID = "unpaid"
    PEER_LOST = "peer-lost"
    PROVIDER_STOPPED = "provider-stopped"
    CLIENT_STOPPED = "client-stopped"
    MISMATCH = "mismatch"


MEANINGS: dict[Reason | EndReason, str] = {
    Reason.TRUNCATED: "the bytes end before the message does",
    Reason.TRAILING_BYTES: "bytes follow after the message",
    Reason.TOO_LARGE: "larger than its limit",
    Reason.TOO_DEEP: "nested more deeply than its limit",
    Reason.TOO_MANY_ITEMS: "more items than its limit",
    Reason.EXTENSION_TYPE: "a msgpack extension or timestamp, which p2pnode never uses",
    Reason.DUPLICATE_KEY: "a map names a key twice",
    Reason.NOT_MINIMAL: "a number or length is not in its shortest form",
    Reason.BAD_UTF8: "text that is not UTF-8",
    Reason.BAD_KEY: "a map key that is not text",
    Reason.RESERVED_BYTE: "the one byte that msgpack reserves",
    Reason.WRONG_TYPE: "a field is missing, of another type, or out of its range",
    Reason.UNKNOWN_MESSAGE: "a message number this node does not know",
    Reason.BAD_TENSOR: "a tensor whose header and bytes do not agree",
    Reason.BAD_SIGNATURE: "the signature does not fit the bytes",
    Reason.WRONG_SIGNER: "signed by somebody else than the document says",
    Reason.WRONG_NETWORK: "made for another network",
    Reason.WRONG_VERSION: "a protocol version this node cannot speak",
    Reason.WRONG_PEER: "the node at this address is not the one that was dialled",
    Reason.SELF_DIAL: "the address leads back to this node itself",
    Reason.BAD_HANDSHAKE: "the handshake failed",
    Reason.EXPIRED: "its time is over",
    Reason.NOT_YET_VALID: "its time has not come: check the clocks",
    Reason.REPLAYED: "seen before",
    Reason.BAD_FRAME: "a frame that the session cannot have at this point",
    Reason.FLOW_CONTROL: "more bytes than the window allows",
    Reason.TOO_MANY_REQUESTS: "too many requests at once from this peer",
    Reason.TOO_MANY_STREAMS: "too many streams at once from this peer",
    Reason.TOO_MANY_CONNECTIONS: "too many connections, in all or from this address",
    Reason.RATE: "faster than the rate limit",
    Reason.TOO_SLOW: "slower than the least rate",
    Reason.CONNECTION_LOST: "the connection broke without a goodbye",
    Reason.IDLE: "nothing happened for the idle time",
    Reason.DEADLINE: "its deadline passed",
    Reason.SHUTTING_DOWN: "the node is stopping",
    Reason.DUPLICATE_SESSION: "another session between the same two nodes lives on",
    Reason.DUPLICATE_IDENTITY: "two daemons run on one identity",
    Reason.BANNED: "this peer misbehaved and is kept out for a while",
    Reason.NOT_ONNX: "not an ONNX model",
    Reason.BAD_MODEL: "the ONNX checker refuses the model",
    Reason.MODEL_TOO_LARGE: "the model is larger than this node accepts",
    Reason.OPSET: "an opset this node's runtime does not know",
    Reason.CUSTOM_OPERATOR: "an operator from a library, which is never loaded",
    Reason.EXTERNAL_DATA: "external data outside the model's own files",
    Reason.RANDOM_OPERATOR: "a random operator where the order asks for verifiable results",
    Reason.INITIALIZER_SHAPE: "an initialiser's shape and bytes do not agree",
    Reason.UNKNOWN_MODEL: "a model that is not here",
    Reason.WRONG_HASH: "bytes that do not have the promised hash",
    Reason.MISSING_INPUT: "a required input is missing",
    Reason.UNKNOWN_INPUT: "an input that the model does not have",
    Reason.UNKNOWN_OUTPUT: "an output that the model does not have",
    Reason.WRONG_SHAPE: "an input of the wrong shape",
    Reason.WRONG_DTYPE: "an input of the wrong type",
    Reason.MEMORY: "more memory than the limit",
    Reason.TIME_LIMIT: "longer than the time limit",
    Reason.OUTPUT_TOO_LARGE: "an output larger than the limit",
    Reason.RUN_FAILED: "the model failed on this input",
    Reason.WORKER_DIED: "the worker process ended",
    Reason.CANCELLED: "cancelled",
    Reason.BUSY: "the queue is full",
    Reason.PAUSED: "the owner paused the node",
    Reason.DRAINING: "the node finishes its work and takes no more",
    Reason.DENIED: "the owner does not serve this client",
    Reason.MODEL_DENIED: "the owner does not run this model",
    Reason.DISK: "the disk cap is reached",
    Reason.BANDWIDTH: "the bandwidth cap is reached",
    Reason.SANDBOX_LEVEL: "the sandbox is weaker than the owner demands",
    Reason.NOT_SELLING: "this node sells nothing",
    Reason.PRICE: "the price is not acceptable",
    Reason.CREDIT: "more unpaid work than the credit allows",
    Reason.CLASS: "a numeric class this node does not offer",
    Reason.SHAPE_OVER_QUOTE: "an input larger than the quote covers",
    Reason.UNKNOWN_QUOTE: "a quote this node did not give",
    Reason.UNKNOWN_AGREEMENT: "an agreement this node does not have",
    Reason.AGREEMENT_ENDED: "the agreement has ended",
    Reason.ALREADY_USED: "the quote was used before",
    Reason.CALL_MISMATCH: "the same call number with another input",
    Reason.RECEIPT_MISMATCH: "the receipt does not cover what was computed",
    Reason.CHEQUE_MISMATCH: "the cheque does not cover the receipt",
    Reason.UNPAID: "a receipt was not paid in time",
    Reason.BUDGET: "the budget is spent",
    Reason.UNKNOWN_CALL: "a call that was never executed: it costs nothing",
    Reason.OUTPUT_GONE: "an answer that is no longer kept: sent again, the call runs again without charge",
    Reason.LIFETIME: "it asks to be kept for longer than is allowed",
    Reason.STALE: "a newer version is known",
    Reason.TWO_VERSIONS: "two different documents with one sequence: their signer is at fault",
    Reason.CONDITION: "the version it is to replace is not the present one",
    Reason.STORE_FULL: "as much as this node holds, in all or for one publisher or network",
    Reason.INTERNAL: "the node's own fault",
    EndReason.COMPLETED: "everything was done",
    EndReason.CANCELLED: "the client cancelled it",
    EndReason.EXPIRED: "its time was over",
    EndReason.BUDGET: "the budget was spent",
    EndReason.REFUSED: "nobody accepted it",
    EndReason.FAILED: "the model or its input failed",
    EndReason.UNPAID: "a receipt was not paid in time",
    EndReason.PEER_LOST: "the other side could not be reached any more",
    EndReason.PROVIDER_STOPPED: "the provider stopped",
    EndReason.CLIENT_STOPPED: "the client stopped",
    EndReason.MISMATCH: "the two sides' figures differ",
}

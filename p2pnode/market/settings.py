"""What the owner may set about buying and selling. Every value has a unit in its name and a reason in its comment."""

from dataclasses import dataclass
from typing import Final

# Classes of results: "fast" promises nothing beyond the model; "exact" promises bits that an auditor can reproduce.
FAST_CLASS: Final = "fast"
EXACT_CLASS: Final = "exact"


@dataclass(frozen=True, slots=True)
class MarketSettings:
    """The market's settings. Money is in micro-credits; a changed price touches new quotes only.

    The one number a volunteer has to choose is `operations_price`: micro-credits per 10^9 operations of the graph-cost
    model. `call_price` may be added for the fixed cost of answering at all.
    """

    selling: bool = True
    operations_price: int = 1_000
    call_price: int = 0
    region: tuple[str, ...] = ()
    numeric_classes: tuple[str, ...] = (FAST_CLASS,)
    # An offer lives for twice the time after which it is signed again, so that one lost publication does no harm.
    offer_seconds: float = 1800.0
    quote_seconds: float = 60.0
    quotes_open_max: int = 1024
    offers_known_max: int = 10_000
    # What one order may ask for, whoever asks.
    agreement_seconds_max: float = 86_400.0
    agreements_open_max: int = 256
    agreements_per_peer_max: int = 16
    chain_length_max: int = 65_536
    input_bytes_max: int = 256 << 20
    output_bytes_max: int = 256 << 20
    model_bytes_max: int = 2 << 30
    call_seconds_max: float = 120.0
    # The most a stranger can run up without a cheque: one slice of this amount. It bounds the loss per new identity.
    stranger_slice_amount: int = 1_000_000
    # Every settled micro-credit of two-way volume raises a peer's slice by this many millionths of itself.
    credit_growth_ppm: int = 50_000
    credit_slice_amount_max: int = 1_000_000_000
    credit_half_life_seconds: float = 30 * 86_400.0
    # The most one peer may owe us in cheques that are not settled by work or by hand.
    debt_amount_max: int = 10_000_000_000
    # As a client: how an order divides what it buys. The receipt comes at half of any of the three.
    slice_calls: int = 512
    slice_seconds: float = 20.0
    chain_length: int = 4096
    # How long a side waits for the other's next signature while the connection stands, and how long without one.
    cheque_seconds: float = 30.0
    away_seconds: float = 3_600.0
    reconnect_seconds_max: float = 30.0
    # Outputs are kept until the cheque. One larger than `kept_output_bytes_max` is executed again on request instead:
    # copying it out of the worker's memory would cost more than most models do.
    kept_output_bytes_max: int = 4 << 20
    kept_bytes_max: int = 256 << 20
    reruns_max: int = 3
    # What a client pays for after its own crash when it no longer remembers the calls: at most one slice.
    pays_forgotten_calls: bool = True
    # Model transfer: requests in flight, bytes of each, and how many transfers at once.
    fetch_requests: int = 4
    fetch_bytes: int = 4 << 20
    fetches_max: int = 4
    public_models: frozenset[bytes] = frozenset()

"""The numbers of the client's side, each with the limit it sets and why it has that size."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobSettings:
    """How patiently, how widely and how boldly this node buys.

    *_seconds are durations in seconds. Deadlines per state: match (find and quote; lonely
    while nobody is connected and this node may run the work itself), transfer (the model to the provider),
    start (order and first answer), run (one call), return (outputs on the way back; added to run for the whole exchange).
    """

    match_seconds: float = 15.0
    lonely_seconds: float = 3.0
    transfer_seconds: float = 600.0
    start_seconds: float = 120.0
    run_seconds: float = 120.0
    return_seconds: float = 60.0
    close_seconds: float = 10.0
    # How long a session waits for a provider whose link broke under a call before it asks somebody else: what was executed
    # is then fetched instead of being paid twice. A link that merely broke is back within one.
    back_seconds: float = 3.0

    attempts_max: int = 6
    backoff_first_seconds: float = 0.1
    backoff_max_seconds: float = 20.0
    backoff_jitter: float = 0.5
    retry_total_seconds: float = 180.0

    # Petals bans for 15 s after a fault; a fault here may be a crash and restart, so it doubles from there. A fault that the
    # model may have caused (its worker died, its time was over) bans the provider for that model alone, and is worth a second
    # try soon: it may be the only provider there is.
    ban_fault_seconds: float = 15.0
    ban_model_seconds: float = 1.0
    ban_refused_seconds: float = 5.0
    ban_unreachable_seconds: float = 5.0
    ban_seconds_max: float = 3600.0
    bans_kept_max: int = 4096

    # A second copy at median + k x MAD of this model's own latencies; k = 6 is about four standard deviations.
    hedging: bool = True
    hedge_deviations: float = 6.0
    hedge_samples_min: int = 8
    hedge_samples_max: int = 128
    hedge_seconds_min: float = 0.2

    providers_max: int = 8
    quotes_max: int = 8
    in_flight_per_provider: int = 4
    rows_per_item: int = 64
    items_max: int = 10_000_000

    # What terms that do not say otherwise get. Amounts in micro-credits; providers_deny: node ids.
    price_max: int | None = None
    local_fallback: bool = False
    share_worker: bool = False
    providers_deny: frozenset[bytes] = frozenset()

    # The weight of time against money when quotes are compared: 1.0 counts twice the price like twice the time.
    latency_weight: float = 0.5
    agreement_seconds: float = 3600.0
    agreement_amount_max: int = 10_000_000
    slice_calls: int = 512
    slice_seconds: float = 30.0

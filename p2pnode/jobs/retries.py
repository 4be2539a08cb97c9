"""Trying again with memory: deadlines per state, exponential back-off with jitter and a total cap, bans per peer and cause.

Two pure machines. `BanBook` remembers who is not to be asked for a while, for which model and why; `Attempts` follows one piece
of work from state to state and says, after each failure, whether and when to try again. Source of the shape: Petals' ban and
back-off defaults; what its users lacked was the difference between a provider's fault, a refusal and a bad input.
"""

from dataclasses import dataclass
from enum import Enum

from p2pnode.errors import PeerError, ProtocolViolation, Refused, TooSlow, Unreachable, WorkError
from p2pnode.jobs.back_pressure import is_back_pressure
from p2pnode.jobs.settings import JobSettings
from p2pnode.reasons import EndReason, Reason


def backoff_seconds(settings: JobSettings, failures: int, jitter: float) -> float:
    """Give how long to wait after so many failures in a row. jitter: a random number in [0, 1)."""
    raw = min(settings.backoff_first_seconds * 2.0 ** min(failures - 1, 20), settings.backoff_max_seconds)
    return raw * (1.0 - settings.backoff_jitter + 2.0 * settings.backoff_jitter * jitter)


class State(Enum):
    """Where a piece of work stands."""

    MATCH = "match"
    TRANSFER = "transfer"
    START = "start"
    RUN = "run"
    RETURN = "return"


class Cause(Enum):
    """Whose fault a failure is; it decides what is tried next."""

    PROVIDER = "provider"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    INPUT = "input"
    OURS = "ours"


# Refusals that every honest provider would repeat: the model or the input is at fault, so asking others is in vain.
INPUT_REASONS = frozenset(
    {
        Reason.NOT_ONNX, Reason.BAD_MODEL, Reason.OPSET, Reason.CUSTOM_OPERATOR, Reason.EXTERNAL_DATA, Reason.INITIALIZER_SHAPE,
        Reason.MISSING_INPUT, Reason.UNKNOWN_INPUT, Reason.UNKNOWN_OUTPUT, Reason.WRONG_SHAPE, Reason.WRONG_DTYPE,
        Reason.RUN_FAILED, Reason.BAD_TENSOR, Reason.RANDOM_OPERATOR,
    }
)  # fmt: skip
FAULT_REASONS = frozenset({Reason.INTERNAL, Reason.WORKER_DIED, Reason.WRONG_HASH, Reason.CALL_MISMATCH, Reason.TIME_LIMIT})
OUR_REASONS = frozenset({Reason.BUDGET, Reason.CANCELLED})
# Faults that a model can cause at an honest provider: they say nothing about other models there.
MODEL_REASONS = frozenset({Reason.WORKER_DIED, Reason.TIME_LIMIT, Reason.MEMORY, Reason.OUTPUT_TOO_LARGE, Reason.TOO_SLOW})
GONE_REASONS = frozenset({Reason.SHUTTING_DOWN, Reason.DUPLICATE_SESSION, Reason.IDLE})


def cause_of(error: Exception) -> Cause:
    """Say whose fault an error is."""
    match error:
        case WorkError(reason=reason) | Refused(reason=reason) | ProtocolViolation(reason=reason) if reason in OUR_REASONS:
            return Cause.OURS
        case WorkError(reason=reason) | Refused(reason=reason) if reason in FAULT_REASONS:
            return Cause.PROVIDER
        case Refused(reason=reason) if reason in INPUT_REASONS:
            return Cause.INPUT
        case WorkError():
            return Cause.INPUT
        case Refused(reason=reason) if reason in GONE_REASONS:
            return Cause.UNREACHABLE
        case Refused():
            return Cause.REFUSED
        case Unreachable():
            return Cause.UNREACHABLE
        case ProtocolViolation() | TooSlow() | PeerError():
            return Cause.PROVIDER
    return Cause.OURS


def reason_of(error: Exception) -> Reason:
    """Give the closed-list reason of an error."""
    reason = getattr(error, "reason", None)
    if isinstance(reason, Reason):
        return reason
    if isinstance(error, Unreachable):
        return Reason.CONNECTION_LOST
    return Reason.TOO_SLOW if isinstance(error, TooSlow) else Reason.INTERNAL


@dataclass(frozen=True, slots=True)
class Ban:
    """A peer is not asked before `until` (monotonic seconds). model: for which one, empty for all of this node's work.

    repeats: bans of this cause in a row.
    """

    peer: bytes
    model: bytes
    cause: Cause
    reason: Reason
    until: float
    repeats: int


class BanBook:
    """Who is not to be asked for a while. Bounded; a success forgets, a repeat doubles."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._bans: dict[tuple[bytes, bytes, Cause], Ban] = {}

    def record(self, peer: bytes, model: bytes, error: Exception, now: float) -> Ban | None:
        """Remember a failure with a model. Gives the ban it caused; a bad input bans nobody, nor does having no room."""
        if is_back_pressure(error):
            return None
        cause, reason = cause_of(error), reason_of(error)
        first = {
            Cause.PROVIDER: self._settings.ban_fault_seconds,
            Cause.REFUSED: self._settings.ban_refused_seconds,
            Cause.UNREACHABLE: self._settings.ban_unreachable_seconds,
        }.get(cause)
        if first is None:
            return None
        scope = b""
        if reason in MODEL_REASONS:
            scope, first = model, self._settings.ban_model_seconds
        key = (peer, scope, cause)
        old = self._bans.get(key)
        if old is not None and now < old.until:
            return old  # One event fails every call under way; it is one failure.
        self._bans.pop(key, None)
        # A ban that ended long ago does not count as the same bad spell.
        repeats = 0 if old is None or now > old.until + self._settings.ban_seconds_max else old.repeats + 1
        seconds = min(first * 2.0 ** min(repeats, 20), self._settings.ban_seconds_max)
        ban = self._bans[key] = Ban(peer, scope, cause, reason, now + seconds, repeats)
        while len(self._bans) > self._settings.bans_kept_max:
            del self._bans[next(iter(self._bans))]
        return ban

    def forgive(self, peer: bytes, model: bytes) -> None:
        """Forget a peer's bans, those for this model and those for all, after a success with it."""
        for key in self._keys(peer, model):
            self._bans.pop(key, None)

    def ban(self, peer: bytes, model: bytes, now: float) -> Ban | None:
        """Give the ban that keeps a model from a peer longest now, or None."""
        standing = [ban for key in self._keys(peer, model) if (ban := self._bans.get(key)) is not None and ban.until > now]
        return max(standing, key=lambda ban: ban.until, default=None)

    def next_end(self, now: float) -> float | None:
        """Give when the first standing ban ends, or None without one."""
        return min((ban.until for ban in self._bans.values() if ban.until > now), default=None)

    @staticmethod
    def _keys(peer: bytes, model: bytes) -> list[tuple[bytes, bytes, Cause]]:
        return [(peer, scope, cause) for cause in Cause for scope in (b"", model)]


@dataclass(frozen=True, slots=True)
class RetryAt:
    """Try again at this time (monotonic seconds)."""

    when: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No further attempt: how it ended and why."""

    end: EndReason
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Entered:
    """The work entered a state."""

    state: State


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt failed. jitter: a random number in [0, 1), given in because machines hold no randomness."""

    error: Exception
    jitter: float


class Attempts:
    """The machine of one piece of work: `handle` an event, wait until `deadline`, `handle` the next."""

    def __init__(self, settings: JobSettings, started: float, deadline_seconds: float | None = None) -> None:
        self._settings = settings
        self._started = started
        self._end = started + deadline_seconds if deadline_seconds is not None else float("inf")
        self._state_end = started + settings.match_seconds
        self.in_line_since = float("inf")
        self.state = State.MATCH
        self.failures = 0

    @property
    def deadline(self) -> float:
        """When the present state, or the whole work, has taken too long (monotonic seconds)."""
        return min(self._state_end, self._end)

    def enter_line(self, now: float) -> float:
        """Note that the work waits in line at a provider that is well; gives until when it may (monotonic seconds).

        As long as one run may take, from the first time on. Until then a refusal uses up no attempt; later it does, as ever.
        """
        self.in_line_since = min(self.in_line_since, now)
        return min(self.in_line_since + self._settings.run_seconds, self._end)

    def has_waited_too_long(self, now: float) -> bool:
        """Say whether the whole work's time is over and some of it went by in line."""
        return now >= self._end > self.in_line_since

    def handle(self, event: Entered | Failed, now: float) -> RetryAt | GiveUp | None:
        """Take an event. Entered gives None; Failed gives when to try again, or that it is over."""
        if isinstance(event, Entered):
            self.state = event.state
            self._state_end = now + self._seconds(event.state)
            return None
        self.failures += 1
        reason, cause = reason_of(event.error), cause_of(event.error)
        detail = getattr(event.error, "detail", "") or str(event.error)
        if cause is Cause.INPUT:
            return GiveUp(EndReason.FAILED, reason, detail)
        if cause is Cause.OURS:
            return GiveUp(_OURS.get(reason, EndReason.FAILED), reason, detail)
        settings = self._settings
        when = now + backoff_seconds(settings, self.failures, event.jitter)
        if when >= self._end:
            return GiveUp(EndReason.EXPIRED, Reason.DEADLINE, detail)
        if self.failures >= settings.attempts_max or when - self._started > settings.retry_total_seconds:
            end = {Cause.REFUSED: EndReason.REFUSED, Cause.UNREACHABLE: EndReason.PEER_LOST}.get(cause, EndReason.FAILED)
            return GiveUp(end, reason, detail)
        return RetryAt(when)

    def _seconds(self, state: State) -> float:
        settings = self._settings
        return {
            State.MATCH: settings.match_seconds,
            State.TRANSFER: settings.transfer_seconds,
            State.START: settings.start_seconds,
            State.RUN: settings.run_seconds,
            State.RETURN: settings.return_seconds,
        }[state]


_OURS = {Reason.BUDGET: EndReason.BUDGET, Reason.CANCELLED: EndReason.CANCELLED}

"""Whether this machine takes a piece of work now: the owner's word, as a pure machine.

Every refusal is counted by reason; `why` gives them back in words. Time comes in as an argument; settings are applied live.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from p2pnode.reasons import Reason
from p2pnode.work.settings import WorkSettings

# Weakest first. A level is written `name` or `name:details`. In a simulation there is nothing to protect, so any demand is met.
LEVELS: Final = ("none", "reduced", "gpu", "full", "simulated")

_SENTENCES: Final[Mapping[Reason, str]] = {
    Reason.PAUSED: "The owner paused this machine; `p2pnode resume` ends the pause.",
    Reason.DRAINING: "This machine finishes its work and takes no more; `p2pnode resume` ends that.",
    Reason.DENIED: "The client is on the deny list or not on the allow list (clients_deny, clients_allow).",
    Reason.MODEL_DENIED: "The model is on the deny list or not on the allow list (models_deny, models_allow).",
    Reason.SANDBOX_LEVEL: "The sandbox is weaker here than the settings demand; `p2pnode status` says what is missing.",
    Reason.BUSY: "The queue was full; allow more workers or a longer queue.",
    Reason.BANDWIDTH: "The bandwidth cap was reached.",
    Reason.MEMORY: "The memory cap leaves no room for the model.",
    Reason.DISK: "The disk quota leaves no room for the model; `p2pnode clean` frees some.",
    Reason.UNKNOWN_MODEL: "The model is not on this machine.",
    Reason.MODEL_TOO_LARGE: "The model is larger than this machine takes.",
    Reason.DEADLINE: "The work waited in the queue beyond its deadline.",
    Reason.SHUTTING_DOWN: "The node is stopping.",
}


def level_at_least(level: str, minimum: str) -> bool:
    """Say whether a sandbox level is good enough; a level nobody knows is not."""
    name = level.partition(":")[0]
    if name not in LEVELS or minimum not in LEVELS:
        return False
    return LEVELS.index(name) >= LEVELS.index(minimum)


class Admission:
    """The gate in front of the queue. `check` is called for every call, so it stays a few comparisons long."""

    def __init__(self, settings: WorkSettings, level: str) -> None:
        self._settings = settings
        self._level = level
        self._is_level_met = level_at_least(level, settings.sandbox_min)
        self._paused_until: float | None = None
        self._draining = False
        self._refusals: Counter[Reason] = Counter()
        self._tokens = float(settings.bandwidth_bytes_per_second)
        self._tokens_at = 0.0

    def apply(self, settings: WorkSettings) -> None:
        """Let new settings count from now on."""
        self._settings = settings
        self.level = self._level
        self._tokens = min(self._tokens, float(settings.bandwidth_bytes_per_second))

    @property
    def level(self) -> str:
        """The sandbox's level here."""
        return self._level

    @level.setter
    def level(self, level: str) -> None:
        self._level = level
        self._is_level_met = level_at_least(level, self._settings.sandbox_min)

    def pause(self, now: float, seconds: float | None = None) -> None:
        """Take no new work for `seconds`, or until `resume`."""
        self._paused_until = float("inf") if seconds is None else now + seconds

    def resume(self) -> None:
        """End a pause or a drain."""
        self._paused_until, self._draining = None, False

    def drain(self) -> None:
        """Take no new work, finish what is here."""
        self._draining = True

    def is_paused(self, now: float) -> bool:
        """Whether a pause holds now."""
        return self._paused_until is not None and now < self._paused_until

    @property
    def is_draining(self) -> bool:
        """Whether `drain` was called and not undone."""
        return self._draining

    @property
    def paused_until(self) -> float | None:
        """End of the pause on the monotonic clock; infinity for one without end, None for no pause."""
        return self._paused_until

    def check(self, client: bytes, model_id: bytes, now: float) -> Reason | None:
        """Give the reason why this client may not run this model now, and count it; None when it may."""
        reason = self.look(client, model_id, now)
        if reason is not None:
            self._refusals[reason] += 1
        return reason

    def look(self, client: bytes, model_id: bytes, now: float) -> Reason | None:
        """Give what `check` would, without counting. An empty client is the owner, who is never refused."""
        if not client:
            return None
        if self._draining:
            return Reason.DRAINING
        if self._paused_until is not None:
            if now < self._paused_until:
                return Reason.PAUSED
            self._paused_until = None
        settings = self._settings
        if client in settings.deny_clients or (settings.allow_clients and client not in settings.allow_clients):
            return Reason.DENIED
        if model_id in settings.deny_models or (settings.allow_models and model_id not in settings.allow_models):
            return Reason.MODEL_DENIED
        return None if self._is_level_met else Reason.SANDBOX_LEVEL

    def check_queue(self, queued: int, queued_by_owner: int, queued_bytes: int) -> Reason | None:
        """Give BUSY, counted, when nothing more fits into the queue: calls, one owner's calls, or their bytes."""
        settings = self._settings
        if (
            queued < settings.queue_max
            and queued_by_owner < settings.queue_per_owner_max
            and queued_bytes <= settings.queue_bytes_max
        ):
            return None
        self._refusals[Reason.BUSY] += 1
        return Reason.BUSY

    def take_bandwidth(self, size_bytes: int, now: float) -> Reason | None:
        """Take bytes out of the bucket, which refills at the capped rate and holds a second of it; BANDWIDTH when it is empty.

        One transfer may be larger than the bucket: it is let through when the bucket is not in debt, and leaves it in debt.
        """
        rate = self._settings.bandwidth_bytes_per_second
        if rate <= 0:
            return None
        self._tokens = min(float(rate), self._tokens + (now - self._tokens_at) * rate)
        self._tokens_at = now
        if self._tokens <= 0:
            self._refusals[Reason.BANDWIDTH] += 1
            return Reason.BANDWIDTH
        self._tokens -= size_bytes
        return None

    def spend_bandwidth(self, size_bytes: int) -> None:
        """Count bytes that are sent in any case, such as outputs of accepted work."""
        if self._settings.bandwidth_bytes_per_second > 0:
            self._tokens -= size_bytes

    def count(self, reason: Reason) -> None:
        """Count a refusal that was decided elsewhere."""
        self._refusals[reason] += 1

    def refusals(self) -> dict[str, int]:
        """Give refusals since the start by reason text."""
        return {reason.value: count for reason, count in sorted(self._refusals.items())}

    def why(self, now: float) -> list[tuple[Reason, int, str]]:
        """Give why there is or was no work: what holds now first, then past refusals, most frequent first, each in a sentence."""
        holding = [reason for reason in (Reason.DRAINING, Reason.PAUSED, Reason.SANDBOX_LEVEL) if self._holds(reason, now)]
        past = sorted((reason for reason in self._refusals if reason not in holding), key=lambda reason: -self._refusals[reason])
        return [(reason, self._refusals[reason], _sentence(reason)) for reason in (*holding, *past)]

    def _holds(self, reason: Reason, now: float) -> bool:
        if reason is Reason.DRAINING:
            return self._draining
        if reason is Reason.PAUSED:
            return self.is_paused(now)
        return not self._is_level_met


def _sentence(reason: Reason) -> str:
    return _SENTENCES.get(reason, f"Refused: {reason.value}.")

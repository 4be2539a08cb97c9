"""The owner's word, as a table and in time."""

from dataclasses import replace

import pytest

from p2pnode.reasons import Reason
from p2pnode.work.admission import Admission, level_at_least
from p2pnode.work.settings import WorkSettings

ALICE, BOB, MODEL, OTHER = b"a" * 32, b"b" * 32, b"m" * 32, b"o" * 32


def admission(level: str = "full", **settings: object) -> Admission:
    return Admission(WorkSettings(**settings), level)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "client", "model", "wanted"),
    [
        ({}, ALICE, MODEL, None),
        ({"deny_clients": frozenset({ALICE})}, ALICE, MODEL, Reason.DENIED),
        ({"deny_clients": frozenset({ALICE})}, BOB, MODEL, None),
        ({"allow_clients": frozenset({BOB})}, ALICE, MODEL, Reason.DENIED),
        ({"allow_clients": frozenset({ALICE}), "deny_clients": frozenset({ALICE})}, ALICE, MODEL, Reason.DENIED),
        ({"allow_models": frozenset({OTHER})}, ALICE, MODEL, Reason.MODEL_DENIED),
        ({"deny_models": frozenset({MODEL})}, ALICE, MODEL, Reason.MODEL_DENIED),
        ({"deny_models": frozenset({MODEL})}, b"", MODEL, None),
    ],
)
def test_lists(settings: dict[str, object], client: bytes, model: bytes, wanted: Reason | None) -> None:
    gate = admission(**settings)
    assert gate.check(client, model, 0.0) is wanted
    assert gate.refusals() == ({wanted.value: 1} if wanted else {})


@pytest.mark.parametrize(
    ("level", "minimum", "wanted"),
    [
        ("full", "full", True),
        ("reduced:landlock", "full", False),
        ("reduced:landlock,seccomp", "reduced", True),
        ("gpu", "full", False),
        ("gpu", "reduced", True),
        ("full", "gpu", True),
        ("simulated", "full", True),
        ("unknown", "none", False),
        ("full", "nonsense", False),
    ],
)
def test_sandbox_levels(level: str, minimum: str, wanted: bool) -> None:
    assert level_at_least(level, minimum) is wanted
    assert (admission(level, sandbox_min=minimum).check(ALICE, MODEL, 0.0) is None) is wanted


def test_a_pause_ends_by_itself_or_by_resume() -> None:
    gate = admission()
    gate.pause(100.0, 50.0)
    assert gate.check(ALICE, MODEL, 149.9) is Reason.PAUSED
    assert gate.check(ALICE, MODEL, 150.0) is None
    gate.pause(200.0)
    assert gate.check(ALICE, MODEL, 1e9) is Reason.PAUSED
    gate.resume()
    assert gate.check(ALICE, MODEL, 1e9) is None
    gate.drain()
    assert gate.check(ALICE, MODEL, 1e9) is Reason.DRAINING
    gate.resume()
    assert gate.check(ALICE, MODEL, 1e9) is None


def test_looking_is_not_counted() -> None:
    gate = admission(deny_models=frozenset({MODEL}))
    assert gate.look(ALICE, MODEL, 0.0) is Reason.MODEL_DENIED
    assert gate.refusals() == {}


def test_settings_are_applied_live() -> None:
    gate = admission()
    assert gate.check(ALICE, MODEL, 0.0) is None
    gate.apply(WorkSettings(deny_clients=frozenset({ALICE})))
    assert gate.check(ALICE, MODEL, 0.0) is Reason.DENIED


@pytest.mark.parametrize(
    ("queued", "own", "size", "busy"), [(9, 4, 99, False), (10, 4, 99, True), (9, 5, 99, True), (9, 4, 101, True)]
)
def test_the_queue_has_three_bounds(queued: int, own: int, size: int, busy: bool) -> None:
    gate = admission(queue_max=10, queue_per_owner_max=5, queue_bytes_max=100)
    assert (gate.check_queue(queued, own, size) is Reason.BUSY) is busy


def test_bandwidth_is_a_bucket_of_one_second() -> None:
    gate = admission(bandwidth_bytes_per_second=1000)
    assert gate.take_bandwidth(600, 0.0) is None
    assert gate.take_bandwidth(900, 0.0) is None  # larger than what is left: into debt
    assert gate.take_bandwidth(1, 0.0) is Reason.BANDWIDTH
    assert gate.take_bandwidth(1, 0.4) is Reason.BANDWIDTH  # the debt of 500 takes half a second
    assert gate.take_bandwidth(1, 0.6) is None
    gate.spend_bandwidth(2000)
    assert gate.take_bandwidth(1, 1.0) is Reason.BANDWIDTH
    assert admission().take_bandwidth(10**12, 0.0) is None
    # Idle time fills it to one second's worth and no further.
    gate.take_bandwidth(0, 100.0)
    assert gate.take_bandwidth(1000, 100.0) is None
    assert gate.take_bandwidth(1, 100.0) is Reason.BANDWIDTH


def test_why_names_what_holds_now_before_what_happened() -> None:
    gate = admission(deny_models=frozenset({MODEL}), level="full")
    for _ in range(3):
        gate.check(ALICE, MODEL, 0.0)
    gate.count(Reason.MEMORY)
    assert [entry[:2] for entry in gate.why(0.0)] == [(Reason.MODEL_DENIED, 3), (Reason.MEMORY, 1)]
    gate.pause(0.0, 10.0)
    gate.check(ALICE, OTHER, 1.0)
    reasons = gate.why(1.0)
    assert [entry[0] for entry in reasons] == [Reason.PAUSED, Reason.MODEL_DENIED, Reason.MEMORY]
    assert all(sentence.endswith(".") for _, _, sentence in reasons)
    assert gate.why(11.0)[0][0] is Reason.MODEL_DENIED


def test_why_names_a_weak_sandbox_before_anybody_asked() -> None:
    assert admission("reduced:seccomp").why(0.0)[0][0] is Reason.SANDBOX_LEVEL


def test_processor_share_gives_workers() -> None:
    settings = WorkSettings(cores=8)
    assert settings.workers_max == 8
    assert replace(settings, cpu_fraction=0.5, threads_per_worker=2).workers_max == 2
    assert replace(settings, cpu_fraction=0.01).workers_max == 1

"""What a seed draws: everything sometimes, the same each time, and always an end in peace."""

from p2pnode.sim.scenario import STEPS, Options, parse_scenario
from p2pnode.sim.swarm import HEALING_SECONDS, SAFETY_SECONDS, drawn_case

FAULTS = ("kill", "leave", "flap", "partition", "roll_partitions", "lose_entry_points", "loss", "attack")


def a_case(**data):
    return parse_scenario("swarm", {"swarm": True, **data}, {}).cases[0]


def test_a_seed_draws_the_same_case_again_and_another_seed_another() -> None:
    assert drawn_case(a_case(), 3) == drawn_case(a_case(), 3)
    assert drawn_case(a_case(), 3) != drawn_case(a_case(), 4)


def test_every_trouble_is_sometimes_on_and_sometimes_off() -> None:
    cases = [drawn_case(a_case(), seed) for seed in range(60)]
    for fault in FAULTS:
        count = sum(any(step.do == fault for step in case.steps) for case in cases)
        assert 5 < count < 45, fault
    for name, off in (("loss", 0.0), ("reachable", 1.0), ("churn", "none"), ("offer_bytes", 0), ("skew_seconds", 0.0)):
        count = sum(getattr(case.options, name) != off for case in cases)
        assert 5 < count < 45, name
    calm = [seed for seed in range(300) if not any(step.do in FAULTS for step in drawn_case(a_case(), seed).steps)]
    assert 0 < len(calm) < 30


def test_all_faults_end_before_the_network_is_judged() -> None:
    for seed in range(40):
        steps = drawn_case(a_case(), seed).steps
        assert [step.at for step in steps] == sorted(step.at for step in steps)
        assert max((step.at for step in steps if step.do in FAULTS), default=0.0) < SAFETY_SECONDS
        done = {step.do: step.at for step in steps}
        for peace in ("heal", "end_attack", "restart", "churn"):
            assert SAFETY_SECONDS <= done[peace] < done["recovery"]
        assert done["recovery"] == SAFETY_SECONDS + HEALING_SECONDS
        assert set(done) <= set(STEPS)


def test_what_the_file_says_is_kept() -> None:
    case = a_case(options={"nodes": 33, "loss": 0.01}, must={"violations": "<= 0"}, step=[{"at": 5, "do": "lookups"}])
    for seed in range(10):
        drawn = drawn_case(case, seed)
        assert (drawn.options.nodes, drawn.options.loss) == (33, 0.01)
        assert drawn.thresholds == case.thresholds
        assert case.steps[0] in drawn.steps
    assert all(drawn_case(a_case(driver="world"), seed).options.nodes <= 40 for seed in range(10))
    assert Options().nodes == 300


def test_real_nodes_buy_and_sell_meanwhile() -> None:
    drawn = drawn_case(a_case(driver="world"), 1)
    assert drawn.options.offer_bytes
    assert [step.at for step in drawn.steps if step.do == "jobs"] == [60.0, SAFETY_SECONDS + HEALING_SECONDS]
    assert not any(step.do == "jobs" for step in drawn_case(a_case(), 1).steps)

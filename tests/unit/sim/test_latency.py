"""Latency models look like what is measured, and are the same for the same seed."""

import statistics

import pytest

from p2pnode.errors import ConfigError
from p2pnode.sim.latency import REGIONS, latency_model


def pairs(name: str, count: int = 120, seed: int = 1) -> list[float]:
    model = latency_model(name)
    places = {f"80.0.{index}.1": model.place(seed, f"80.0.{index}.1") for index in range(count)}
    hosts = list(places)
    return [
        model.one_way(seed, one, places[one], other, places[other]) for i, one in enumerate(hosts) for other in hosts[i + 1 :]
    ]


@pytest.mark.parametrize(
    ("name", "low", "middle", "high"),
    [("lan", 0.0001, 0.0006, 0.004), ("wan", 0.005, 0.016, 0.06), ("continents", 0.010, 0.065, 0.20)],
)
def test_one_way_delays_lie_where_measurements_do(name, low, middle, high) -> None:
    found = sorted(pairs(name))
    percentile = statistics.quantiles(found, n=100)
    assert percentile[0] >= low
    assert percentile[49] == pytest.approx(middle, rel=0.35)
    assert percentile[98] <= high


def test_a_pair_has_one_delay_in_both_directions_and_in_every_run() -> None:
    model = latency_model("continents")
    here, there = model.place(7, "80.0.0.1"), model.place(7, "80.0.0.2")
    delay = model.one_way(7, "80.0.0.1", here, "80.0.0.2", there)
    assert delay == model.one_way(7, "80.0.0.2", there, "80.0.0.1", here)
    assert delay == latency_model("continents").one_way(7, "80.0.0.1", here, "80.0.0.2", there)
    assert pairs("continents", 10, 1) != pairs("continents", 10, 2)


def test_machines_stand_in_every_region() -> None:
    model = latency_model("continents")
    regions = {model.place(1, str(index)).region for index in range(400)}
    assert regions == set(range(len(REGIONS)))


def test_a_flat_network_is_exactly_flat() -> None:
    model = latency_model("flat", 0.25)
    assert model.one_way(1, "a", model.place(1, "a"), "b", model.place(1, "b")) == 0.25
    assert model.jitter == 0


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="continents"):
        latency_model("moon")

"""A simulation's question as a TOML file: the network, what happens to it and when, and what must come out.

`Scenario` is what a file says, `Case` one network of it: its own options, judged by its own thresholds. Every key has a line
in docs/reference/simulations.md; a test compares them.
"""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from p2pnode.errors import InputError
from p2pnode.sim.measures import MEASURES

DRIVERS: Final = ("fast", "world", "topics")
# How much was counted, not how well it went: asked of all seeds of a file and its whole timeline together.
COUNTS: Final = ("gets", "lookups")
CHURNS: Final = ("none", "exponential", "weibull")
LATENCIES: Final = ("flat", "lan", "wan", "continents")
TABLES: Final = ("joined", "oracle")
NODES_MAX: Final = 200_000
CASES_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Options:
    """The network of one case. Each field's meaning is in `OPTION_MEANINGS`."""

    nodes: int = 300
    tables: str = "joined"
    join_seconds: float = 0.1
    settle_seconds: float = 120.0
    entry_points: int = 5
    latency: str = "continents"
    loss: float = 0.0
    reachable: float = 1.0
    slow: float = 0.0
    skew_seconds: float = 0.0
    churn: str = "none"
    session_minutes: float = 60.0
    weibull_shape: float = 0.5
    absence_seconds: float = 30.0
    returning: float = 0.0
    stable: int = 40
    offer_bytes: int = 0
    sample_seconds: float = 60.0
    record_seconds: float = 7200.0
    last_seconds: float = 40.0
    settings: Mapping[str, Any] = field(default_factory=dict)


OPTION_MEANINGS: Final[dict[str, str]] = {
    "nodes": "nodes that are there when the timeline begins",
    "tables": "`joined`: every node joins by the protocol; `oracle`: the driver fills the tables (fast driver only)",
    "join_seconds": "virtual time between two joins",
    "settle_seconds": "calm after the last join, before the timeline begins",
    "entry_points": "the first so many nodes are what newcomers know; each knows three of them",
    "latency": "`flat` (10 ms), `lan`, `wan` or `continents`",
    "loss": "share of requests and of replies that are lost, from the beginning of the timeline",
    "reachable": "share of nodes that others can connect to",
    "slow": "share of nodes that take half a second longer to answer",
    "skew_seconds": "wall clocks differ by up to so much",
    "churn": "`none`, `exponential` or `weibull` sessions",
    "session_minutes": "mean length of a session",
    "weibull_shape": "shape of `weibull`; below 1 most sessions are short",
    "absence_seconds": "time until a node that went is replaced",
    "returning": "share of departed nodes that come back with their key and disk; the others are replaced by new ones",
    "stable": "nodes without churn: half publish, half read",
    "offer_bytes": "size of each node's offer; 0: nobody sells",
    "sample_seconds": "how often tables and offers are looked at",
    "record_seconds": "life of a published record; it is published again at half of it",
    "last_seconds": "time after the timeline in which operations that are under way may end",
    "settings": "settings of the hash table's machine that differ from its defaults",
}

# What a step may do -> its parameters with their defaults.
STEPS: Final[dict[str, dict[str, Any]]] = {
    "publish": {"records": 60},
    "update": {"version": 2},
    "gets": {"count": 200, "over": 20.0},
    "lookups": {"count": 200, "over": 20.0},
    "jobs": {"count": 20, "over": 60.0},
    "grow": {"to": 1000, "over": 600.0},
    "kill": {"fraction": 0.5},
    "leave": {"fraction": 0.5},
    "restart": {"fraction": 1.0},
    "flap": {"fraction": 0.1, "times": 5, "every": 20.0},
    "lose_entry_points": {},
    "partition": {"shares": [0.5, 0.5], "symmetric": True},
    "roll_partitions": {"times": 3, "every": 60.0, "share": 0.3},
    "heal": {},
    "loss": {"fraction": 0.02},
    "churn": {"model": "none"},
    "attack": {"kind": "eclipse", "ids": 16, "subnets": 1, "keys": 1},
    "end_attack": {},
    "recovery": {"gets": 200, "every": 10.0, "for_at_most": 600.0, "offers": False},
    "new_offer": {"times": 5, "every": 30.0},
    "withdraw_offer": {"times": 5, "every": 30.0},
    "advertise": {"fraction": 0.5, "rare": 20},
    "searches": {"count": 40, "over": 60.0},
}
# Steps that one driver alone has, and all that the driver of topics has; it has no table, record or link of its own.
STEPS_OF_ONE_DRIVER: Final = {"jobs": "world", "advertise": "topics", "searches": "topics"}
STEPS_OF_TOPICS: Final = ("advertise", "searches", "kill")
STEP_MEANINGS: Final[dict[str, str]] = {
    "publish": "stable nodes publish so many records and keep them alive",
    "update": "each publisher puts this version of each of its records",
    "gets": "readers get so many records, one after the other, over a time",
    "lookups": "nodes look up random targets, and what they find is compared with the truth",
    "jobs": "nodes buy so many small inferences, evenly over a time (world driver only)",
    "grow": "nodes join until there are `to`, over a time",
    "kill": "this share of nodes loses power at once (none of those that publish or read)",
    "leave": "this share of nodes stops in order",
    "restart": "this share of the nodes that are down comes back with key and disk",
    "flap": "this share of nodes goes down and up again so many times",
    "lose_entry_points": "the nodes that newcomers know lose power",
    "partition": "nothing passes between groups of these shares; asymmetric: only in one direction",
    "roll_partitions": "one after the other, groups of this share are cut off for half of each period",
    "heal": "partitions, loss and slowness end",
    "loss": "from now on this share of requests and replies is lost",
    "churn": "sessions end by this model from now on",
    "attack": "adversaries come up, one of the kinds below, and stay until `end_attack`",
    "end_attack": "the adversaries go down",
    "recovery": "batches of gets until one succeeds in 99 of 100 cases; offers: and the gossip views are one network",
    "new_offer": "a node changes its offer, and the time until 99 of 100 nodes know it is measured",
    "withdraw_offer": "a node withdraws its offer, and the time until 99 of 100 nodes have dropped it is measured",
    "advertise": "this share of nodes advertises under one popular topic, and so many under a rare one (topics driver only)",
    "searches": "so many searches of the popular topic and of the rare one, evenly over a time (topics driver only)",
}  # fmt: skip

FILE_KEYS: Final[dict[str, str]] = {
    "question": "what the scenario answers, one sentence",
    "driver": "`fast`, `world`, or `topics` (offers by topic alone, for networks beyond gossip)",
    "seeds": "every case is run once with each of these",
    "seconds": "virtual length of the timeline, after the network was built",
    "note": "what a reader of the result must know",
    "swarm": "true: the seed draws options and timeline (see `sim/swarm.py`); what is written here is kept",
    "options": "table: the network, see below",
    "step": "array of tables: the timeline; each has `at` (virtual seconds), `do` and the step's parameters",
    "must": "table: measure -> `>= x` or `<= x`",
    "case": "array of tables: `name` and what differs: `driver`, `options`, `step`, `must`, `seconds`",
    "agree": "table: measure -> how far any two cases may differ in it",
    "sweep": "table: option -> list of values; one case for each combination",
}


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happens at a virtual second of the timeline. parameters: complete, as `STEPS` lists them."""

    at: float
    do: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a measure must reach."""

    measure: str
    is_at_least: bool
    bound: float

    def is_met(self, value: float | None) -> bool:
        """Say whether a value reaches it; a measure that was never taken does not."""
        return value is not None and (value >= self.bound if self.is_at_least else value <= self.bound)

    def __str__(self) -> str:
        return f"{self.measure} {'>=' if self.is_at_least else '<='} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Case:
    """One network, its timeline and its thresholds."""

    name: str
    options: Options
    steps: tuple[Step, ...]
    thresholds: tuple[Threshold, ...]
    seconds: float
    driver: str = "fast"
    is_swarm: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """A question with its cases and seeds. name: the file's. agree: (measure, how far any two cases may differ in it)."""

    name: str
    question: str
    seeds: tuple[int, ...]
    cases: tuple[Case, ...]
    note: str = ""
    agree: tuple[tuple[str, float], ...] = ()


def part_of(scenario: Scenario, seeds: Sequence[int] = ()) -> Scenario:
    """Give a scenario with fewer seeds or a shorter timeline: it is not asked how much is counted in the whole."""

    def part(case: Case) -> Case:
        return replace(case, thresholds=tuple(each for each in case.thresholds if each.measure not in COUNTS))

    return replace(scenario, seeds=tuple(seeds) or scenario.seeds, cases=tuple(map(part, scenario.cases)))


def load_scenario(path: Path, changes: Mapping[str, str] | None = None) -> Scenario:
    """Read a file. changes: option or key -> text, as `--set` gives them; they win in every case. Raises InputError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    try:
        return parse_scenario(path.stem, data, changes or {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse_scenario(name: str, data: Mapping[str, Any], changes: Mapping[str, str]) -> Scenario:
    """Give the scenario in a parsed file. Raises InputError that names the key."""
    data = dict(data)
    forced: dict[str, Any] = {}
    for key, text in changes.items():
        value = _from_text(text)
        if key in ("driver", "seconds", "seeds"):
            data[key] = value
        elif key in OPTION_MEANINGS:
            forced[key] = value
        elif key.startswith("settings."):
            forced.setdefault("settings", {})[key.removeprefix("settings.")] = value
        else:
            raise InputError(f"there is no option {key!r}; choose from {', '.join(OPTION_MEANINGS)}, driver, seconds, seeds")
    _known(data, FILE_KEYS, "key")
    base = {"options": data.get("options", {}), "step": data.get("step", []), "must": data.get("must", {})}
    swept = _combinations(data.get("sweep", {}))
    cases = []
    for written in data.get("case", [{}]):
        _known(written, ("name", "driver", "options", "step", "must", "seconds"), "key of a case")
        driver = changes.get("driver") or written.get("driver", data.get("driver", "fast"))
        if driver not in DRIVERS:
            raise InputError(f"driver is one of {', '.join(DRIVERS)}, not {driver!r}")
        for combination in swept:
            label = ", ".join(filter(None, [written.get("name", ""), *(f"{key}={value}" for key, value in combination.items())]))
            options = {**base["options"], **written.get("options", {}), **combination, **forced}
            cases.append(Case(
                label or name,
                parse_options(options, driver),
                tuple(parse_step(step, driver) for step in written.get("step", base["step"])),
                parse_thresholds({**base["must"], **written.get("must", {})}),
                _number(written.get("seconds", data.get("seconds", 600.0)), "seconds"),
                driver,
                bool(data.get("swarm", False)),
            ))  # fmt: skip
    if len(cases) > CASES_MAX:
        raise InputError(f"{len(cases)} cases are more than {CASES_MAX}: sweep fewer values")
    seeds = data.get("seeds", [1])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise InputError("seeds is a list of whole numbers")
    agree = tuple((measure, _number(most, f"agree.{measure}")) for measure, most in data.get("agree", {}).items())
    _known(dict(agree), MEASURES, "measure")
    return Scenario(name, str(data.get("question", "")), tuple(seeds), tuple(cases), str(data.get("note", "")), agree)


def parse_options(data: Mapping[str, Any], driver: str = "fast") -> Options:
    """Give checked options. Raises InputError."""
    _known(data, OPTION_MEANINGS, "option")
    defaults = Options()
    values: dict[str, Any] = {}
    for key, value in data.items():
        default = getattr(defaults, key)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, dict if key == "settings" else type(default)) or isinstance(value, bool):
            raise InputError(f"option {key} is {type(default).__name__}, not {value!r}")
        values[key] = value
    options: Options = replace(defaults, **values)
    for key, choices in (("churn", CHURNS), ("latency", LATENCIES), ("tables", TABLES)):
        if getattr(options, key) not in choices:
            raise InputError(f"option {key} is one of {', '.join(choices)}, not {getattr(options, key)!r}")
    for key in ("loss", "reachable", "slow", "returning"):
        if not 0.0 <= getattr(options, key) <= 1.0:
            raise InputError(f"option {key} is a share between 0 and 1")
    if not 2 <= options.nodes <= NODES_MAX:
        raise InputError(f"option nodes is between 2 and {NODES_MAX}")
    if options.tables == "oracle" and driver != "fast":
        raise InputError("only the fast driver can fill tables")
    for each in fields(Options):
        if isinstance(getattr(options, each.name), float) and getattr(options, each.name) < 0:
            raise InputError(f"option {each.name} is not negative")
    if options.sample_seconds <= 0:
        raise InputError("option sample_seconds is more than 0")
    return options


def parse_step(data: Mapping[str, Any], driver: str = "") -> Step:
    """Give a checked step with its defaults filled in. driver: which must have it, if that is known. Raises InputError."""
    do = data.get("do")
    if do not in STEPS:
        raise InputError(f"there is no step {do!r}; choose from {', '.join(STEPS)}")
    if driver and (STEPS_OF_ONE_DRIVER.get(do, driver) != driver or (driver == "topics" and do not in STEPS_OF_TOPICS)):
        raise InputError(f"the {driver} driver has no step {do!r}")
    parameters = {key: value for key, value in data.items() if key not in ("at", "do")}
    _known(parameters, STEPS[do], f"parameter of {do}")
    for key, value in parameters.items():
        default = STEPS[do][key]
        kind = int | float if isinstance(default, float) else type(default)
        if not isinstance(value, kind):
            raise InputError(f"{key} of step {do} is like {default!r}, not {value!r}")
    return Step(_number(data.get("at", 0.0), "at"), do, {**STEPS[do], **parameters})


def parse_thresholds(data: Mapping[str, Any]) -> tuple[Threshold, ...]:
    """Give the thresholds in a `must` table. Raises InputError."""
    found = []
    for measure, text in data.items():
        if measure not in MEASURES:
            raise InputError(f"there is no measure {measure!r}; choose from {', '.join(MEASURES)}")
        sign, _, bound = str(text).partition(" ")
        if sign not in (">=", "<="):
            raise InputError(f'{measure} must be written as ">= x" or "<= x", not {text!r}')
        found.append(Threshold(measure, sign == ">=", _number(_from_text(bound.strip()), measure)))
    return tuple(found)


def _combinations(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    for key, values in sweep.items():
        if key not in OPTION_MEANINGS or not isinstance(values, list) or not values:
            raise InputError(f"sweep.{key} is an option with a list of values")
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _known(data: Mapping[str, Any], known: Any, what: str) -> None:
    for key in data:
        if key not in known:
            raise InputError(f"there is no {what} {key!r}; choose from {', '.join(known)}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{what} is a number, not {value!r}")
    return float(value)


def _from_text(text: Any) -> Any:
    """Read a value as TOML would; what is no TOML value is a text without its quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def options_row(options: Options) -> dict[str, Any]:
    """Give the options that a result names: the number of nodes and whatever differs from its default."""
    defaults = Options()
    row = {each.name: getattr(options, each.name) for each in fields(Options)}
    return {name: value for name, value in row.items() if name == "nodes" or value != getattr(defaults, name)}

"""Pictures of a result: success over time, hops, messages per node, table accuracy, offers. PNG files, made by matplotlib.

matplotlib is the extra `sim`; without it a simulation still runs and says how to get the pictures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from p2pnode.errors import ConfigError
from p2pnode.sim.measures import MEASURES, hops_formula

K: Final = 16
# Series that have a picture: name -> (title, label of the axis, lowest value that the axis shows at least).
SERIES: Final[dict[str, tuple[str, str, float]]] = {
    "get_success": ("Gets that gave the newest record", "share of gets", 0.97),
    "closest_accuracy": ("Of the 16 truly nearest, those that a lookup found", "share of 16", 0.95),
    "table_accuracy": ("Routing table entries that are up and serve", "share of entries", 0.9),
    "sibling_accuracy": ("Of the 16 nearest neighbours, those in the table", "share of 16", 0.95),
    "offer_coverage": ("Offers that a node knows", "share of live offers", 0.95),
    "nodes": ("Nodes that are up", "nodes", 0.0),
}
# Colours that stay apart for colour-blind readers (Okabe & Ito).
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MUST_COLOUR: Final = "#b3261e"
CASES_MAX: Final = 8
MARKS_MAX: Final = 12
DOTS_PER_INCH: Final = 110
_QUIET_STEPS: Final = ("publish", "gets", "lookups", "new_offer", "withdraw_offer", "recovery", "jobs")


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what a results file has; gives the pictures' paths. Raises ConfigError without matplotlib."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    cases = results["cases"][:CASES_MAX]
    pictures = []
    panels = [name for name in SERIES if any(len(case["series"].get(name, ())) > 2 for case in cases)]
    if panels:
        pictures.append(_over_time(pyplot, results["scenario"], cases, panels, folder))
    if any(len(case["hops_histogram"]) for case in cases):
        pictures.append(_hops(pyplot, results["scenario"], cases, folder))
    pictures.append(_bars(pyplot, results["scenario"], cases, folder))
    return pictures


def _over_time(pyplot: Any, name: str, cases: Sequence[Mapping[str, Any]], panels: Sequence[str], folder: Path) -> Path:
    """One panel for each series over virtual time, with lines for what must be reached and for what happened."""
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(9, 2.1 * len(panels) + 0.8), squeeze=False)
    longest = max(point[0] for case in cases for panel in panels for point in case["series"].get(panel, [[0.0, 0.0]]))
    unit, divisor = ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0) if longest > 300 else ("seconds", 1.0)
    for (axis,), panel in zip(axes, panels, strict=True):
        title, label, lowest = SERIES[panel]
        values = []
        for case, colour in zip(cases, COLOURS, strict=False):
            points = _thinned(case["series"].get(panel, []))
            values += [value for _, value in points]
            axis.plot(
                [at / divisor for at, _ in points], [value for _, value in points], color=colour, label=case["case"], lw=1.4
            )
        _musts(axis, panel, cases)
        low, high = min([lowest, *values]), max([1.0, *values])
        axis.set_ylim(max(0.0, low - 0.06 * (high - low)), high + 0.06 * (high - low))
        axis.set_xlim(0, longest / divisor)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel(label, fontsize=8)
        _marks(axis, cases, divisor)
        axis.grid(alpha=0.25)
    axes[-1][0].set_xlabel(f"virtual {unit} after the network was built", fontsize=9)
    if len(cases) > 1:
        axes[0][0].legend(fontsize=8, loc="lower right", framealpha=0.9)
    return _saved(pyplot, figure, folder / f"{name}-over-time.png")


def _hops(pyplot: Any, name: str, cases: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """How many referrals lookups took, as shares, with the mean and the formula's value."""
    figure, axis = pyplot.subplots(figsize=(9, 3.6))
    drawn = [case for case in cases if case["hops_histogram"]]
    width = min(0.4, 0.8 / len(drawn))
    for number, (case, colour) in enumerate(zip(drawn, COLOURS, strict=False)):
        counts = {int(hops): count for hops, count in case["hops_histogram"].items()}
        total = sum(counts.values())
        most = hops_formula(case["options"]["nodes"], K) + 0.5
        places = [hops + (number - (len(drawn) - 1) / 2) * width for hops in counts]
        label = f"{case['case']}: mean {case['measures']['hops']:.2f}, must be <= {most:.2f}"
        axis.bar(places, [count / total for count in counts.values()], width * 0.94, color=colour, label=label)
        axis.axvline(most, color="white", lw=3, zorder=3)
        axis.axvline(most, color=colour, ls="--", lw=1.4, zorder=4)
    axis.set_xlabel("referral depth of the nearest node found; dashed: what the mean must not exceed", fontsize=9)
    axis.set_ylabel("share of lookups", fontsize=9)
    axis.set_title("Hops of a lookup", loc="left", fontsize=10)
    axis.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True))
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=min(3, len(drawn)), frameon=False)
    axis.grid(alpha=0.25, axis="y")
    return _saved(pyplot, figure, folder / f"{name}-hops.png")


def _bars(pyplot: Any, name: str, cases: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """What the cases cost and what was asked of them: messages, bytes, and each measure with a threshold."""
    judged = [each["must"].split(" ")[0] for case in cases for each in case["thresholds"]]
    measures = [
        measure
        for measure in dict.fromkeys(["messages_per_node_second", *judged])
        if any(measure in case["measures"] for case in cases) and measure not in ("gets", "tables_empty")
    ]
    size = max(5.0, 3.4 * len(measures)), 1.2 + 0.42 * len(cases)
    figure, axes = pyplot.subplots(1, len(measures), figsize=size, squeeze=False, sharey=True)
    places = range(len(cases))
    for axis, measure in zip(axes[0], measures, strict=True):
        values = [case["measures"].get(measure, 0.0) for case in cases]
        axis.barh(places, values, color=[COLOURS[place % len(COLOURS)] for place in places], height=0.65)
        for place, value, case in zip(places, values, cases, strict=True):
            axis.annotate(
                f"{value:.4g}{_must_at(axis, place, measure, case)}", (0, place), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8, zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            )  # fmt: skip
        axis.set_yticks(list(places), [case["case"] for case in cases], fontsize=8)
        axis.set_title(measure.replace("_", " "), loc="left", fontsize=9)
        axis.set_xlabel(MEASURES[measure][0], fontsize=8)
        axis.margins(x=0.15)
        if MEASURES[measure][0] == "share":
            axis.set_xlim(0, 1.05)
    axes[0][0].invert_yaxis()
    return _saved(pyplot, figure, folder / f"{name}-figures.png")


def _musts(axis: Any, measure: str, cases: Sequence[Mapping[str, Any]]) -> None:
    """A dashed line for each value that must be reached, with its text at a place of its own along the line."""
    bounds: dict[str, None] = {}
    for case in cases:
        for each in case["thresholds"]:
            named, sign, bound = each["must"].split(" ")
            if named == measure:
                bounds[f"{sign} {bound}"] = None
    for number, text in enumerate(bounds):
        bound = float(text.split(" ")[1])
        axis.axhline(bound, color=MUST_COLOUR, ls="--", lw=1, zorder=3)
        axis.annotate(
            f"must be {text}", (0.01 + 0.3 * number, bound), xycoords=("axes fraction", "data"), xytext=(0, -3),
            textcoords="offset points", ha="left", va="top", fontsize=7, color=MUST_COLOUR, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


def _must_at(axis: Any, place: int, measure: str, case: Mapping[str, Any]) -> str:
    """A dashed line across one bar for what that case must reach; gives the same in words."""
    for each in case["thresholds"]:
        named, sign, bound = each["must"].split(" ")
        if named == measure:
            axis.vlines(float(bound), place - 0.45, place + 0.45, color=MUST_COLOUR, ls="--", lw=1.4, zorder=3)
            return f"  must be {sign} {bound}"
    return ""


def _marks(axis: Any, cases: Sequence[Mapping[str, Any]], divisor: float) -> None:
    """A dotted line where something happened; what happened at the same time shares one."""
    marks: dict[float, dict[str, None]] = {}
    for case in cases:
        for at, text in case["marks"]:
            if text not in _QUIET_STEPS:
                marks.setdefault(at, {})[text.replace("_", " ")] = None
    for at in sorted(marks)[:MARKS_MAX]:
        axis.axvline(at / divisor, color="#666666", ls=":", lw=0.9)
        axis.annotate(
            ", ".join(marks[at]), (at / divisor, 0.04), xycoords=("data", "axes fraction"), xytext=(-2, 0),
            textcoords="offset points", rotation=90, fontsize=7, color="#555555", ha="right", va="bottom",
        )  # fmt: skip


def _thinned(points: Sequence[Sequence[float]], most: int = 200) -> list[tuple[float, float]]:
    """Average neighbouring points until there are few enough to read."""
    step = -(-len(points) // most) or 1
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]


def _saved(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    # Without the program's version and the date inside, the same result is the same file.
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib as library

        library.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'p2pnode[sim]', or use --no-plots") from error
    return pyplot

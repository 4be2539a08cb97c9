"""What a simulation leaves behind: a results file for programs and one HTML page for people.

The results file holds what is needed to run it again: seeds, commit, options, digests; and what came out: measures, intervals,
thresholds and whether each was met. The page is self-contained.
"""

import base64
import html
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from p2pnode import __version__
from p2pnode.sim.measures import MEASURES, Measures, as_row
from p2pnode.sim.running import Run
from p2pnode.sim.scenario import Case, Scenario, options_row

RESULTS_VERSION: Final = 1
_COMMIT_SECONDS: Final = 5.0


def make_results(scenario: Scenario, runs: Sequence[Run]) -> dict[str, Any]:
    """Give the contents of the results file. runs: of all cases and seeds, in order of the plan."""
    cases = []
    for case in scenario.cases:
        mine = [run for run in runs if run.case == case.name]
        cases.append(_case_row(case, mine))
    agreement = _agreement(scenario.agree, cases)
    return {
        "version": RESULTS_VERSION,
        "scenario": scenario.name,
        "question": scenario.question,
        "note": scenario.note,
        "p2pnode": __version__,
        "commit": commit(),
        "seeds": list(scenario.seeds),
        "is_met": all(each["is_met"] for each in [*cases, *agreement]),
        "agreement": agreement,
        "cases": cases,
    }


def _agreement(agree: Sequence[tuple[str, float]], cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare the cases in the measures in which they must agree; one that a case lacks is a difference."""
    rows = []
    for measure, most in agree:
        values = [case["measures"].get(measure, math.inf) for case in cases]
        apart = max(values) - min(values)
        rows.append({
            "must": f"all cases within {most:g} in {measure}", "value": _short(apart) if math.isfinite(apart) else None,
            "is_met": apart <= most,
        })  # fmt: skip
    return rows


def _case_row(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    total = Measures().join(run.measures for run in runs)
    figures = total.summary()
    judged = [
        {"must": str(each), "value": _short(figures.get(each.measure)), "is_met": each.is_met(figures.get(each.measure))}
        for each in case.thresholds
    ]
    return {
        "case": case.name,
        "driver": case.driver,
        "seconds": case.seconds,
        "options": options_row(case.options),
        "notes": list(runs[0].notes) if runs else [],
        "is_met": all(each["is_met"] for each in judged) and not total.violations,
        "thresholds": judged,
        **as_row(total),
        "runs": [
            {"seed": run.seed, "digest": run.digest, "measures": as_row(run.measures)["measures"]} for run in runs
        ],
    }  # fmt: skip


def commit() -> str:
    """Give the commit that this program was run from, with `+` where the program differs from it; empty outside a checkout."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True, timeout=_COMMIT_SECONDS
        )  # fmt: skip
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def write_results(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `<scenario>.json`; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results['scenario']}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_page(results: Mapping[str, Any], folder: Path, pictures: Sequence[Path]) -> Path:
    """Write `<scenario>.html` with its pictures inside; gives its path."""
    path = folder / f"{results['scenario']}.html"
    path.write_text(page(results, pictures), encoding="utf-8")
    return path


def page(results: Mapping[str, Any], pictures: Sequence[Path]) -> str:
    """Give the report as one HTML page."""
    verdict = "every figure is met" if results["is_met"] else "a figure is missed"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(results['scenario'])}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(results['scenario'])}</h1><p class=question>{html.escape(results['question'])}</p>",
        f"<p class={'met' if results['is_met'] else 'missed'}>{verdict}</p>",
    ]
    if results["note"]:
        parts.append(f"<p>{html.escape(results['note'])}</p>")
    parts.append(_thresholds_table([*results["cases"], {"case": "all", "thresholds": results["agreement"]}]))
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Everything that was measured</h2>", _measures_table(results["cases"])]
    parts += ["<h2>To run it again</h2>", _how(results)]
    return "\n".join(parts) + "\n"


def _thresholds_table(cases: Sequence[Mapping[str, Any]]) -> str:
    rows = ["<table><tr><th>case<th>must<th>measured<th></tr>"]
    for case in cases:
        for each in case["thresholds"]:
            mark = "<td class=met>met" if each["is_met"] else "<td class=missed>missed"
            rows.append(
                f"<tr><td>{html.escape(case['case'])}<td>{html.escape(each['must'])}<td>{_text(each['value'])}{mark}</tr>"
            )
        name = html.escape(case["case"])
        broken = [html.escape(violation) for violation in case.get("violations", [])]
        rows += [f"<tr><td>{name}<td colspan=2>{each}<td class=missed>broken</tr>" for each in broken]
    return "".join(rows) + "</table>"


def _measures_table(cases: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in MEASURES if any(name in case["measures"] for case in cases)]
    head = "".join(f"<th>{html.escape(case['case'])}" for case in cases)
    rows = [f"<table><tr><th>measure<th>unit{head}</tr>"]
    for name in names:
        unit, meaning = MEASURES[name]
        cells = "".join(f"<td>{_text(case['measures'].get(name))}" for case in cases)
        rows.append(f'<tr title="{html.escape(meaning)}"><td>{name}<td>{unit}{cells}</tr>')
    return "".join(rows) + "</table>"


def _how(results: Mapping[str, Any]) -> str:
    lines = [f"p2pnode {results['p2pnode']}, commit {results['commit'] or 'unknown'}, seeds {results['seeds']}"]
    for case in results["cases"]:
        changed = ", ".join(f"{name}={value}" for name, value in case["options"].items())
        lines.append(f"{case['case']}: {case['driver']} driver, {case['seconds']:g} s; {changed}")
        lines += [f"  {note}" for note in case["notes"]]
        lines += [f"  seed {run['seed']}: digest {run['digest']}" for run in case["runs"]]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}"
    "td{font-variant-numeric:tabular-nums}img{max-width:100%;display:block;margin:1rem 0}.question{font-size:1.2rem}"
    ".met{color:#137333}.missed{color:#b3261e;font-weight:600}pre{white-space:pre-wrap;background:#f6f6f6;padding:.7rem}"
)

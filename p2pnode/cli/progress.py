"""The progress of a map: a bar with rate, cost and time left on a terminal; one JSON object a line for programs."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from p2pnode.units import format_credits, format_duration


def follow(events: Iterable[dict[str, Any]], *, as_json: bool) -> dict[str, Any]:
    """Show events until they end and give the last one."""
    last: dict[str, Any] = {}
    if as_json:
        for last in events:
            print(json.dumps(last), flush=True)
        return last
    if not sys.stderr.isatty():
        for last in events:
            print(sentence(last), file=sys.stderr, flush=True)
        return last
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, transient=False) as bar:
        task = bar.add_task("map", total=None, note="finding providers")
        for last in events:
            bar.update(task, total=last.get("total"), completed=last.get("done", 0), note=note(last))
    print(sentence(last), file=sys.stderr)
    return last


def note(event: dict[str, Any]) -> str:
    """Give rate, cost and time left of one event."""
    parts = [f"{event.get('rate') or 0:.3g}/s", f"{format_credits(event.get('spent') or 0)} credits"]
    if event.get("eta_seconds") is not None and event.get("done") != event.get("total"):
        parts.append(f"{format_duration(event['eta_seconds'])} left")
    return ", ".join(parts)


def sentence(event: dict[str, Any]) -> str:
    """Give one event as a line of text."""
    ended = f", {event['end_reason']}" if event.get("end_reason") else ""
    return f"{event.get('done', 0)} of {event.get('total', '?')} items, {note(event)}{ended}"

"""Buying: run a model once, map it over data, and look after jobs."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pnode.cli.ask import ask
from p2pnode.cli.output import Home, Json, facts, guarded, show, table

app = typer.Typer(help="List, describe, stop and explain jobs.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="An ONNX file, a stored model's id, or the beginning of one.")]
MaxPrice = Annotated[str | None, typer.Option("--max-price", help="Most credits for one call.", envvar="P2PNODE_MAX_PRICE")]
MaxTotal = Annotated[
    str | None, typer.Option("--max-total", help="Most credits in all: a hard stop.", envvar="P2PNODE_MAX_TOTAL")
]
Deadline = Annotated[
    str | None, typer.Option("--deadline", help="Longest time for all of it, such as 10m.", envvar="P2PNODE_DEADLINE")
]
Provider = Annotated[
    str, typer.Option("--provider", help="Only this node: its id or the beginning of it.", envvar="P2PNODE_PROVIDER")
]
Deny = Annotated[list[str] | None, typer.Option("--deny", help="Never this node; may be repeated.", envvar="P2PNODE_DENY")]
Fallback = Annotated[
    bool,
    typer.Option(
        "--local-fallback", help="Run in this machine's own sandbox when nobody else can.", envvar="P2PNODE_LOCAL_FALLBACK"
    ),
]
Priority = Annotated[int, typer.Option("--priority", min=0, max=9, help="0 first, 9 last.", envvar="P2PNODE_PRIORITY")]
Outputs = Annotated[
    list[str] | None, typer.Option("--outputs", help="Names of the outputs wanted; default all.", envvar="P2PNODE_OUTPUTS")
]


@guarded
def run(
    model: Model,
    source: Annotated[
        Path,
        typer.Option("--input", "-i", help=".npz with one array per input, or .npy for a single one.", envvar="P2PNODE_INPUT"),
    ],
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help=".npz (or .npy) to write.", envvar="P2PNODE_OUTPUT")
    ] = None,
    outputs: Outputs = None,
    max_price: MaxPrice = None,
    max_total: MaxTotal = None,
    deadline: Deadline = None,
    provider: Provider = "",
    deny: Deny = None,
    local_fallback: Fallback = False,
    priority: Priority = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before anything is spent.", envvar="P2PNODE_DRY_RUN")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Run a model once on another machine. The provider sees the input."""
    import p2pnode

    terms = _terms(max_price, max_total, deadline, provider, deny, local_fallback, priority)
    with p2pnode.connect() as network:
        inputs = _read_inputs(source, lambda: network.session(model, **terms))
        plan = network.dry_run(model, inputs, **terms)
        if dry_run:
            show(plan, lambda: _plan_text(plan), as_json=as_json)
            return
        if not as_json:
            print(_plan_text(plan), file=sys.stderr)
        result = network.run(model, inputs, outputs, **terms)
    if target:
        _write_outputs(target, dict(result.outputs))
    _show_result(result, target, as_json=as_json)


def _terms(
    max_price: str | None, max_total: str | None, deadline: str | None, provider: str, deny: list[str] | None,
    local_fallback: bool, priority: int,
) -> dict[str, Any]:  # fmt: skip
    terms: dict[str, Any] = {
        "provider": provider, "deny": tuple(deny or ()), "local_fallback": local_fallback, "priority": priority,
    }  # fmt: skip
    terms |= {name: value for name, value in (("max_price", max_price), ("max_total", max_total)) if value is not None}
    return terms | ({"deadline_seconds": deadline} if deadline is not None else {})


def _read_inputs(source: Path, session: Any) -> dict[str, Any]:
    """Give arrays by input name: an .npz names them itself, an .npy is the model's only input."""
    import numpy as np

    from p2pnode.errors import InputError

    try:
        loaded = np.load(source, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{source} cannot be read as .npz or .npy: {error}") from error
    if isinstance(loaded, np.ndarray):
        opened = session()
        names = [info.name for info in opened.inputs]
        opened.close()
        if len(names) != 1:
            raise InputError(f"{source} holds one array and the model takes {', '.join(names)}: use an .npz with these names")
        return {names[0]: loaded}
    return dict(loaded)


def _write_outputs(target: Path, outputs: dict[str, Any]) -> None:
    import numpy as np

    if target.suffix == ".npy" and len(outputs) == 1:
        np.save(target, next(iter(outputs.values())))
    else:
        with target.open("wb") as file:
            np.savez(file, **outputs)


def _plan_text(plan: dict[str, Any]) -> str:
    from p2pnode.units import format_credits

    lines = []
    for index, row in enumerate(plan["chosen"]):
        word = "would run on" if index == 0 else "or on"
        price, when = format_credits(row["price_microcredits"]), f"{row['expected_seconds'] * 1000:.3g} ms"
        lines.append(f"{word} {row['provider']} for {price} credits, about {when}")
    lines += [f"not on {row['provider']}: {row['reason']} {row.get('detail', '')}".rstrip() for row in plan["rejected"]]
    if plan["chosen"]:
        lines.append(f"most at risk: {format_credits(plan['at_risk_microcredits'])} credits; {plan['notice']}")
        return "\n".join(lines)
    return "\n".join([*lines, "no provider would run this now; `p2pnode net peers` shows who is known"])


def _show_result(result: Any, target: Path | None, *, as_json: bool) -> None:
    import numpy as np

    from p2pnode.units import format_credits, format_size

    data = {
        "job": result.job, "provider": result.provider, "amount": result.amount, "credits": format_credits(result.amount),
        "seconds": result.seconds, "bytes_sent": result.bytes_sent, "bytes_received": result.bytes_received,
        "receipts": list(result.receipts), "output": str(target) if target else None,
        "outputs": {
            name: {"shape": list(np.shape(value)), "dtype": str(getattr(value, "dtype", type(value).__name__))}
            for name, value in result.outputs.items()
        },
    }  # fmt: skip

    def text() -> str:
        lines = [
            ("job", result.job), ("provider", result.provider), ("cost", f"{data['credits']} credits"),
            ("time", f"{result.seconds * 1000:.1f} ms"),
            ("traffic", f"{format_size(result.bytes_sent)} sent, {format_size(result.bytes_received)} received"),
        ]  # fmt: skip
        lines += [("receipt", receipt) for receipt in result.receipts]
        if target:
            lines.append(("written", str(target)))
            return facts(lines)
        return facts(lines) + "\n" + "\n".join(f"{name} = {value}" for name, value in result.outputs.items())

    show(data, text, as_json=as_json)


@guarded
def map_data(
    model: Model,
    data: Annotated[Path, typer.Argument(help="A folder of .npy/.npz, or one .npy, .npz, .jsonl, .parquet or .csv file.")],
    target: Annotated[
        Path, typer.Option("--output", "-o", help="Where the results go, in the same form.", envvar="P2PNODE_OUTPUT")
    ],
    batch: Annotated[int, typer.Option("--batch", help="Rows of one call; 0 chooses.", envvar="P2PNODE_BATCH")] = 0,
    outputs: Outputs = None,
    max_price: MaxPrice = None,
    max_total: MaxTotal = None,
    deadline: Deadline = None,
    provider: Provider = "",
    deny: Deny = None,
    providers: Annotated[int, typer.Option("--providers", help="Most providers at once.", envvar="P2PNODE_PROVIDERS")] = 8,
    local_fallback: Fallback = False,
    priority: Priority = 5,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Run a model over data on many machines. Killed at any point and started again, it continues and pays nothing twice."""
    import p2pnode
    from p2pnode.cli.progress import follow

    terms = _terms(max_price, max_total, deadline, provider, deny, local_fallback, priority)
    with p2pnode.connect() as network:
        events = network.map(
            model, data.absolute(), target.absolute(), outputs=tuple(outputs or ()), batch=batch, providers=providers, **terms
        )
        last = follow(events, as_json=as_json)
    _raise_unless_completed(last)


def _raise_unless_completed(last: dict[str, Any]) -> None:
    from p2pnode.errors import PeerError, Refused
    from p2pnode.reasons import EndReason, Reason

    end = last.get("end_reason")
    if end in (None, EndReason.COMPLETED.value):
        return
    known = {reason.value for reason in Reason}
    text = str(last.get("detail") or f"the map ended: {end}")
    if end == EndReason.BUDGET.value:
        raise Refused(Reason.BUDGET, "the map stopped at its budget; what is finished is kept")
    reason = last.get("reason")
    raise Refused(Reason(reason), text) if reason in known else PeerError(text)


@app.command("list")
@guarded
def list_jobs(home: Home = None, as_json: Json = False) -> None:
    """List jobs, newest first."""
    from p2pnode.units import format_credits

    rows = ask("GET", "/v1/jobs")["jobs"]

    def text() -> str:
        cells = [
            (row["id"][:20], row["kind"], row["name"], row["items"], format_credits(row["spent_microcredits"]), _state(row))
            for row in rows
        ]
        return table(("job", "kind", "model or data", "items", "credits", "state"), cells, "no jobs yet")

    show(rows, text, as_json=as_json)


def _state(row: dict[str, Any]) -> str:
    return str(row["end_reason"] or (f"waits: {row['waits_for']}" if row["waits_for"] else row["state"]))


Id = Annotated[str, typer.Argument(help="The job's id or the beginning of it.")]


@app.command()
@guarded
def describe(job: Id, home: Home = None, as_json: Json = False) -> None:
    """Show everything that is known of a job."""
    data = ask("GET", f"/v1/jobs/{job}")
    show(data, lambda: facts(data.items()), as_json=as_json)


@app.command()
@guarded
def stop(job: Id, home: Home = None, as_json: Json = False) -> None:
    """End a job; what is in flight finishes and is paid."""
    data = ask("DELETE", f"/v1/jobs/{job}")
    show(data, lambda: f"stopped {data['stopped']}", as_json=as_json)


@app.command("why")
@guarded
def job_why(job: Id, home: Home = None, as_json: Json = False) -> None:
    """Say what a job waits for, and who refused it for which reason."""
    data = ask("GET", f"/v1/jobs/{job}/why")
    show(data, lambda: facts(data.items()), as_json=as_json)


@app.command()
@guarded
def history(job: Id, home: Home = None, as_json: Json = False) -> None:
    """Show what happened to a job, in order."""
    rows = ask("GET", f"/v1/jobs/{job}").get("history", [])
    show(
        rows,
        lambda: "\n".join(" ".join(f"{k}={v}" for k, v in row.items()) for row in rows) or "nothing happened yet",
        as_json=as_json,
    )

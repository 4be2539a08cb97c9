"""Models: look into a file, store it, list what is stored, free the disk."""

from pathlib import Path
from typing import Annotated, Any

import typer

from p2pnode.cli.ask import ask
from p2pnode.cli.output import Home, Json, facts, guarded, show, table

app = typer.Typer(help="Add, inspect, list and remove models.", no_args_is_help=True)


@app.command()
@guarded
def add(
    path: Annotated[Path, typer.Argument(help="An ONNX file; external data beside it is taken along.")],
    name: Annotated[str, typer.Option("--name", help="A name for lists; default: the file's.", envvar="P2PNODE_NAME")] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check a model in the sandbox and store it by its hash."""
    data = ask("POST", "/v1/models", {"path": str(path.absolute()), "name": name})
    show(data, lambda: f"{data['id']}  {data['name']}  {_size(data['size_bytes'])}", as_json=as_json)


@app.command()
@guarded
def inspect(
    model: Annotated[str, typer.Argument(help="A file, a stored model's id, or the beginning of one.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what a model takes and gives, what it costs to run, and how fast it is here."""
    if Path(model).is_file():
        model = ask("POST", "/v1/models", {"path": str(Path(model).absolute()), "name": ""})["id"]
    data = ask("GET", f"/v1/models/{model}")
    show(data, lambda: facts(_fact_rows(data)), as_json=as_json)


def _fact_rows(data: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in data.items():
        if name in ("inputs", "outputs"):
            rows += [
                (name.removesuffix("s"), " ".join(str(part) for part in item.values() if part not in (None, "")))
                for item in value
            ]
        else:
            rows.append((name.replace("_", " "), value))
    return rows


@app.command("list")
@guarded
def list_models(home: Home = None, as_json: Json = False) -> None:
    """List stored models."""
    rows = ask("GET", "/v1/models")["models"]

    def text() -> str:
        cells = [(row["id"], row["name"], _size(row["size_bytes"]), "complete" if row["complete"] else "partial") for row in rows]
        return table(("model", "name", "size", "state"), cells, "no models stored; `p2pnode model add FILE` stores one")

    show(rows, text, as_json=as_json)


@app.command()
@guarded
def remove(
    model: Annotated[str, typer.Argument(help="The model's id or the beginning of it.")], home: Home = None, as_json: Json = False
) -> None:
    """Remove a stored model."""
    data = ask("DELETE", f"/v1/models/{model}")
    show(data, lambda: f"freed {_size(data['freed_bytes'])}", as_json=as_json)


@guarded
def clean(
    keep: Annotated[
        str | None, typer.Option("--keep", help="How much to keep, such as 5GiB; default: the quota.", envvar="P2PNODE_KEEP")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Free disk: models beyond the quota, and the records of jobs that ended long ago. Says what was freed."""
    from p2pnode.units import parse_size

    data = ask("POST", "/v1/clean", {"bytes": parse_size(keep)} if keep else {})

    def text() -> str:
        lines = [f"freed {row['name'] or row['id']}, {_size(row['size_bytes'])}" for row in data["freed"]]
        return "\n".join([*lines, f"freed {_size(data['freed_bytes'])} in all, {data['jobs_removed']} old jobs"])

    show(data, text, as_json=as_json)


def _size(size_bytes: int) -> str:
    from p2pnode.units import format_size

    return format_size(size_bytes)

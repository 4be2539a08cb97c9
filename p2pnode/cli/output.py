"""What every command prints: tables and sentences for people, `--json` for programs, one-sentence errors with what to do."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.", envvar="P2PNODE_JSON")]
Home = Annotated[
    str | None,
    typer.Option("--home", help="Folder that holds identity and data; default: the system's own places.", envvar="P2PNODE_HOME"),
]


def guarded(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Turn errors into one sentence on standard error and a stable exit code."""

    @functools.wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> Returned:
        home = options.get("home")
        if home:
            os.environ["P2PNODE_HOME"] = str(home)
        try:
            return function(*arguments, **options)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except BaseException as error:  # every error ends as an exit code; a bug still shows its traceback under --debug
            raise typer.Exit(report(_first(error), as_json=bool(options.get("as_json")))) from None

    return run


def report(error: BaseException, *, as_json: bool) -> int:
    """Print an error and give its exit code."""
    from p2pnode.cli.exit_codes import ExitCode, advice, exit_code_of
    from p2pnode.errors import P2PNodeError

    code = exit_code_of(error)
    if code is ExitCode.INTERRUPTED:
        print("interrupted", file=sys.stderr)
        return int(code)
    hint = advice(error) if isinstance(error, P2PNodeError) else "This is a bug; set P2PNODE_DEBUG=1 to see where."
    reason = getattr(getattr(error, "reason", None), "value", None)
    message = str(error) or type(error).__name__
    if os.environ.get("P2PNODE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if as_json:
        print(json.dumps({"error": {"message": message, "reason": reason, "hint": hint, "exit_code": int(code)}}))
    else:
        ending = "" if message.endswith("\n") else " " if message.endswith(".") else ". "
        print(f"error: {message}{ending}{hint}", file=sys.stderr)
    return int(code)


def _first(error: BaseException) -> BaseException:
    """Give the first leaf of an exception group: nurseries wrap what one task raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def show(data: Any, text: Callable[[], str], *, as_json: bool) -> None:
    """Print `data` as JSON, or the text made for people."""
    print(json.dumps(data, indent=2, default=str) if as_json else text())


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], empty: str = "nothing to show") -> str:
    """Give left-aligned columns, wide enough for their longest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return empty
    widths = [max(len(row[i]) for row in [list(headings), *cells]) for i in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [headings, *cells]]
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Give `name  value` lines with aligned values."""
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in rows)

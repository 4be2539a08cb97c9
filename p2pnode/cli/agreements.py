"""Receipts and the ledger: what was bought and sold, and proof of it."""

from pathlib import Path
from typing import Annotated

import typer

from p2pnode.cli.ask import ask, ask_bytes
from p2pnode.cli.output import Home, Json, guarded, show, table

receipt_app = typer.Typer(help="List, export and verify receipts.", no_args_is_help=True)
ledger_app = typer.Typer(help="Show balances, cheques and entries.", no_args_is_help=True)


@receipt_app.command("list")
@guarded
def list_receipts(home: Home = None, as_json: Json = False) -> None:
    """List receipts, newest first."""
    rows = ask("GET", "/v1/receipts")["receipts"]

    def text() -> str:
        cells = [
            (row["id"][:20], row["role"], row["peer"][:21], row["calls"], row["credits"], "paid" if row["paid"] else "open")
            for row in rows
        ]
        return table(("receipt", "role", "peer", "calls", "credits", "state"), cells, "no receipts yet")

    show(rows, text, as_json=as_json)


@receipt_app.command("show")
@guarded
def export_receipt(
    receipt: Annotated[str, typer.Argument(help="The receipt's id or the beginning of it.")],
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: ID.receipt here.", envvar="P2PNODE_OUTPUT")
    ] = None,
    call: Annotated[int, typer.Option("--call", help="Which call of the slice, from 0.", envvar="P2PNODE_CALL")] = 0,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write a receipt with everything that proves it to one file, and show what it says."""
    data = ask_bytes("GET", f"/v1/receipts/{receipt}?call={call}")
    path = target or Path(f"{receipt.removeprefix('doc-')[:12]}-{call}.receipt")
    path.write_bytes(data)
    verify(path, home=None, as_json=as_json)


@receipt_app.command("verify")
@guarded
def verify(file: Annotated[Path, typer.Argument(help="A .receipt file.")], home: Home = None, as_json: Json = False) -> None:
    """Check a receipt from its file alone; each check is listed."""
    from p2pnode.cli.exit_codes import NotFound, VerificationFailed
    from p2pnode.market.receipt_file import verify_bundle

    if not file.is_file():
        raise NotFound(f"there is no file {file}")
    checks = verify_bundle(file.read_bytes())
    rows = [{"check": check.name, "ok": check.ok, "detail": check.detail} for check in checks]
    show(
        {"file": str(file), "valid": all(row["ok"] for row in rows), "checks": rows},
        lambda: table(("check", "", "detail"), [(row["check"], "ok" if row["ok"] else "FAILED", row["detail"]) for row in rows]),
        as_json=as_json,
    )
    failed = [str(row["check"]) for row in rows if not row["ok"]]
    if failed:
        raise VerificationFailed(f"{file} fails: {', '.join(failed)}")


@ledger_app.command()
@guarded
def balance(home: Home = None, as_json: Json = False) -> None:
    """Show every account's balance; the books are checked first."""
    from p2pnode.units import format_credits

    data = ask("GET", "/v1/ledger")
    show(
        data,
        lambda: table(
            ("account", "credits"),
            [(row["account"], format_credits(row["amount"])) for row in data["accounts"]],
            "the ledger is empty",
        ),
        as_json=as_json,
    )


@ledger_app.command()
@guarded
def cheques(home: Home = None, as_json: Json = False) -> None:
    """List cheques, newest first."""
    rows = ask("GET", "/v1/cheques")["cheques"]

    def text() -> str:
        columns = list(rows[0]) if rows else []
        return table(columns, [[str(row[name])[:24] for name in columns] for row in rows], "no cheques yet")

    show(rows, text, as_json=as_json)


@ledger_app.command()
@guarded
def export(target: Annotated[Path, typer.Argument(help="JSON file to write.")], home: Home = None, as_json: Json = False) -> None:
    """Write every entry of the ledger to a file."""
    import json

    entries = ask("GET", "/v1/ledger/entries")["entries"]
    target.write_text(json.dumps(entries, indent=1))
    show({"written": str(target), "entries": len(entries)}, lambda: f"wrote {len(entries)} entries to {target}", as_json=as_json)

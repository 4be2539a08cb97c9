"""Routes to what the node holds: models, receipts, and the ledger."""

import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import trio

from p2pnode.api.http import BYTES_TYPE, Answer, HttpError, Reply, Request, json_answer
from p2pnode.api.routes import Control, Route
from p2pnode.ids import DOCUMENT, MODEL, ModelId, id_text, matches_prefix, node_text, parse_id
from p2pnode.store import accounts, agreements
from p2pnode.store.jobs import remove_jobs
from p2pnode.units import format_credits

LISTED_MAX: Final = 1000


async def models(control: Control, request: Request) -> Reply:
    """List stored models."""
    rows = [
        {
            "id": id_text(MODEL, item.model_id),
            "name": item.name,
            "size_bytes": item.size_bytes,
            "used_ms": item.used_ms,
            "complete": not item.is_partial,
        }
        for item in control.node.models.list()
    ]
    return json_answer({"models": rows, "size_bytes": control.node.models.size_bytes()})


async def add_model(control: Control, request: Request) -> Reply:
    """Store a model from a file of this machine."""
    path = request.json().get("path")
    if not isinstance(path, str):
        raise HttpError(400, "bad-request", "path is missing", 'send {"path": "/full/path/of/model.onnx"}')
    if not Path(path).is_absolute():
        raise HttpError(400, "bad-request", "the path is not absolute", "the daemon runs in another folder; send the full path")
    if not await trio.Path(path).is_file():
        raise HttpError(404, "not-found", f"there is no file {path}", "check the path")
    model_id, manifest = await control.node.models.add_file(Path(path), str(request.json().get("name") or ""))
    size = sum(blob.size for blob in manifest.blobs)
    return json_answer({"id": id_text(MODEL, model_id), "name": manifest.name, "size_bytes": size}, 201)


async def describe_model(control: Control, request: Request) -> Reply:
    """Give one model's facts: inputs, outputs, cost, measured speed."""
    model_id = _model(control, request)
    facts = control.node.work.facts(model_id) or await control.node.work.prepare(model_id)
    return json_answer({"id": id_text(MODEL, model_id), **_plain_facts(facts)})


async def remove_model(control: Control, request: Request) -> Reply:
    """Remove a stored model."""
    freed = control.node.models.remove(_model(control, request))
    return json_answer({"freed_bytes": freed})


async def clean(control: Control, request: Request) -> Reply:
    """Free disk: models beyond the quota, or down to `bytes`; and jobs that ended long ago, with their history."""
    wanted = request.json().get("bytes")
    environment = control.node.environment
    before_ms = environment.clock.wall_ms() - round(control.node.config.storage.jobs_kept * 1000)
    jobs = await environment.database.write(lambda connection: remove_jobs(connection, before_ms))
    freed = control.node.models.clean(int(wanted) if wanted is not None else None)
    rows = [{"id": id_text(MODEL, item.model_id), "name": item.name, "size_bytes": item.size_bytes} for item in freed]
    return json_answer({"freed": rows, "freed_bytes": sum(item.size_bytes for item in freed), "jobs_removed": jobs})


async def receipts(control: Control, request: Request) -> Reply:
    """List receipts, newest first, with whether each is paid by a cheque."""

    def query(connection: sqlite3.Connection) -> list[dict[str, Any]]:
        rows = []
        for row in agreements.list_receipts(connection, limit=LISTED_MAX):
            agreement = agreements.get_agreement(connection, row.agreement)
            rows.append({
                "id": id_text(DOCUMENT, row.document),
                "agreement": id_text(DOCUMENT, row.agreement),
                "role": agreement.role if agreement else "",
                "peer": node_text(agreement.peer) if agreement else "",
                "model": id_text(MODEL, agreement.model_id) if agreement else "",
                "slice": row.slice,
                "calls": row.calls,
                "amount": row.amount,
                "credits": format_credits(row.amount),
                "ended_ms": row.ended_ms,
                "paid": agreements.get_cheque(connection, row.agreement, row.slice) is not None,
            })  # fmt: skip
        return rows

    return json_answer({"receipts": await control.node.environment.database.read(query)})


async def receipt_bundle(control: Control, request: Request) -> Reply:
    """Give a `.receipt` file that verifies by itself. Query `call`: the position in the slice, 0 by default."""
    text, place = request.path[2], request.query.get("call", "0")
    if not (place.isascii() and place.isdigit() and len(place) < 6):
        raise HttpError(400, "bad-request", "call must be a position in the slice, from 0")

    def query(connection: sqlite3.Connection) -> tuple[bytes, int]:
        listed = agreements.list_receipts(connection, limit=100_000)
        found = [row for row in listed if matches_prefix(DOCUMENT, row.document, text)]
        if len(found) != 1:
            told = f"{len(found) or 'no'} receipts start with {text!r}"
            raise HttpError(404, "not-found", told, "`p2pnode receipt list` shows them")
        calls = agreements.list_calls(connection, found[0].agreement, slice_number=found[0].slice)
        if int(place) >= len(calls):
            raise HttpError(404, "not-found", f"the receipt has {len(calls)} calls", "choose a smaller position")
        return found[0].agreement, calls[int(place)].number

    agreement, number = await control.node.environment.database.read(query)
    bundle = await control.node.market.receipt(agreement, number)
    if bundle is None:
        raise HttpError(404, "not-found", "this call has no receipt yet", "try again when its slice is signed")
    return Answer(200, bundle, BYTES_TYPE)


async def ledger(control: Control, request: Request) -> Reply:
    """Give the balance of every account and what each peer owes; the books are checked first."""

    def query(connection: sqlite3.Connection) -> dict[str, Any]:
        accounts.check_balanced(connection)
        return {
            "accounts": [asdict(row) for row in accounts.balances(connection)],
            "agreements_open": len(agreements.list_agreements(connection, is_ended=False)),
        }

    return json_answer(await control.node.environment.database.read(query))


async def export(control: Control, request: Request) -> Reply:
    """Give every entry of the ledger."""
    rows = await control.node.environment.database.read(
        lambda connection: [asdict(row) for row in accounts.export_rows(connection)]
    )
    return json_answer({"entries": rows})


async def cheques(control: Control, request: Request) -> Reply:
    """List cheques, newest first."""
    rows = await control.node.environment.database.read(
        lambda connection: [asdict(row) for row in agreements.list_cheques(connection, limit=LISTED_MAX)]
    )
    return json_answer({"cheques": rows})


def _model(control: Control, request: Request) -> ModelId:
    text = request.path[2]
    try:
        return ModelId(parse_id(MODEL, text))
    except ValueError:
        found = [item.model_id for item in control.node.models.list() if matches_prefix(MODEL, item.model_id, text)]
    if len(found) != 1:
        raise HttpError(404, "not-found", f"{len(found) or 'no'} models start with {text!r}", "`p2pnode model list` shows them")
    return found[0]


def _plain_facts(facts: Any) -> dict[str, Any]:
    return dict(asdict(facts))


BOOK_ROUTES: Final = (
    Route("GET", "/v1/models", models),
    Route("POST", "/v1/models", add_model),
    Route("GET", "/v1/models/{id}", describe_model),
    Route("DELETE", "/v1/models/{id}", remove_model),
    Route("POST", "/v1/clean", clean),
    Route("GET", "/v1/receipts", receipts),
    Route("GET", "/v1/receipts/{id}", receipt_bundle),
    Route("GET", "/v1/ledger", ledger),
    Route("GET", "/v1/ledger/entries", export),
    Route("GET", "/v1/cheques", cheques),
)

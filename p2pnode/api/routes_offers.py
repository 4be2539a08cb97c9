"""Routes to what is on sale: the offers of linked peers, and searches over everything known."""

from typing import Any, Final

import msgspec

from p2pnode.api.http import HttpError, Reply, Request, json_answer
from p2pnode.api.routes import Control, Route
from p2pnode.ids import MODEL, id_text, node_text
from p2pnode.market.query import DEFAULT_FILTER, DEFAULT_ORDER, Answer
from p2pnode.market.query_fields import FIELDS

LIMIT_DEFAULT: Final = 50


async def offers(control: Control, request: Request) -> Reply:
    """Ask every linked peer for its offer and list what is on sale."""
    links = list(control.node.transport.links().values())
    signed = await control.node.market.fetch_offers(links)
    return json_answer({"offers": [_offer(item) for _, item in sorted(signed.items())]})


async def search(control: Control, request: Request) -> Reply:
    """Search the offers that this node knows. Query: `q`, `order`, `limit`, `explain=1`; `default=0`: without the safe filter."""
    market, wanted = control.node.market, request.query
    limit = wanted.get("limit", str(LIMIT_DEFAULT))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6):
        raise HttpError(400, "bad-request", "limit must be a number of offers", "leave it out for 50")
    if not market.finding.listings():
        # A node that has just started has heard no gossip yet: its neighbours at least can be asked.
        await market.fetch_offers(list(control.node.transport.links().values()))
    explain, use_default = wanted.get("explain") == "1", wanted.get("default") != "0"
    order = wanted.get("order", "")
    answer = market.finding.search(
        wanted.get("q", ""), order, limit=int(limit), explain=explain, use_default=use_default
    )  # fmt: skip
    told = {
        "offers": [{"provider": node_text(found.listed.provider), **found.values} for found in answer.found],
        "seen": answer.seen,
        "fitting": answer.fitting,
        "order": order or DEFAULT_ORDER,
        "default_filter": DEFAULT_FILTER if use_default else "",
    }
    return json_answer({**told, **_explanation(answer)} if explain else told)


async def fields(control: Control, request: Request) -> Reply:
    """List the fields of searches."""
    rows = [
        {"name": known.name, "kind": known.sort.value, "unit": known.unit, "source": known.source.value, "meaning": known.meaning}
        for known in FIELDS.values()
    ]
    return json_answer({"fields": rows})


def _explanation(answer: Answer) -> dict[str, Any]:
    return {
        "sources": dict(answer.sources),
        "exclusions": [
            {"condition": each.source, "is_default": each.is_default, "excluded": each.excluded, "alone": each.alone}
            for each in answer.exclusions
        ],
    }


def _offer(signed: Any) -> dict[str, Any]:
    offer: dict[str, Any] = msgspec.to_builtins(signed.offer, builtin_types=(bytes,))
    offer["models"] = [id_text(MODEL, model_id) for model_id in offer["models"]]
    return {"provider": node_text(signed.provider), **offer}


OFFER_ROUTES: Final = (
    Route("GET", "/v1/offers", offers),
    Route("GET", "/v1/offers/search", search),
    Route("GET", "/v1/offers/fields", fields),
)

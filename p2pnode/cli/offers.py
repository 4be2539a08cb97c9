"""What is on sale: the offers of connected peers, and searches over all that the network has told."""

from typing import Annotated, Any, Final

import typer

from p2pnode.cli.ask import ask
from p2pnode.cli.output import Home, Json, guarded, show, table

app = typer.Typer(help="Show and search what is on sale.", no_args_is_help=True)
PEERS_SECONDS: Final = 4.0


@app.command("list")
@guarded
def list_offers(home: Home = None, as_json: Json = False) -> None:
    """List what connected peers sell, cheapest first; `offers search` knows more."""
    rows = ask("GET", "/v1/offers", peers_seconds=PEERS_SECONDS)["offers"]
    rows.sort(key=lambda row: (row["operations_price"], row["call_price"]))

    def text() -> str:
        return table(
            ("provider", "price/10^9 ops", "price/call", "processor", "cores", "memory", "GPUs", "sandbox", "region"),
            [_offer_cells(row) for row in rows],
            "no offers: no connected peer sells anything",
        )

    show(rows, text, as_json=as_json)


@app.command("search")
@guarded
def search_offers(
    query: Annotated[str, typer.Argument(help="Such as 'vram>=8 price<0.2 region=eu'; nothing finds all.")] = "",
    order: Annotated[
        str, typer.Option("--order", "-o", help="Fields to sort by, a minus for downwards.", envvar="P2PNODE_OFFERS_ORDER")
    ] = "price",
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=10_000, help="How many to show.", envvar="P2PNODE_OFFERS_LIMIT")
    ] = 50,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say what excluded the others and whose word the values are.", envvar="P2PNODE_EXPLAIN"),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--no-default", "--all", "-n", help="Leave the safe filter out.", envvar="P2PNODE_OFFERS_ALL")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Search all that is known to be on sale, behind a safe filter unless `--no-default`; `offers fields` lists the fields."""
    from urllib.parse import urlencode

    asked = {"q": query, "order": order, "limit": limit, "explain": int(explain), "default": int(not everything)}
    answer = ask("GET", f"/v1/offers/search?{urlencode(asked)}", peers_seconds=PEERS_SECONDS)
    show(answer, lambda: _found(answer, explain), as_json=as_json)


@app.command("fields")
@guarded
def list_fields(home: Home = None, as_json: Json = False) -> None:
    """List the fields that `offers search` knows: kind, unit, whose word it is, meaning."""
    from p2pnode.market.query_fields import FIELDS

    rows = [(each.name, each.sort.value, each.unit, each.source.value, each.meaning) for each in FIELDS.values()]
    names = ("field", "kind", "unit", "word of", "meaning")
    show([dict(zip(names, row, strict=True)) for row in rows], lambda: table(names, rows), as_json=as_json)


def _found(answer: dict[str, Any], explain: bool) -> str:
    rows = answer["offers"]
    names = list(rows[0]) if rows else []
    empty = "nothing is known to be on sale" if not answer["seen"] else f"none of {answer['seen']} offers fits"
    hint = "" if explain or not answer["seen"] else "; --explain says why"
    shown = table(names, [[_cell(name, row[name]) for name in names] for row in rows], empty + hint)
    lines = [shown, f"{len(rows)} of {answer['fitting']} that fit, {answer['seen']} known"] if rows else [shown]
    if answer["default_filter"] and not explain:
        lines[-1] += "; the safe filter is on, --no-default takes it off"
    if explain:
        lines += ["", _excluded(answer), "", _sources(answer)]
    return "\n".join(lines)


def _excluded(answer: dict[str, Any]) -> str:
    rows = [
        (each["condition"], "safe filter" if each["is_default"] else "query", each["excluded"], each["alone"])
        for each in answer["exclusions"]
    ]
    return table(("condition", "from", "excluded first", "excluded alone"), rows, "no condition excluded anything")


def _sources(answer: dict[str, Any]) -> str:
    by_source: dict[str, list[str]] = {}
    for name, source in answer["sources"].items():
        by_source.setdefault(source, []).append(name)
    words = {"offer": "the provider's own word", "own": "what this node has seen", "monitors": "the word of its monitors"}
    return "\n".join(f"{words[source]}: {', '.join(names)}" for source, names in by_source.items())


def _offer_cells(row: dict[str, Any]) -> list[str]:
    from p2pnode.units import format_credits, format_size

    hardware = row["hardware"]
    return [
        row["provider"][:21], format_credits(row["operations_price"]), format_credits(row["call_price"]), hardware["cpu_model"],
        str(hardware["cpu_cores"]), format_size(hardware["memory_bytes"]), _cell("", hardware["gpus"]), row["sandbox"],
        _cell("", row["region"]),
    ]  # fmt: skip


def _cell(name: str, value: Any) -> str:
    if name == "provider":
        return str(value)[:21]
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "?" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) or "-"

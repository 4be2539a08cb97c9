"""Who is out there and what they sell."""

from typing import Annotated, Any

import typer

from p2pnode.cli.ask import ask
from p2pnode.cli.output import Home, Json, guarded, show, table

net_app = typer.Typer(help="Show peers and add one by address.", no_args_is_help=True)
offers_app = typer.Typer(help="Show what is on sale.", no_args_is_help=True)
PEERS_SECONDS = 4.0


@net_app.command()
@guarded
def peers(home: Home = None, as_json: Json = False) -> None:
    """List known peers: where they are, how they were found, and why one is not connected."""
    rows = ask("GET", "/v1/peers", peers_seconds=PEERS_SECONDS)["peers"]

    def text() -> str:
        columns = list(rows[0]) if rows else []
        cells = [[_cell(row[name]) for name in columns] for row in rows]
        return table(columns, cells, "no peers yet: is another node up? `p2pnode net add HOST:PORT` names one")

    show(rows, text, as_json=as_json)


@net_app.command()
@guarded
def add(
    address: Annotated[str, typer.Argument(help="host:port, or node-…@host:port to insist on that node.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Add a peer by address, now and after every start."""
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config, set_setting

    config = load_config()
    known = [peer for peer in config.as_text()["network.static_peers"].split(",") if peer]
    if address not in known:
        set_setting("network.static_peers", ",".join([*known, address]))
    client = ControlClient(config.data_folder)
    if client.alive():
        client.post("/v1/config/reload", {})
    show({"added": address}, lambda: f"added {address}", as_json=as_json)


@offers_app.command("list")
@guarded
def list_offers(home: Home = None, as_json: Json = False) -> None:
    """List what connected peers sell, cheapest first."""
    rows = ask("GET", "/v1/offers", peers_seconds=PEERS_SECONDS)["offers"]
    rows.sort(key=lambda row: (row["operations_price"], row["call_price"]))

    def text() -> str:
        return table(
            ("provider", "price/10^9 ops", "price/call", "processor", "cores", "memory", "GPUs", "sandbox", "region"),
            [_offer_cells(row) for row in rows],
            "no offers: no connected peer sells anything",
        )

    show(rows, text, as_json=as_json)


def _offer_cells(row: dict[str, Any]) -> list[str]:
    from p2pnode.units import format_credits, format_size

    hardware = row["hardware"]
    return [
        row["provider"][:21], format_credits(row["operations_price"]), format_credits(row["call_price"]), hardware["cpu_model"],
        str(hardware["cpu_cores"]), format_size(hardware["memory_bytes"]), _cell(hardware["gpus"]), row["sandbox"],
        _cell(row["region"]),
    ]  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ",".join(f"{key}:{item}" for key, item in value.items()) or "-"
    return "-" if value in (None, "") else f"{value:.3g}" if isinstance(value, float) else str(value)

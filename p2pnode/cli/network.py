"""Who is out there and what they sell."""

from typing import Annotated, Any

import typer

from p2pnode.cli.ask import ask
from p2pnode.cli.output import Home, Json, guarded, show, table

net_app = typer.Typer(help="Show peers, join a network or invite to it, and look for what is wrong.", no_args_is_help=True)
PEERS_SECONDS = 4.0


@net_app.command()
@guarded
def peers(home: Home = None, as_json: Json = False) -> None:
    """List known peers: where they are, why a link is kept, and why each is in or out of the routing table."""
    rows = ask("GET", "/v1/peers", peers_seconds=PEERS_SECONDS)["peers"]

    def text() -> str:
        return table(
            ("peer", "link", "kept for", "routing table", "address", "heard by", "reached", "failures", "score", "banned"),
            [_peer_cells(row) for row in rows],
            "no peers yet: is another node up? `p2pnode net add HOST:PORT` names one, `p2pnode net doctor` looks for causes",
        )

    show(rows, text, as_json=as_json)


@net_app.command()
@guarded
def add(
    address: Annotated[str, typer.Argument(help="host:port, or node-…@host:port to insist on that node.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Add a peer by address, now and after every start."""
    from p2pnode.node.config import load_config, set_setting

    config = load_config()
    known = [peer for peer in config.as_text()["network.static_peers"].split(",") if peer]
    if address not in known:
        set_setting("network.static_peers", ",".join([*known, address]))
    _reload(config)
    show({"added": address}, lambda: f"added {address}", as_json=as_json)


@net_app.command()
@guarded
def doctor(home: Home = None, as_json: Json = False) -> None:
    """Look for what is wrong with this node's place in the network; each finding says what corrects it.

    The exit code is 16 when something fails. Without a daemon a node is started for the question.
    """
    from p2pnode.cli.exit_codes import ExitCode
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config

    is_daemon = ControlClient(load_config().data_folder).alive()
    answer = ask("GET", f"/v1/net/doctor?daemon={int(is_daemon)}", peers_seconds=PEERS_SECONDS)

    def text() -> str:
        lines = []
        for finding in answer["findings"]:
            lines.append(f"{finding['state']:4}  {finding['what']}: {finding['evidence']}")
            if finding["fix"] and finding["state"] != "ok":
                lines.append(f"      → {finding['fix']}")
        return "\n".join(lines)

    show(answer, text, as_json=as_json)
    if answer["failing"]:
        raise typer.Exit(int(ExitCode.UNHEALTHY))


@net_app.command()
@guarded
def invite(
    address: Annotated[
        str, typer.Option("--address", help="HOST:PORT to invite to, not this node's own.", envvar="P2PNODE_INVITE_ADDRESS")
    ] = "",
    valid: Annotated[
        str, typer.Option("--valid", help="For how long, such as 2d; without it for ever.", envvar="P2PNODE_INVITE_VALID")
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Print a link with which others join this node's network: `p2pnode net join LINK` on their machine."""
    from urllib.parse import urlencode

    from p2pnode.cli.daemon import control

    control()  # only the running daemon knows at which port it listens and where it was reached
    answer = ask("GET", f"/v1/net/invite?{urlencode({'address': address, 'valid': valid})}")

    def text() -> str:
        reached = "" if answer["reached_at"] else "\nNobody has reached this node from outside yet; see `p2pnode net doctor`."
        return f"{answer['link']}\n\nnetwork {answer['network']}, at {', '.join(answer['addresses'])}{reached}"

    show(answer, text, as_json=as_json)


@net_app.command()
@guarded
def join(
    link: Annotated[str, typer.Argument(help="What `p2pnode net invite` printed on another machine.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Join a network by somebody's link: check it, remember it as a bootstrap node, and connect now."""
    import time

    from p2pnode.cli.exit_codes import ExitCode
    from p2pnode.discovery.peers.invitations import check_invitation, parse_link
    from p2pnode.ids import NodeId
    from p2pnode.node.config import load_config, set_setting

    config = load_config()
    invitation = parse_link(link)
    # Its own id is checked by the node, which alone needs the key for it.
    check_invitation(invitation, NodeId(b""), config.network.id, round(time.time() * 1000))  # noqa: TID251 - outside any node
    answer = ask("POST", "/v1/net/join", {"link": link})
    known = list(config.network.bootstrap)
    added = [entry for entry in invitation.entries() if entry not in known]
    if added:
        set_setting("network.bootstrap", ",".join([*known, *added]))
        _reload(config)
    answer["added"] = added
    show(answer, lambda: f"{answer['node']}: {answer['what']}" + _kept(added), as_json=as_json)
    if not answer["is_connected"]:
        raise typer.Exit(int(ExitCode.UNREACHABLE))


@net_app.command()
@guarded
def bootstrap(
    remove: Annotated[
        str, typer.Option("--remove", help="Take this entry out of the settings.", envvar="P2PNODE_BOOTSTRAP_REMOVE")
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the peers asked first, those named in files included; none is built in."""
    from p2pnode.errors import ConfigError
    from p2pnode.node.config import load_config, set_setting
    from p2pnode.node.layer_settings import bootstrap_entries

    config = load_config()
    if remove:
        kept = [entry for entry in config.network.bootstrap if entry != remove]
        if len(kept) == len(config.network.bootstrap):
            raise ConfigError(f"{remove} is not among network.bootstrap; entries of a file are removed in the file")
        set_setting("network.bootstrap", ",".join(kept))
        _reload(config)
        config = load_config()
    entries = bootstrap_entries(config)
    empty = "no entries: `p2pnode net join LINK` adds one, `p2pnode config set network.bootstrap file:PATH` a whole list"
    show({"bootstrap": list(entries)}, lambda: "\n".join(entries) or empty, as_json=as_json)


@net_app.command()
@guarded
def lookup(
    node_id: Annotated[str, typer.Argument(help="A node id, such as `p2pnode net peers` prints.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find a node in the hash table by its id, or the nodes nearest to it."""
    from urllib.parse import quote

    answer = ask("GET", f"/v1/net/lookup?id={quote(node_id)}", peers_seconds=PEERS_SECONDS)

    def text() -> str:
        rows = [(each["node"], _cell(each["addresses"])) for each in answer["nearest"]]
        found = "found" if answer["found"] else "not found; the nearest that answer"
        head = f"{found} ({answer['hops']} hops, {answer['asked']} asked, {answer['failed']} silent, {answer['seconds']} s)"
        return f"{head}\n{table(('node', 'addresses'), rows, 'nobody answered')}"

    show(answer, text, as_json=as_json)


def _reload(config: Any) -> None:
    """Tell a running daemon that the settings have changed."""
    from p2pnode.control.client import ControlClient

    client = ControlClient(config.data_folder)
    if client.alive():
        client.post("/v1/config/reload", {})


def _peer_cells(row: dict[str, Any]) -> list[str]:
    link = "-" if not row["connected"] else "in" if row["inbound"] else "out"
    ago = row["connected_seconds_ago"]
    banned = f"{row['banned_for']}, {row['banned_seconds']:.0f} s" if row["banned_seconds"] else "-"
    return [
        row["node_id"][:21], link, _cell(row["kept_for"]), row["table"], row["addresses"][0] if row["addresses"] else "-",
        _cell(row["sources"]), "never" if ago is None else f"{ago:.0f} s ago", str(row["failures"]), f"{row['score']:g}", banned,
    ]  # fmt: skip


def _kept(added: list[str]) -> str:
    return f"\nkept in network.bootstrap: {', '.join(added)}" if added else "\nit was in network.bootstrap already"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ",".join(f"{key}:{item}" for key, item in value.items()) or "-"
    return "-" if value in (None, "") else f"{value:.3g}" if isinstance(value, float) else str(value)

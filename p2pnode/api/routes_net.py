"""Routes about the node's place in the network: peers, links that invite, look-ups, and what is wrong with it."""

from p2pnode.api.http import HttpError, Reply, Request, json_answer
from p2pnode.api.routes import Control, Route
from p2pnode.discovery.doctor import is_failing
from p2pnode.node.checkup import check_up
from p2pnode.node.joining import invite, join, look_up
from p2pnode.node.layer_settings import bootstrap_entries
from p2pnode.units import parse_duration


async def peers(control: Control, request: Request) -> Reply:
    """List known peers: where they are, why a link with one is kept, and why it is in or out of the routing table."""
    return json_answer({"peers": [peer.as_json() for peer in control.node.discovery.peers()]})


async def add_peer(control: Control, request: Request) -> Reply:
    """Add a peer by address until the next start."""
    control.node.discovery.add_peer(_text(request, "address", "HOST:PORT"))
    return json_answer({"added": request.json()["address"]})


async def doctor(control: Control, request: Request) -> Reply:
    """Examine the node's place in the network; `daemon=0` says that it was started for this question alone."""
    findings = await check_up(control.node, is_daemon=request.query.get("daemon", "1") != "0")
    return json_answer({"failing": is_failing(findings), "findings": [finding.as_json() for finding in findings]})


async def invitation(control: Control, request: Request) -> Reply:
    """Give a link that invites to this node; `address` instead of its own, `valid` for so long."""
    try:
        seconds = parse_duration(request.query["valid"]) if request.query.get("valid") else 0.0
    except ValueError as error:
        raise HttpError(400, "bad-request", str(error)) from error
    return json_answer(invite(control.node, request.query.get("address", ""), seconds))


async def join_link(control: Control, request: Request) -> Reply:
    """Dial the node that a link invites to, and use it as a bootstrap node until the next start."""
    return json_answer(await join(control.node, _text(request, "link", "p2pnode://…")))


async def look(control: Control, request: Request) -> Reply:
    """Find a node, or the nodes nearest to an id, in the hash table."""
    return json_answer(await look_up(control.node, request.query.get("id", "")))


async def bootstrap(control: Control, request: Request) -> Reply:
    """List the bootstrap entries in force, those of files included."""
    return json_answer({"bootstrap": list(bootstrap_entries(control.node.config))})


def _text(request: Request, name: str, example: str) -> str:
    value = request.json().get(name)
    if not isinstance(value, str):
        raise HttpError(400, "bad-request", f"{name} is missing", f'send {{"{name}": "{example}"}}')
    return value


NET_ROUTES = (
    Route("GET", "/v1/peers", peers),
    Route("POST", "/v1/peers", add_peer),
    Route("GET", "/v1/net/doctor", doctor),
    Route("GET", "/v1/net/invite", invitation),
    Route("POST", "/v1/net/join", join_link),
    Route("GET", "/v1/net/lookup", look),
    Route("GET", "/v1/net/bootstrap", bootstrap),
)

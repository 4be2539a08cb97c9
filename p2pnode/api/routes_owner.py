"""Routes by which the owner looks at the node and stays in charge of it."""

import trio

from p2pnode.api.http import TEXT_TYPE, Answer, HttpError, Reply, Request, json_answer
from p2pnode.api.routes import Control, Route
from p2pnode.metrics import CATALOGUE
from p2pnode.node.config import SETTINGS, find_setting, set_setting
from p2pnode.units import parse_duration


async def alive(control: Control, request: Request) -> Reply:
    """Say that the daemon answers."""
    return json_answer({"node": control.node.status()["node"], "stopping": control.node.is_stopping})


async def index(control: Control, request: Request) -> Reply:
    """List the routes."""
    from p2pnode.api.routes import all_routes

    return json_answer({"routes": [f"{route.method} {route.path}" for route in all_routes().rows]})


async def status(control: Control, request: Request) -> Reply:
    """Give how the node is."""
    return json_answer(control.node.status())


async def why(control: Control, request: Request) -> Reply:
    """Give what stands in the way of work."""
    return json_answer(control.node.why())


async def pause(control: Control, request: Request) -> Reply:
    """Take no new work for a while."""
    seconds = request.json().get("seconds", request.json().get("duration"))
    if isinstance(seconds, str):
        try:
            seconds = parse_duration(seconds)
        except ValueError as error:
            raise HttpError(400, "bad-request", str(error)) from error
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e9):
        raise HttpError(400, "bad-request", "seconds must be a number above 0, or null for no end")
    control.node.pause(seconds)
    return json_answer({"state": control.node.state(), "seconds": seconds})


async def resume(control: Control, request: Request) -> Reply:
    """Take work again."""
    control.node.resume()
    return json_answer({"state": control.node.state()})


async def drain(control: Control, request: Request) -> Reply:
    """Take no new agreements, finish the open ones."""
    control.node.drain()
    return json_answer({"state": control.node.state()})


async def stop(control: Control, request: Request) -> Reply:
    """Stop the daemon in order. The answer leaves first."""
    if control.nursery is not None:
        control.nursery.start_soon(_stop_soon, control)
    return json_answer({"state": "stopping"})


async def _stop_soon(control: Control) -> None:
    await trio.sleep(0.05)
    control.daemon.stop()


async def config(control: Control, request: Request) -> Reply:
    """Give the settings in force, in human units."""
    values = control.node.config.as_text()
    wanted = request.query.get("name", "")
    rows = [
        {"name": row.name, "value": values[row.name], "doc": row.doc, "live": row.live}
        for row in SETTINGS
        if row.name.startswith(wanted)
    ]
    return json_answer({"settings": rows})


async def change_config(control: Control, request: Request) -> Reply:
    """Write settings to the file and apply those that can be; all names are checked before anything is written."""
    changes = {name: str(value) for name, value in request.json().items()}
    for name in changes:
        find_setting(name)
    for name, value in changes.items():
        set_setting(name, value)
    return json_answer(control.daemon.reload())


async def reload_config(control: Control, request: Request) -> Reply:
    """Read the settings again."""
    return json_answer(control.daemon.reload())


async def metrics(control: Control, request: Request) -> Reply:
    """Give every counter in Prometheus' text format."""
    lines: list[str] = []
    told: set[str] = set()
    for series, value in control.node.metrics.snapshot().items():
        name, _, label = series.partition("{")
        known = name if name in CATALOGUE else name.rpartition("_")[0]
        if known not in told:
            told.add(known)
            lines.append(f"# HELP p2pnode_{known} {CATALOGUE[known]}")
        text = label.rstrip("}").replace("\\", "\\\\").replace('"', '\\"')
        labels = f'{{label="{text}"}}' if text else ""
        lines.append(f"p2pnode_{name}{labels} {value:g}")
    return Answer(200, ("\n".join(lines) + "\n").encode(), TEXT_TYPE)


OWNER_ROUTES = (
    Route("GET", "/v1", index),
    Route("GET", "/v1/alive", alive),
    Route("GET", "/v1/status", status),
    Route("GET", "/v1/why", why),
    Route("POST", "/v1/pause", pause),
    Route("POST", "/v1/resume", resume),
    Route("POST", "/v1/drain", drain),
    Route("POST", "/v1/stop", stop),
    Route("GET", "/v1/config", config),
    Route("PATCH", "/v1/config", change_config),
    Route("POST", "/v1/config/reload", reload_config),
    Route("GET", "/v1/metrics", metrics),
)

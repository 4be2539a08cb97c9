"""The owner's own node: start and stop it, look at it, and stay in charge of it."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from p2pnode.cli.output import Home, Json, facts, guarded, show


def control() -> Any:
    """Give a client of the running daemon's control API. Raises NotRunning."""
    from p2pnode.cli.exit_codes import NotRunning
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config

    client = ControlClient(load_config().data_folder)
    if not client.alive():
        raise NotRunning("no p2pnode daemon is running here")
    return client


@guarded
def up(
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay in this terminal and log to it.", envvar="P2PNODE_FOREGROUND")
    ] = False,
    wait: Annotated[float, typer.Option("--wait", help="Seconds to wait until the daemon answers.", envvar="P2PNODE_WAIT")] = 30,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Start the daemon."""
    from p2pnode.cli.exit_codes import AlreadyRunning
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config

    config = load_config()
    client = ControlClient(config.data_folder)
    if client.alive():
        raise AlreadyRunning("a p2pnode daemon already runs on this data folder")
    if foreground:
        from p2pnode.api.server import ControlServer
        from p2pnode.node.main import run_daemon

        run_daemon(config, ControlServer)
        return
    _start_in_background(config, client, wait)
    show_status(client.get("/v1/status"), as_json=as_json)


def _start_in_background(config: Any, client: Any, wait: float) -> None:
    import subprocess
    import sys
    import time

    from p2pnode.errors import ConfigError, TooSlow

    log = config.data_folder / "daemon.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "p2pnode.cli.main", "up", "--foreground"],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + wait  # noqa: TID251 - the command line runs outside any node
    while not client.alive():
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was logged"]
            raise ConfigError(f"the daemon stopped at once: {last[0].removeprefix('error: ')} (log: {log})")
        if time.monotonic() > deadline:  # noqa: TID251
            raise TooSlow(f"the daemon did not answer within {wait:g} s; its log is {log}")
        time.sleep(0.1)  # noqa: TID251


@guarded
def down(home: Home = None, as_json: Json = False) -> None:
    """Stop the daemon: finish the replies under way, say goodbye, close the books."""
    import time

    client = control()
    client.post("/v1/stop", {})
    for _ in range(300):
        if not client.alive():
            break
        time.sleep(0.1)  # noqa: TID251 - the command line runs outside any node
    show({"stopped": not client.alive()}, lambda: "stopped" if not client.alive() else "stopping", as_json=as_json)


@guarded
def status(home: Home = None, as_json: Json = False) -> None:
    """Show what the daemon offers, who is connected, what runs, and what was earned and spent."""
    show_status(control().get("/v1/status"), as_json=as_json)


def show_status(data: dict[str, Any], *, as_json: bool) -> None:
    """Print a status answer: one line a fact, those of a layer under its name."""
    show(data, lambda: facts(_rows(data)), as_json=as_json)


def _rows(data: dict[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    for name, value in data.items():
        label = indent + name.replace("_", " ")
        if isinstance(value, dict) and value:
            yield label, ""
            yield from _rows(value, indent + "  ")
        else:
            yield label, _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_cell(item)}" for name, item in value.items()) or "none"
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@guarded
def pause(
    duration: Annotated[str | None, typer.Argument(help="For how long, such as 2h; without it until `resume`.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take no new work. What was accepted is finished."""
    from p2pnode.units import format_duration, parse_duration

    seconds = parse_duration(duration) if duration else None
    answer = control().post("/v1/pause", {"seconds": seconds})
    show(answer, lambda: f"paused {'for ' + format_duration(seconds) if seconds else 'until `p2pnode resume`'}", as_json=as_json)


@guarded
def resume(home: Home = None, as_json: Json = False) -> None:
    """Take work again."""
    show(control().post("/v1/resume", {}), lambda: "taking work", as_json=as_json)


@guarded
def drain(home: Home = None, as_json: Json = False) -> None:
    """Take no new agreements, finish the open ones, and say when the machine is free."""
    answer = control().post("/v1/drain", {})
    show(answer, lambda: "draining: open agreements finish, no new ones begin (`p2pnode status` shows how many)", as_json=as_json)


@guarded
def why(home: Home = None, as_json: Json = False) -> None:
    """Say why there is no work, or what was refused and why."""
    answer = control().get("/v1/why")
    show(answer, lambda: "\n".join(answer.get("sentences", [])) or "nothing stands in the way of work", as_json=as_json)

"""Settings and identity: read and changed on disk, applied live when the daemon runs."""

from pathlib import Path
from typing import Annotated

import typer

from p2pnode.cli.output import Home, Json, facts, guarded, show, table

config_app = typer.Typer(help="Show and change settings.", no_args_is_help=True)
identity_app = typer.Typer(help="Show, back up and restore this node's identity.", no_args_is_help=True)


@config_app.command("show")
@guarded
def show_config(
    name: Annotated[str | None, typer.Argument(help="A setting or the start of its name.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show settings, their values and what they mean."""
    from p2pnode.cli.exit_codes import NotFound
    from p2pnode.node.config import SETTINGS, load_config

    values = load_config().as_text()
    chosen = [s for s in SETTINGS if name is None or s.name.startswith(name)]
    if not chosen:
        raise NotFound(f"no setting is called {name!r}")
    rows = [(s.name, values[s.name], s.doc) for s in chosen]
    show({n: v for n, v, _ in rows}, lambda: table(("setting", "value", "meaning"), rows), as_json=as_json)


@config_app.command("set")
@guarded
def set_config(
    name: Annotated[str, typer.Argument(help="The setting, such as provide.price.")],
    value: Annotated[str, typer.Argument(help="Its value, in human units.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Change a setting. A running daemon applies it at once where it can, and says where it cannot."""
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config, set_setting

    setting = set_setting(name, value)
    client = ControlClient(load_config().data_folder)
    running = client.alive()
    if running:
        client.post("/v1/config/reload", {})
    applied = "now" if running and setting.live else "when the daemon starts again" if running else "when the daemon starts"
    show({"name": name, "value": value, "applies": applied}, lambda: f"{name} = {value}, applies {applied}", as_json=as_json)


@config_app.command("path")
@guarded
def config_path(home: Home = None, as_json: Json = False) -> None:
    """Show where settings, identity and data are kept."""
    from p2pnode.node.config import load_config

    config = load_config()
    places = {
        "settings": str(config.config_folder / "config.toml"),
        "identity": str(config.config_folder),
        "data": str(config.data_folder),
    }
    show(places, lambda: facts(places.items()), as_json=as_json)


@identity_app.command("show")
@guarded
def show_identity(home: Home = None, as_json: Json = False) -> None:
    """Show this node's id, making an identity first if there is none."""
    from p2pnode.ids import node_text
    from p2pnode.node.config import load_config
    from p2pnode.node.identity import load_or_create
    from p2pnode.node.machine import SystemEntropy

    config = load_config()
    identity = load_or_create(config, SystemEntropy())
    data = {"node": node_text(identity.node_id), "public_key": identity.public_key.hex(), "folder": str(config.config_folder)}
    show(data, lambda: facts(data.items()), as_json=as_json)


@identity_app.command("backup")
@guarded
def backup_identity(
    target: Annotated[Path, typer.Argument(help="File to write; keep it as safe as money.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.", envvar="P2PNODE_FORCE")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Copy the identity to a file that only you can read."""
    from p2pnode.node.config import load_config
    from p2pnode.node.identity import backup

    backup(load_config(), target, force=force)
    show({"written": str(target)}, lambda: f"wrote {target}; never run two nodes on one identity", as_json=as_json)


@identity_app.command("restore")
@guarded
def restore_identity(
    source: Annotated[Path, typer.Argument(help="A file written by `identity backup`.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the identity that is here.", envvar="P2PNODE_FORCE")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take the identity in a backup as this node's own. The old machine must not run it any more."""
    from p2pnode.ids import node_text
    from p2pnode.node.config import load_config
    from p2pnode.node.identity import restore

    identity = restore(load_config(), source, force=force)
    show({"node": node_text(identity.node_id)}, lambda: f"this node is now {node_text(identity.node_id)}", as_json=as_json)

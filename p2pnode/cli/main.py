"""`p2pnode`: the commands, each in the file named for what it handles."""

from typing import Annotated

import typer

from p2pnode import __version__
from p2pnode.cli import agreements, configuration, daemon, jobs, models, network, offers
from p2pnode.cli.demo import demo
from p2pnode.cli.simulation import sim

app = typer.Typer(
    name="p2pnode",
    help="Lend your processor, use another's; both hold a signed receipt.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"p2pnode {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Lend your processor, use another's; both hold a signed receipt."""


for command in (daemon.up, daemon.down, daemon.status, daemon.pause, daemon.resume, daemon.drain, daemon.why):
    app.command()(command)
app.command()(jobs.run)
app.command("map")(jobs.map_data)
app.add_typer(jobs.app, name="job")
app.add_typer(models.app, name="model")
app.add_typer(offers.app, name="offers")
app.add_typer(agreements.receipt_app, name="receipt")
app.add_typer(agreements.ledger_app, name="ledger")
app.add_typer(configuration.identity_app, name="identity")
app.add_typer(network.net_app, name="net")
app.add_typer(configuration.config_app, name="config")
app.command()(models.clean)
app.command()(demo)
app.command()(sim)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()

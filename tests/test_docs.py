"""Whatever a person can type, set, meet or count is documented; the pages that come from tables are up to date."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import typer.main

from p2pnode.cli import reference
from p2pnode.cli.exit_codes import ExitCode
from p2pnode.cli.main import app
from p2pnode.metrics import CATALOGUE
from p2pnode.reasons import EndReason, Reason

DOCS = Path(__file__).parents[1] / "docs"


def _commands() -> Iterator[tuple[str, list[str]]]:
    def walk(group: object, path: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
        children = getattr(group, "commands", None)
        if children is None:
            yield " ".join(path), [o for p in group.params for o in p.opts if o.startswith("--")]  # type: ignore[attr-defined]
            return
        for name, child in children.items():
            yield from walk(child, (*path, name))

    yield from walk(typer.main.get_command(app), ())


def test_every_command_and_option_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    for command, options in _commands():
        section = re.search(rf"^#+ `p2pnode {re.escape(command)}\b.*?(?=^#+ `|\Z)", page, re.M | re.S)
        assert section, f"`p2pnode {command}` has no section in docs/reference/cli.md; run `make docs`"
        for option in options:
            if option != "--help":
                assert option in section.group(), f"{option} of `p2pnode {command}` is undocumented; run `make docs`"


def test_every_option_has_an_environment_twin() -> None:
    def walk(group: object) -> Iterator[object]:
        for child in getattr(group, "commands", {}).values():
            yield from walk(child)
        if not hasattr(group, "commands"):
            yield from group.params  # type: ignore[attr-defined]

    for option in walk(typer.main.get_command(app)):
        if option.param_type_name == "option" and "--help" not in option.opts:
            assert option.envvar, f"{option.opts[0]} has no environment twin"


@pytest.mark.parametrize("page", sorted(reference.PAGES))
def test_generated_pages_are_up_to_date(page: str) -> None:
    assert (DOCS / "reference" / page).read_text() == reference.PAGES[page](), f"run `make docs` to write {page} again"


def test_every_exit_code_says_how_to_resolve_it() -> None:
    page = (DOCS / "reference" / "exit-codes.md").read_text()
    for code in ExitCode:
        assert re.search(rf"^## {int(code)} .+\n\n.{{40,}}", page, re.M), f"exit code {int(code)} ({code.name}) is undocumented"


def test_every_metric_and_reason_is_listed() -> None:
    metrics = (DOCS / "reference" / "metrics.md").read_text()
    reasons = (DOCS / "reference" / "reasons.md").read_text()
    for name in CATALOGUE:
        assert f"`{name}`" in metrics
    for reason in [*Reason, *EndReason]:
        assert f"`{reason.value}`" in reasons


def test_every_setting_is_listed() -> None:
    from p2pnode.node.config import SETTINGS

    page = (DOCS / "reference" / "config.md").read_text()
    for setting in SETTINGS:
        assert f"`{setting.name}`" in page


def test_links_between_pages_lead_somewhere() -> None:
    root = DOCS.parent
    for path in [root / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.relative_to(root)} links to {target}, which is not there"

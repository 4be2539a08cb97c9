"""The reference pages that come from the program's own tables: commands, settings, metrics, reasons, simulations.

`python -m p2pnode.cli.reference docs/reference` writes them.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

_GENERATED = "<!-- written by `make docs` from the program's own tables -->\n"


def commands_page() -> str:
    """Give docs/reference/cli.md: every command with its arguments, options and environment twins."""
    import typer.main

    from p2pnode.cli.main import app

    lines = [
        "# Command line", "", _GENERATED,
        "Every command takes `--json` and `--home`; durations (`90s`, `1h30m`), sizes (`512MB`, `1.5GiB`) and fractions",
        "(`10%`) are written as people write them; ids may be shortened to any unique beginning. Errors are one sentence that",
        "ends with what to do, on standard error; [exit codes](exit-codes.md) are stable.", "",
    ]  # fmt: skip
    for path, command in _walk(typer.main.get_command(app), ()):
        lines += [f"## `p2pnode {path}{_arguments(command)}`", "", (command.help or "").strip(), ""]
        rows = [parameter for parameter in command.params if parameter.name != "help" and "--help" not in parameter.opts]
        if rows:
            lines += ["| option | meaning | environment |", "|---|---|---|"]
            lines += [_parameter_row(parameter) for parameter in rows]
            lines.append("")
    return "\n".join(lines)


def _walk(group: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    children = getattr(group, "commands", None)
    if children is None:
        yield " ".join(path), group
        return
    for name, child in children.items():
        yield from _walk(child, (*path, name))


def _arguments(command: Any) -> str:
    names = [p for p in command.params if p.param_type_name == "argument"]
    return "".join(f" {p.name.upper()}" if p.required else f" [{p.name.upper()}]" for p in names)


def _parameter_row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    spelled = parameter.name.upper() if is_argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
    meaning = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    twin = parameter.envvar if isinstance(parameter.envvar, str) else ""
    return f"| `{spelled}` | {meaning} | {f'`{twin}`' if twin else ''} |"


def settings_page() -> str:
    """Give docs/reference/config.md: every setting with type, default, whether it applies live, and its environment twin."""
    from p2pnode.node.config import SETTINGS

    lines = [
        "# Settings", "", _GENERATED,
        "`p2pnode config show`, `p2pnode config set NAME VALUE`, or the same names in `config.toml` (`p2pnode config path`). The",
        "environment twin wins over the file. *live*: a running daemon applies the change at once.", "",
        "| setting | default | live | meaning | environment |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for setting in SETTINGS:
        default = setting.default_text or "(empty)"
        live = "yes" if setting.live else "no"
        doc = setting.doc.replace("|", "\\|")
        lines.append(f"| `{setting.name}` | {default} | {live} | {doc} | `{setting.environment}` |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Give docs/reference/metrics.md."""
    from p2pnode.metrics import CATALOGUE

    lines = [
        "# Metrics",
        "",
        _GENERATED,
        "Served as text by the control API at `/v1/metrics`, each with the prefix `p2pnode_`.",
        "",
    ]
    lines += ["| name | meaning |", "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in CATALOGUE.items())]
    return "\n".join(lines) + "\n"


def reasons_page() -> str:
    """Give docs/reference/reasons.md."""
    from p2pnode.reasons import MEANINGS, EndReason, Reason

    lines = [
        "# Reasons",
        "",
        _GENERATED,
        "Every refusal carries one of these, on the wire, in counters, in `why` and in errors.",
        "",
    ]
    lines += ["| refusal | meaning |", "|---|---|", *(f"| `{reason.value}` | {MEANINGS[reason]} |" for reason in Reason)]
    lines += ["", "Every job, agreement and call ends for exactly one of these, the same on both sides.", ""]
    lines += ["| end | meaning |", "|---|---|", *(f"| `{reason.value}` | {MEANINGS[reason]} |" for reason in EndReason)]
    return "\n".join(lines) + "\n"


def simulations_page() -> str:
    """Give docs/reference/simulations.md: everything that a scenario file can say, and everything that is measured."""
    from p2pnode.sim.adversaries import KINDS
    from p2pnode.sim.measures import MEASURES
    from p2pnode.sim.scenario import FILE_KEYS, OPTION_MEANINGS, STEP_MEANINGS, STEPS, Options

    defaults = Options()
    lines = [
        "# Scenario files of the simulation", "", _GENERATED,
        "`p2pnode sim FILE` reads TOML. [How to simulate](../how-to/simulate.md) goes through one; `simulations/` holds those",
        "whose figures p2pnode is judged by.", "", "## Keys", "", "| key | meaning |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| `{name}` | {meaning} |" for name, meaning in FILE_KEYS.items()]
    lines += ["", "## Options of the network", "", "| option | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {_shown(getattr(defaults, name))} | {meaning} |" for name, meaning in OPTION_MEANINGS.items()]
    lines += ["", "## Steps of the timeline", "", "| step | parameters and defaults | meaning |", "|---|---|---|"]
    for name, parameters in STEPS.items():
        shown = ", ".join(f"`{key}` {_shown(value)}" for key, value in parameters.items())
        lines.append(f"| `{name}` | {shown} | {STEP_MEANINGS[name]} |")
    lines += ["", "## Kinds of attack", "", "| kind | what its nodes do |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in KINDS.items()]
    lines += ["", "## Measures", "", "| measure | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in MEASURES.items()]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(none)"
    return str(value).lower() if isinstance(value, bool) else str(value)


PAGES: Final[dict[str, Callable[[], str]]] = {
    "cli.md": commands_page,
    "config.md": settings_page,
    "metrics.md": metrics_page,
    "reasons.md": reasons_page,
    "simulations.md": simulations_page,
}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (Path(sys.argv[1]) / page).write_text(write())

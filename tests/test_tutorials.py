"""Tutorials and examples work as written; the reference names everything; no page names a command that is not there."""

import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer.main

import p2pnode
from p2pnode.cli.main import app
from p2pnode.client import Connection, InferenceSession
from p2pnode.crypto.hashing import DOMAINS
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.spec import Terms
from p2pnode.transport import frames
from p2pnode.transport.limits import Limits
from p2pnode.wire import codec  # noqa: F401 - registers every message
from p2pnode.wire.registry import registered

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMAND_SECONDS = 120
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
SOURCES = sorted((ROOT / "p2pnode").rglob("*.py"))


# --- tutorials and examples ---------------------------------------------------------------------------------------------


class Place:
    """A folder to type commands in, with an identity of its own in a network of its own on this machine.

    Nodes find each other by address, so that this works where multicast does not.
    """

    def __init__(self, folder: Path, network: str, provider: str, listen: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "examples").symlink_to(ROOT / "examples")
        programs = folder / "bin"
        programs.mkdir()
        for name, arguments in (("python", ""), ("p2pnode", " -m p2pnode.cli.main")):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n')
            (programs / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("P2PNODE_")}
        self.variables = kept | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "P2PNODE_HOME": str(folder / "home"),
            "P2PNODE_NETWORK_PROFILE": "local",
            "P2PNODE_NETWORK_ID": network,
            "P2PNODE_NETWORK_MDNS": "false",
            "P2PNODE_NETWORK_LISTEN": listen,
            "P2PNODE_NETWORK_STATIC_PEERS": provider,
        }

    def type(self, command: str) -> str:
        """Run a line in a shell; it must succeed. Gives what it printed, errors included."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"`{command}` ended with {done.returncode}:\n{done.stdout}{self.log()}"
        return done.stdout

    def log(self) -> str:
        """Give the end of the daemon's log, if there is one."""
        file = self.folder / "home" / "data" / "daemon.log"
        return f"\n{file}:\n{file.read_text()[-2000:]}" if file.exists() else ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def place(folder: Path, network: str, provider: str, listen: str = "127.0.0.1:0") -> Iterator[Place]:
    here = Place(folder, network, provider, listen)
    try:
        yield here
    finally:
        subprocess.run(["bash", "-c", "p2pnode down"], env=here.variables, capture_output=True, timeout=60, check=False)


@contextmanager
def provider_and_client(folder: Path) -> Iterator[Place]:
    network, address = f"test-{uuid.uuid4().hex[:12]}", f"127.0.0.1:{free_port()}"
    with (
        place(folder / "volunteer", network, address, address) as volunteer,
        place(folder / "client", network, address) as client,
    ):
        volunteer.type("p2pnode up")
        yield client


def steps(page: str) -> Iterator[tuple[str, list[str]]]:
    """Give the commands of a page's console blocks, in order, each with the lines that its output must have."""
    for block in re.findall(r"^```console\n(.*?)^```", page, re.M | re.S):
        command, expected = "", []
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, expected
                command, expected = line[2:], []
            elif line.strip("… "):
                expected.append(line)
        yield command, expected


def missing(expected: list[str], output: str) -> list[str]:
    """Give the expected lines that the output lacks; `…` stands for anything, spaces for any number of them."""
    patterns = {line: ".*".join(r"\s+".join(map(re.escape, part.split())) for part in line.split("…")) for line in expected}
    return [line for line, pattern in patterns.items() if not re.search(pattern, output)]


def follow(here: Place, tutorial: str) -> None:
    commands = list(steps((DOCS / "tutorial" / tutorial).read_text()))
    assert len(commands) >= 8
    for command, expected in commands:
        output = here.type(command)
        assert not missing(expected, output), f"`{command}` did not print {missing(expected, output)} but:\n{output}"


@pytest.mark.slow
def test_the_volunteers_tutorial_works_as_written(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with place(tmp_path / "volunteer", f"test-{uuid.uuid4().hex[:12]}", address, address) as volunteer:
        follow(volunteer, "first-volunteer.md")


@pytest.mark.slow
def test_the_clients_tutorial_works_as_written(tmp_path: Path) -> None:
    with provider_and_client(tmp_path) as client:
        follow(client, "first-client.md")


@pytest.mark.slow
def test_every_example_runs(tmp_path: Path) -> None:
    shown = {
        "make_model.py": ["wrote model.onnx…"],
        "run_once.py": ["by node-…for…micro-credits", "receipt doc-…"],
        "drop_in.py": ["the same"],
        "map_folder.py": ["10 files of scores"],
    }
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(shown), "an example is not run here"
    with provider_and_client(tmp_path) as client:
        for name, expected in shown.items():
            output = client.type(f"python examples/{name}")
            assert not missing(expected, output), f"{name} printed:\n{output}"


def test_what_a_tutorial_expects_is_looked_for() -> None:
    page = "```console\n$ one\nstate…taking work\n…\n$ two\n```\n"
    assert list(steps(page)) == [("one", ["state…taking work"]), ("two", [])]
    assert missing(["state…taking work"], "state      taking work\n") == []
    assert missing(["state…taking work", "stopped"], "state paused\nstopped\n") == ["state…taking work"]


# --- pages --------------------------------------------------------------------------------------------------------------


def test_the_protocol_page_names_every_message_with_its_fields() -> None:
    page = (DOCS / "reference" / "protocol.md").read_text()
    for number, cls in registered().items():
        row = re.search(rf"^\| {number} \| `{cls.__name__}` \| (.*) \|$", page, re.M)
        assert row, f"message {number} {cls.__name__} is missing in protocol.md"
        named = tuple(re.findall(r"`(\w+)`", row[1]))
        assert named == cls.__struct_fields__, f"{cls.__name__} has the fields {cls.__struct_fields__}, the page says {named}"


def test_the_protocol_page_names_every_frame_domain_and_limit() -> None:
    page = (DOCS / "reference" / "protocol.md").read_text()
    for name in ["REQUEST", "REPLY", "REFUSAL", "CANCEL", "MORE", "DATA", "CREDIT", "WINDOW", "PING", "PONG", "GOODBYE", "REKEY"]:
        assert re.search(rf"^\| {getattr(frames, name)} \| {name} \|", page, re.M), f"frame {name}"
    for purpose in DOMAINS:
        assert f"`{purpose}`" in page, f"domain {purpose}"
    for field in dataclasses.fields(Limits):
        assert re.search(rf"^\| `{field.name}` \| {field.default:.16g} \|", page, re.M), f"limit {field.name} = {field.default}"


def test_the_python_page_names_everything_public() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    for name in p2pnode.__all__:
        assert name == "__version__" or name in page, name
    for cls in (Connection, InferenceSession):
        for name in vars(cls):
            if not name.startswith("_"):
                assert re.search(rf"`{name}\b", page), f"{cls.__name__}.{name} is missing in python.md"
    for field in dataclasses.fields(Terms):
        assert re.search(rf"^\| `{field.name}` \|", page, re.M), f"the term {field.name} is missing in python.md"
    for field in dataclasses.fields(JobResult):
        assert f"`{field.name}`" in page, f"JobResult.{field.name} is missing in python.md"


def known_commands() -> set[str]:
    def walk(group: object, path: tuple[str, ...]) -> Iterator[str]:
        yield " ".join(path)
        for name, child in getattr(group, "commands", {}).items():
            yield from walk(child, (*path, name))

    return set(walk(typer.main.get_command(app), ()))


def named_commands(text: str) -> Iterator[str]:
    """Give the words behind `p2pnode` in code spans and console lines, up to the first that is no command's name."""
    for found in re.findall(r"(?:`|^\$ )p2pnode ([a-z][a-z -]*)", text, re.M):
        yield found.split(" -")[0].strip()


@pytest.mark.parametrize(
    "path", [*PAGES, *sorted((ROOT / "p2pnode").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_command_that_is_named_exists(path: Path) -> None:
    known = known_commands()
    groups = {command.split()[0] for command in known if " " in command}
    for named in named_commands(path.read_text()):
        words = named.split()
        depth = 2 if words and words[0] in groups else 1
        told = " ".join(words[:depth])
        assert told in known, f"{path.relative_to(ROOT)} names `p2pnode {told}`, which does not exist"


def test_decisions_are_indexed_and_complete() -> None:
    folder = DOCS / "decisions"
    index = (folder / "README.md").read_text()
    for path in folder.glob("*.md"):
        if path.name == "README.md":
            continue
        assert f"]({path.name})" in index, f"docs/decisions/README.md does not list {path.name}"
        assert "What would change our mind" in path.read_text(), f"{path.name} does not say what would change our mind"

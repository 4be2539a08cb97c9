"""Imports go down: every module imports only from lower layers, as docs/explanation/architecture.md draws them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "p2pnode"

LAYERS = {
    "crypto": 1,
    "wire": 2,
    "store": 3,
    "transport": 3,
    "discovery": 4,
    "work": 5,
    "market": 6,
    "verification": 7,
    "jobs": 8,
    "training": 9,
    "node": 10,
    "dropin": 10.2,
    "control": 10.3,
    "attached": 10.4,
    "embedded": 10.4,
    "sim": 11,
    "client": 11,
    "api": 12,
    "cli": 13,
}
# Inside layer 0 the order is finer: errors stand on reasons, the environment on everything before it.
LAYER_ZERO = {"reasons": 0.0, "ids": 0.1, "units": 0.1, "metrics": 0.1, "errors": 0.2, "environment": 0.3}
MAY_WAIT = {"store", "transport", "node", "sim", "control", "attached", "embedded", "client", "api", "cli"}
MAY_WAIT_FILES = {
    "service.py", "mdns.py", "hardware.py", "runtime.py", "worker.py", "sandbox.py", "zygote.py",
    "children.py", "confined.py", "remote_worker.py",
}  # fmt: skip
MAY_WAIT_FILES |= {"suppliers.py", "sessions.py", "map_runs.py", "recalls.py", "former_agreements.py", "supply.py"}
MAY_WAIT_FILES |= {"bell.py", "buying.py", "payments.py", "way_back.py", "selling.py", "storefront.py", "purchasing.py"}
MAY_WAIT_FILES |= {"model_transfer.py", "withdrawals.py", "advertising.py", "finding.py"}
# Discovery on the real transport: dials, timers and nurseries; the machines they drive stay pure.
MAY_WAIT_FILES |= {"asker.py", "dial_back.py", "introductions.py", "link_keeper.py"}
MAY_WAIT_FILES |= {"own_records.py"}
# Rooms inside discovery; the files that wire them together stand above all of them.
DISCOVERY_ROOMS = {"addresses": 0, "diversity": 0, "settings": 0, "records": 1, "dht": 2, "peers": 2, "gossip": 3}
MACHINE_MODULES = {"trio", "socket", "subprocess", "threading", "aiosqlite", "zeroconf", "select", "asyncio"}


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _unit(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else "__init__"


def _layer(unit: str) -> float | None:
    return LAYER_ZERO.get(unit, LAYERS.get(unit))


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "relative"))
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = _unit(path.relative_to(PACKAGE).parts)
    if here == "__init__":
        pytest.skip("the package itself resolves its public names lazily")
    layer = _layer(here)
    assert layer is not None, f"{path} is in no layer; add it to ARCHITECTURE and to this test"
    for line, name in _imports(path):
        assert name != "relative", f"{path}:{line} imports relatively; write the whole name"
        parts = name.split(".")
        if parts[0] != "p2pnode" or len(parts) < 2:
            continue
        if parts[1] in ("__version__", here):
            continue
        target = _layer(parts[1])
        assert target is not None, f"{path}:{line} imports {name}, which is in no layer"
        assert target < layer, f"{path}:{line} imports {name} (layer {target}) from layer {layer}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "discovery").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_between_the_rooms_of_discovery_go_down(path: Path) -> None:
    here = _unit(path.relative_to(PACKAGE / "discovery").parts)
    for line, name in _imports(path):
        if name.startswith("p2pnode.discovery."):
            room = name.split(".")[2]
            if here in DISCOVERY_ROOMS and room != here:
                assert DISCOVERY_ROOMS.get(room, 4) < DISCOVERY_ROOMS[here], f"{path}:{line} imports {name} from {here}"


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_marked_files_touch_the_machine(path: Path) -> None:
    """Below the node, trio, sockets and processes stay in the files that ARCHITECTURE marks."""
    relative = path.relative_to(PACKAGE)
    unit = _unit(relative.parts)
    if unit in MAY_WAIT or path.name in MAY_WAIT_FILES or unit in LAYER_ZERO or unit == "__init__":
        pytest.skip("may wait")
    for line, name in _imports(path):
        assert name.split(".")[0] not in MACHINE_MODULES, f"{path}:{line} imports {name}: keep this file pure"


def test_the_house_has_the_drawn_rooms() -> None:
    for room in sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert _layer(room) is not None, f"{room}/ is in no layer"
        docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert docstring, f"{room}/__init__.py says what the layer promises"


def test_init_files_hold_only_a_docstring() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent == PACKAGE:
            continue
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, f"{path} should hold one docstring and nothing else"
        assert isinstance(body[0], ast.Expr), f"{path} should hold one docstring and nothing else"

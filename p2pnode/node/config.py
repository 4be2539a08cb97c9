"""Every setting of a node, in one table: the fields of the dataclasses below.

A value comes from, in rising order: the default here, the preset of `network.profile`, the file `config.toml`, the
environment twin. The reference page, `config show` and `config set` are all made from `SETTINGS`. Identity and settings live
in the config folder, everything movable (database, models, outputs) in the data folder; P2PNODE_HOME moves both.
"""

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from p2pnode import ids
from p2pnode.errors import ConfigError
from p2pnode.node.config_file import literal, read_text, values_in, with_value, without_value, write_atomically
from p2pnode.node.setting import (
    ADDRESS,
    BOOLEAN,
    BOOTSTRAP_ENTRY,
    CREDITS,
    DURATION,
    FRACTION,
    PEER_ADDRESS,
    PROCESSORS,
    SIZE,
    TEXT,
    WORD,
    Setting,
    choice,
    identifier,
    listed,
    number,
    optional,
    setting,
    whole,
)

HOME_VARIABLE: Final = "P2PNODE_HOME"
PORT: Final = 7470


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Which network this node is in and how it finds peers."""

    profile: str = setting(
        "lan", choice("local", "lan", "public"),
        "Presets for this machine only, a local network, or the internet: listen, mdns, diversity, puzzle_bits and limits.",
        live=False,
    )  # fmt: skip
    id: str = setting("main", WORD, "Name of the network; nodes of different networks never talk.", live=False)
    listen: str = setting(
        f"[::]:{PORT}",
        ADDRESS,
        "Address to listen on: [::] is every IPv4 and IPv6 address; port 0 takes any free one.",
        live=False,
    )
    announce: tuple[str, ...] = setting(
        (), listed(ADDRESS), "Addresses told to peers, where they differ from those of this machine's interfaces.", live=False
    )
    static_peers: tuple[str, ...] = setting(
        (), listed(PEER_ADDRESS), "Peers to keep a link with, as host:port or node-…@host:port."
    )
    bootstrap: tuple[str, ...] = setting(
        (),
        listed(BOOTSTRAP_ENTRY),
        "Peers to ask when too few are known: host:port, node-…@host:port, or file:PATH of such lines; several of each.",
    )
    publish_address: bool = setting(
        True, BOOLEAN, "Publish this node's addresses under its id, so that others find it by the id alone.", live=False
    )
    mdns: bool = setting(
        True, BOOLEAN, "Find and be found by nodes on the local network; tells that network of this node.", live=False
    )
    mdns_interfaces: str = setting(
        "all",
        TEXT,
        "Interfaces for mDNS: all (but virtual ones), default (the system's choice), or names and addresses.",
        live=False,
    )
    mdns_virtual: bool = setting(False, BOOLEAN, "With mdns_interfaces = all, use container and VPN interfaces too.", live=False)
    diversity: str = setting(
        "relaxed", choice("relaxed", "strict"),
        "relaxed exempts loopback and private addresses from the limits per address; strict exempts none.", live=False,
    )  # fmt: skip
    puzzle_bits: int = setting(
        0, whole(0, 32, "bits"), "Difficulty of the puzzle that a node id must solve in this network.", live=False
    )

    @property
    def network_id(self) -> bytes:
        """The 32 bytes that every handshake and signature covers."""
        return hashlib.blake2b(self.id.encode(), digest_size=32, person=b"p2pnode network").digest()


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What peers may take of this machine, whoever they are."""

    connections_max: int = setting(128, whole(4, 65536), "Sessions open at once.", live=False)
    inbound_max: int = setting(96, whole(1, 65536), "Of these, sessions opened by others.", live=False)
    outbound_reserved: int = setting(16, whole(0, 65536), "Sessions kept free for this node's own dials.", live=False)
    per_address_max: int = setting(8, whole(1, 65536), "Sessions with one address.", live=False)
    per_network_max: int = setting(16, whole(1, 65536), "Sessions with one /24 (IPv6: /48) network.", live=False)
    idle: float = setting(60.0, DURATION, "A session without requests is closed after this time, unless it is kept.", live=False)
    links_max: int = setting(64, whole(1, 65536), "Links that discovery keeps at once.", live=False)
    local_links_max: int = setting(16, whole(0, 65536), "Of these, links with peers that mDNS found.")
    anchors_max: int = setting(4, whole(0, 64), "Of these, outbound links with long-known servers, kept across restarts.")
    ask_dials_max: int = setting(16, whole(1, 1024), "Connections opened at once for single requests of the hash table.")
    peers_max: int = setting(2000, whole(8, 1_000_000), "Entries in the peer book.", live=False)
    buffers: int = setting(128 << 20, SIZE, "Memory for all sessions' buffers together.", live=False)


@dataclass(frozen=True, slots=True)
class ProvideConfig:
    """What the owner lends, to whom and for how much."""

    enabled: bool = setting(True, BOOLEAN, "Sell this machine's time. A node with false only buys.")
    pause: bool = setting(False, BOOLEAN, "Take no new work until this is false again; `p2pnode pause` does it for a time.")
    price: int = setting(1_000_000, CREDITS, "The one number: credits per 10^12 operations of a model's cost.")
    operations_price: int | None = setting(
        None, optional(CREDITS), "Credits per 10^9 operations; replaces provide.price where a finer step is needed."
    )
    call_price: int = setting(0, CREDITS, "Credits added per call, whatever its size.")
    region: tuple[str, ...] = setting((), listed(WORD), "Labels of where this machine is, such as eu,fr; told in the offer.")
    cpus: str = setting("100%", PROCESSORS, "Processors lent: a number of cores or a share such as 50%.")
    threads: int = setting(1, whole(1, 256), "Threads of one worker process.")
    engines: tuple[str, ...] = setting(
        (), listed(WORD), "ONNX Runtime execution providers to use, best first; empty uses the processor.", live=False
    )
    memory: int = setting(4 << 30, SIZE, "Memory of all worker processes together.")
    worker_memory: int = setting(3 << 30, SIZE, "Memory of one worker process.")
    disk: int = setting(20 << 30, SIZE, "Disk for stored models; the longest unused are removed first.")
    bandwidth: int = setting(0, SIZE, "Bytes per second of calls' inputs and outputs; 0 sets no limit.")
    models_allow: tuple[bytes, ...] = setting((), listed(identifier(ids.MODEL)), "Models to run; empty allows all.")
    models_deny: tuple[bytes, ...] = setting((), listed(identifier(ids.MODEL)), "Models never to run.")
    clients_allow: tuple[bytes, ...] = setting((), listed(identifier(ids.NODE)), "Nodes to work for; empty allows all.")
    clients_deny: tuple[bytes, ...] = setting((), listed(identifier(ids.NODE)), "Nodes never to work for.")
    sandbox_level_min: str = setting(
        "full", choice("full", "gpu", "reduced"), "Serve nothing when the sandbox reaches less than this level."
    )
    share_workers: bool = setting(True, BOOLEAN, "Clients whose orders allow it too may share a worker process.")
    batch_max: int = setting(16, whole(1, 4096), "Calls joined into one run; 1 joins none.")
    batch_delay: float = setting(0.002, DURATION, "How long a part-filled batch waits while the workers are busy.")
    queue_max: int = setting(256, whole(1, 1_000_000), "Calls waiting for a worker; more are refused as busy.")
    queue_per_client_max: int = setting(128, whole(1, 1_000_000), "Of these, calls of one client.")
    call_time_max: float = setting(120.0, DURATION, "The longest a call may run before its worker is killed.")
    load_time_max: float = setting(60.0, DURATION, "The longest a model may load before its worker is killed.")
    worker_idle: float = setting(600.0, DURATION, "A worker without calls for this long is ended.")
    model_size_max: int = setting(2 << 30, SIZE, "The largest model to fetch.")
    input_size_max: int = setting(256 << 20, SIZE, "The largest input of one call.")
    output_size_max: int = setting(256 << 20, SIZE, "The largest output of one call.")

    @property
    def operations_price_micro(self) -> int:
        """Micro-credits per 10^9 operations, as offers and quotes carry it; provide.price rounded up."""
        return -(-self.price // 1000) if self.operations_price is None else self.operations_price

    def cpu_fraction(self, cores: int) -> float:
        """Give the share of `cores` to lend, above 0 and at most 1."""
        if self.cpus.endswith("%"):
            return float(self.cpus[:-1]) / 100
        return min(1.0, int(self.cpus) / max(1, cores))


@dataclass(frozen=True, slots=True)
class CreditConfig:
    """How much trust a peer gets: what can be lost to it."""

    slice_amount: int = setting(1_000_000, CREDITS, "The most a stranger can run up before its first cheque.")
    growth: float = setting(0.05, FRACTION, "How much of the settled two-way volume is added to a peer's slice.")
    slice_amount_max: int = setting(1_000_000_000, CREDITS, "The largest slice of any peer.")
    half_life: float = setting(30 * 86400.0, DURATION, "Earned credit halves in this time.")
    debt_max: int = setting(10_000_000_000, CREDITS, "The most one peer may owe by cheques that are not settled.")
    cheque_time: float = setting(30.0, DURATION, "How long to wait for a cheque or receipt while the link stands.")


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How this node buys."""

    max_price: int | None = setting(None, optional(CREDITS), "The most to pay for one call; empty sets no limit.")
    max_total: int = setting(10_000_000, CREDITS, "The most one job may cost where it does not say so itself.")
    deadline: float = setting(3600.0, DURATION, "The longest an order may run.")
    call_time_max: float = setting(120.0, DURATION, "The longest to wait for one call's run.")
    providers_max: int = setting(8, whole(1, 256), "Providers used at once by one job.")
    in_flight: int = setting(4, whole(1, 1024), "Calls under way with one provider.")
    hedging: bool = setting(True, BOOLEAN, "Send a second copy of a call that is far slower than its model's others.")
    hedge_deviations: float = setting(6.0, number(1, 100), "How far slower, in median absolute deviations.")
    latency_weight: float = setting(0.5, number(0, 100), "Weight of time against money when quotes are compared.")
    providers_deny: tuple[bytes, ...] = setting((), listed(identifier(ids.NODE)), "Nodes never to buy from.")
    local_fallback: bool = setting(False, BOOLEAN, "Run on this machine when nobody else can.")
    share_worker: bool = setting(True, BOOLEAN, "Let a provider run this node's calls in a worker that it shares with others.")
    slice_calls: int = setting(512, whole(1, 4096), "Calls per receipt at most.")
    slice_time: float = setting(30.0, DURATION, "Time per receipt at most.")


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """What is kept on this machine's disk beside models."""

    jobs_kept: float = setting(30 * 86400.0, DURATION, "Ended jobs older than this are removed by `p2pnode clean`.")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What the daemon says."""

    level: str = setting("info", choice("debug", "info", "warning", "error"), "The least urgent lines to log.")


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """How commands reach the daemon."""

    socket: str = setting("", TEXT, "Path of the control socket; empty puts it into the data folder.", live=False)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything a node is told by its owner. Immutable; `with_settings` gives a changed copy."""

    config_folder: Path
    data_folder: Path
    network: NetworkConfig = NetworkConfig()
    limits: LimitsConfig = LimitsConfig()
    provide: ProvideConfig = ProvideConfig()
    credit: CreditConfig = CreditConfig()
    client: ClientConfig = ClientConfig()
    storage: StorageConfig = StorageConfig()
    log: LogConfig = LogConfig()
    api: ApiConfig = ApiConfig()

    @property
    def config_file(self) -> Path:
        """Where `config set` writes."""
        return self.config_folder / "config.toml"

    @property
    def key_file(self) -> Path:
        """Where the identity is."""
        return self.config_folder / "identity.json"

    @property
    def database_file(self) -> Path:
        """Where the ledger, jobs and documents are."""
        return self.data_folder / "p2pnode.db"

    @property
    def models_folder(self) -> Path:
        """Where model blobs are."""
        return self.data_folder / "models"

    @property
    def socket_file(self) -> Path:
        """Where the control API listens."""
        return Path(self.api.socket).expanduser() if self.api.socket else self.data_folder / "api.sock"

    def value(self, name: str) -> Any:
        """Give a setting's value by its dotted name. Raises ConfigError."""
        section, _, field_name = find_setting(name).name.partition(".")
        return getattr(getattr(self, section), field_name)

    def as_text(self) -> dict[str, str]:
        """Give every setting in human units, by dotted name."""
        return {row.name: row.kind.format(self.value(row.name)) for row in SETTINGS}


def _rows() -> Iterator[Setting]:
    for section in fields(NodeConfig):
        if section.name.endswith("_folder"):
            continue
        for row in fields(section.default):  # type: ignore[arg-type]
            meta = row.metadata
            yield Setting(f"{section.name}.{row.name}", meta["kind"], row.default, meta["doc"], meta["live"])


SETTINGS: Final[tuple[Setting, ...]] = tuple(_rows())
_BY_NAME: Final = {row.name: row for row in SETTINGS}
_SECTIONS: Final = tuple(dict.fromkeys(row.name.partition(".")[0] for row in SETTINGS))

PROFILES: Final[dict[str, dict[str, str]]] = {
    "local": {
        "network.listen": "127.0.0.1:0",
        "network.mdns_interfaces": "127.0.0.1",
        "limits.connections_max": "256",
        "limits.inbound_max": "192",
    },
    "lan": {},
    "public": {
        "network.mdns": "false",
        "network.diversity": "strict",
        "network.puzzle_bits": "16",
        "limits.connections_max": "96",
        "limits.inbound_max": "64",
    },
}


def find_setting(name: str) -> Setting:
    """Give a setting by its dotted name. Raises ConfigError that names the nearest ones."""
    found = _BY_NAME.get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.strip().lower(), _BY_NAME, n=2, cutoff=0.5)
        near = near or [row.name for row in SETTINGS if row.name.endswith("." + name.strip().lower())]
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"no setting is called {name!r}{meant} `p2pnode config show` lists all")
    return found


def folders(environment: Mapping[str, str] | None = None) -> tuple[Path, Path]:
    """Give the config folder and the data folder: under P2PNODE_HOME, or the system's own places."""
    home = (os.environ if environment is None else environment).get(HOME_VARIABLE)
    if home:
        root = Path(home).expanduser().absolute()
        return root / "config", root / "data"
    from platformdirs import user_config_path, user_data_path

    return user_config_path("p2pnode", appauthor=False), user_data_path("p2pnode", appauthor=False)


def load_config(environment: Mapping[str, str] | None = None) -> NodeConfig:
    """Give the node's settings. environment: in place of this process's own. Raises ConfigError, naming the setting."""
    variables = os.environ if environment is None else environment
    config = NodeConfig(*folders(variables))
    file = config.config_file
    return _layered(config, values_in(read_text(file), str(file)), str(file), variables)


def with_settings(config: NodeConfig, changes: Mapping[str, str]) -> NodeConfig:
    """Give a copy with settings changed, by dotted name and text; a profile brings its presets. Raises ConfigError."""
    profile = changes.get("network.profile", "")
    texts = {find_setting(name).name: (text, name) for name, text in {**PROFILES.get(profile, {}), **changes}.items()}
    return _replaced(config, texts)


def set_setting(name: str, value: str, environment: Mapping[str, str] | None = None) -> Setting:
    """Write one setting to the config file, keeping everything else in it, and give its row. Raises ConfigError."""
    row = find_setting(name)
    parsed = _parsed(row, value, row.name)
    line = literal(parsed, row.kind.format(parsed))
    _rewrite(lambda text: with_value(text, row.name, line), environment)
    return row


def unset_setting(name: str, environment: Mapping[str, str] | None = None) -> Setting:
    """Remove one setting from the config file, so that its preset or default holds again; gives its row."""
    row = find_setting(name)
    _rewrite(lambda text: without_value(text, row.name), environment)
    return row


def live_changes(old: NodeConfig, new: NodeConfig) -> tuple[list[str], list[str]]:
    """Give the names of changed settings: those that apply at once, and those that need a restart."""
    changed = [row for row in SETTINGS if old.value(row.name) != new.value(row.name)]
    return [row.name for row in changed if row.live], [row.name for row in changed if not row.live]


def _rewrite(change: Callable[[str], str], environment: Mapping[str, str] | None) -> None:
    config = NodeConfig(*folders(environment))
    file = config.config_file
    text = change(read_text(file))
    _layered(config, values_in(text, str(file)), str(file), {})  # the file must stay loadable as a whole
    write_atomically(file, text.encode())


def _layered(config: NodeConfig, in_file: Mapping[str, str], where: str, variables: Mapping[str, str]) -> NodeConfig:
    """Put preset, file and environment over the defaults."""
    given = {find_setting(name).name: (text, f"{name} in {where}") for name, text in in_file.items()}
    given |= {_BY_NAME[name].name: (variables[variable], variable) for variable, name in _twins(variables).items()}
    row = _BY_NAME["network.profile"]
    profile = _parsed(row, *given.get(row.name, (row.default_text, row.name)))
    presets = {name: (text, name) for name, text in PROFILES[profile].items()}
    return _replaced(config, presets | given)


def _replaced(config: NodeConfig, texts: Mapping[str, tuple[str, str]]) -> NodeConfig:
    sections: dict[str, dict[str, Any]] = {}
    for name, (text, origin) in texts.items():
        section, _, field_name = name.partition(".")
        sections.setdefault(section, {})[field_name] = _parsed(_BY_NAME[name], text, origin)
    changed = {section: replace(getattr(config, section), **values) for section, values in sections.items()}
    return replace(config, **changed)


def _parsed(row: Setting, text: str, origin: str) -> Any:
    try:
        return row.kind.parse(text)
    except ValueError as error:
        raise ConfigError(f"{origin} is wrong: {error}") from None


def _twins(variables: Mapping[str, str]) -> dict[str, str]:
    """Give variable -> setting for the environment twins that are set. Raises ConfigError for a misspelt one."""
    known = {row.environment: row.name for row in SETTINGS}
    for variable in variables:
        starts = any(variable.startswith(f"P2PNODE_{section.upper()}_") for section in _SECTIONS)
        if starts and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else "; unset it"
            raise ConfigError(f"no setting has the environment variable {variable}{meant}")
    return {variable: name for variable, name in known.items() if variable in variables}

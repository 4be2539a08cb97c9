"""The daemon process: lock, logs, signals, the node, and whatever serves its owner beside it.

SIGTERM and SIGINT stop in order (a second one at once), SIGHUP reads the settings again. The control API is handed in by the
command line, because it stands above this layer.
"""

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from p2pnode.errors import ConfigError
from p2pnode.metrics import Metrics
from p2pnode.node.config import NodeConfig, load_config
from p2pnode.node.identity import load_or_create
from p2pnode.node.logs import configure_logs
from p2pnode.node.machine import SystemEntropy, open_machine
from p2pnode.node.node import Node
from p2pnode.node.scopes import Service, bare, running
from p2pnode.work.hardware import discover
from p2pnode.work.runtime import SandboxRuntime

PID_NAME: Final = "daemon.pid"
HEALTH_SECONDS: Final = 60.0
DISK_FREE_BYTES_MIN: Final = 256 << 20
DESCRIPTORS_FREE_MIN: Final = 64
LOG_JSON_VARIABLE: Final = "P2PNODE_LOG_JSON"
_log = logging.getLogger(__name__)


class Daemon:
    """A running node and what its owner may do with the process. reload_config: gives the settings as they are on disk."""

    def __init__(self, node: Node, reload_config: Callable[[], NodeConfig] = load_config) -> None:
        self.node = node
        self._reload_config = reload_config

    def stop(self) -> None:
        """Begin the orderly stop of the whole process."""
        self.node.stop()

    def reload(self) -> dict[str, list[str]]:
        """Read the settings again and apply them; gives which apply now and which at the next start. Raises ConfigError."""
        config = self._reload_config()
        now, later = self.node.apply_config(config)
        if "log.level" in now:
            configure_logs(config.log.level, as_json=_wants_json())
        _log.info("settings read again", extra={"applied": now, "at_restart": later})
        return {"applied": now, "at_restart": later}


ServeOwner = Callable[[Daemon], Service]


def run_daemon(config: NodeConfig, serve: ServeOwner | None = None) -> None:
    """Run a node in this process until it is told to stop. serve: makes the control API's service for the daemon.

    Raises ConfigError when the folder is in use or a setting is wrong, StoreError when the database is unusable.
    """
    configure_logs(config.log.level, as_json=_wants_json())
    try:
        trio.run(partial(_run, config, serve))
    except BaseExceptionGroup as group:
        raise bare(group) from None


async def _run(config: NodeConfig, serve: ServeOwner | None) -> None:
    metrics = Metrics()
    runtime = SandboxRuntime(metrics=metrics)
    async with open_machine(config.database_file, runtime, metrics) as environment:
        identity = load_or_create(config, SystemEntropy())
        async with running(runtime):
            node = Node(config, environment, identity, metrics=metrics)
            node.hardware = await discover(runtime)
            daemon = Daemon(node)
            pid_file = config.data_folder / PID_NAME
            pid_file.write_text(f"{os.getpid()}\n")
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_take_signals, daemon, nursery.cancel_scope)
                    await nursery.start(_run_node, node, nursery.cancel_scope)
                    nursery.start_soon(_watch_machine, node, config.data_folder)
                    if serve is not None:
                        await nursery.start(serve(daemon).run)
            finally:
                pid_file.unlink(missing_ok=True)


async def _run_node(
    node: Node, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """The control API goes on answering while the node stops, so that `down` can see it stop; then everything ends."""
    await node.run(task_status=task_status)
    scope.cancel()


async def _take_signals(daemon: Daemon, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async for number in signals:
            if number == signal.SIGHUP:
                try:
                    daemon.reload()
                except ConfigError as error:
                    _log.error("the settings were not read: %s", error)
            elif daemon.node.is_stopping:
                scope.cancel()
            else:
                daemon.stop()


async def _watch_machine(node: Node, data_folder: Path) -> None:
    """Look at disk and descriptors once a minute: a node that cannot store or accept must not look healthy."""
    while True:
        node.health = machine_health(data_folder)
        for name, value in node.health.items():
            if name.endswith("_warning"):
                _log.warning("%s", value)
        await trio.sleep(HEALTH_SECONDS)


def machine_health(data_folder: Path) -> dict[str, Any]:
    """Give free disk space, open descriptors and their limit, with a warning in words for each that runs out."""
    health: dict[str, Any] = {"disk_free_bytes": shutil.disk_usage(data_folder).free}
    if health["disk_free_bytes"] < DISK_FREE_BYTES_MIN:
        health["disk_warning"] = f"the disk of {data_folder} is nearly full; free some space or run `p2pnode clean`"
    if sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        descriptors = Path("/proc/self/fd")
        if descriptors.is_dir():
            health["descriptors"], health["descriptors_max"] = len(list(descriptors.iterdir())), limit
            if limit - health["descriptors"] < DESCRIPTORS_FREE_MIN:
                health["descriptors_warning"] = f"{health['descriptors']} of {limit} file descriptors are open; raise the limit"
    return health


def _wants_json() -> bool:
    return os.environ.get(LOG_JSON_VARIABLE, "").lower() in ("1", "true", "yes", "on")

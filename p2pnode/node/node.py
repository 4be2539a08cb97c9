"""One node: all layers wired together, started in order, stopped in reverse, told what to do by its owner.

The same class runs as a daemon on a real machine and by the hundred in a simulation; only the environment differs. Start and
stop order is nesting: work below market below jobs, so that leaving ends new work first, then says goodbye to peers.
"""

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import trio

from p2pnode import __version__
from p2pnode.crypto.keys import Identity
from p2pnode.discovery.dht.service import LOOKUPS
from p2pnode.discovery.peers.mdns import MdnsService
from p2pnode.discovery.service import REQUESTS as DISCOVERY_REQUESTS
from p2pnode.discovery.service import DiscoveryService, MdnsFactory
from p2pnode.environment import Environment
from p2pnode.ids import NodeId, node_text
from p2pnode.jobs.service import JobService
from p2pnode.market.listings import DocumentCheck
from p2pnode.market.offers import OfferFacts
from p2pnode.market.service import REQUESTS as MARKET_REQUESTS
from p2pnode.market.service import MarketService
from p2pnode.metrics import Metrics
from p2pnode.node import layer_settings
from p2pnode.node.config import NodeConfig, live_changes
from p2pnode.node.explanation import explain
from p2pnode.node.offer_wiring import connect_offers
from p2pnode.node.router import Router
from p2pnode.node.scopes import Service, running
from p2pnode.node.watchdog import Watchdog
from p2pnode.reasons import Reason
from p2pnode.transport.handshake import Handshake
from p2pnode.transport.link import Link
from p2pnode.transport.rates import RequestRates, Traffic
from p2pnode.transport.service import TransportService, TransportSettings
from p2pnode.wire.messages.market import Hardware as OfferedHardware
from p2pnode.work.hardware import Hardware
from p2pnode.work.models import ModelStore
from p2pnode.work.service import WorkService

STOP_SECONDS: Final = 20.0
RECONCILE_SECONDS: Final = 60.0
AGENT: Final = f"p2pnode/{__version__}"
_log = logging.getLogger(__name__)


class Node:
    """A node of the network: provider, client, or both.

    mdns: how to look at the local network, None for not at all. strict: a bug met while serving a peer stops the node.
    data_folder: where model blobs lie; by default the configured one. handshakes: how sessions are opened, and watch: whether
    the event loop's lag is measured; a simulation has its own of the one and no use for the other.
    """

    def __init__(
        self,
        config: NodeConfig,
        environment: Environment,
        identity: Identity,
        *,
        metrics: Metrics | None = None,
        mdns: MdnsFactory | None = MdnsService,
        strict: bool = False,
        data_folder: Path | None = None,
        handshakes: Callable[..., Handshake] = Handshake,
        watch: bool = True,
    ) -> None:
        self.config = config
        self.environment = environment
        self.identity = identity
        self.network_id = config.network.network_id
        self.metrics = metrics or Metrics()
        self._stopping = trio.Event()
        self._stop_scope = trio.CancelScope(shield=True)
        self._started_at = 0.0
        self.health: dict[str, Any] = {}
        # What the machine is, once somebody has measured it: the daemon does at its start, a simulation need not.
        self.hardware: Hardware | None = None
        self._build(mdns, strict, data_folder or config.data_folder, handshakes)
        self.watchdog = Watchdog(environment.clock, self.metrics)
        self._watchdog = self.watchdog if watch else None

    def _build(self, mdns: MdnsFactory | None, strict: bool, data_folder: Path, handshakes: Callable[..., Handshake]) -> None:
        environment, config, metrics = self.environment, self.config, self.metrics
        self.router = Router(metrics, self._violated, strict=strict)
        self.transport = TransportService(
            environment, self.identity, self.network_id, self._transport_settings(strict), metrics, self.router, handshakes
        )
        self.transport.on_link_up = self._link_up
        self.transport.on_link_down = self._link_down
        self.transport.on_violation = self._violated
        self.discovery = DiscoveryService(
            environment,
            layer_settings.discovery_settings(config),
            self.network_id,
            self.identity,
            self.transport,
            metrics,
            mdns,
            layer_settings.kademlia_settings(config),
            DocumentCheck(self.network_id, config.network.puzzle_bits),
        )
        work = layer_settings.work_settings(config)
        self.models = ModelStore(data_folder, environment, work)
        self.work = WorkService(environment, work, self.models, metrics)
        self.transport.before_flush = self.work.poll
        self.market = MarketService(
            environment, self.identity, self.network_id, layer_settings.market_settings(config), metrics, self.transport,
            self.work, self.models,
        )  # fmt: skip
        self.jobs = JobService(
            environment, layer_settings.job_settings(config), metrics, self.market, self.work, self.models, self.transport.links
        )
        self._register_discovery()
        self.router.register(MARKET_REQUESTS, self.market.handle)
        connect_offers(self)
        self.discovery.keeper.is_held = self.market.holds_link
        self.market.offer_facts = self._offer_facts
        self.market.on_bug = self.router.failed
        self.market.on_violation = self._violated

    def _register_discovery(self) -> None:
        """Discovery serves strangers for nothing, so it has rates; the market's calls are paid for and go straight through."""
        exempt_private = self.config.network.diversity != "strict"
        rates = RequestRates(layer_settings.transport_limits(self.config), self.metrics, exempt_private)
        answer, now = self.discovery.handle, self.environment.clock.monotonic
        others = [cls for cls in DISCOVERY_REQUESTS if cls not in LOOKUPS]
        self.router.register(LOOKUPS, rates.limited(Traffic.LOOKUP, answer, now))
        self.router.register(others, rates.limited(Traffic.DISCOVERY, answer, now))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop` or cancellation; both end in order, within 20 s, with goodbyes to every peer.

        What earlier runs left unfinished is resumed, reported or refunded before the node is ready.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            with self._stop_scope:
                await self._run_layers(task_status)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Begin the orderly stop; `run` returns when it is done."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._stop_scope.deadline = trio.current_time() + STOP_SECONDS

    def abandon(self) -> None:
        """End at once, without waiting for anything: what a machine does that has lost its power."""
        self.stop()
        self._stop_scope.cancel()

    @property
    def is_stopping(self) -> bool:
        """True once `stop` was called."""
        return self._stopping.is_set()

    async def _run_layers(self, task_status: trio.TaskStatus[None]) -> None:
        self._started_at = self.environment.clock.monotonic()
        async with AsyncExitStack() as stack:
            # A layer starts after those it calls; peers are let in (transport) only when everything can answer them.
            layers: list[list[Service | None]] = [
                [self.router, self.work], [self.transport], [self.market], [self.discovery], [self.jobs], [self._watchdog],
            ]  # fmt: skip
            for services in layers:
                await stack.enter_async_context(running(*services))
            if self.config.provide.pause:
                self.pause(None)
            _log.info("node %s is ready", node_text(self.node_id), extra={"listen": list(self.transport.bound_addresses)})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reconcile_for_ever)
                task_status.started()
                await self._stopping.wait()
                nursery.cancel_scope.cancel()
                if not self._stop_scope.cancel_called:
                    # While there still are links: whoever searches must not find a node that is gone.
                    self.market.advertising.close()
            _log.info("node %s stops", node_text(self.node_id))

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.stop()

    @property
    def node_id(self) -> NodeId:
        """This node's id."""
        return self.identity.node_id

    def pause(self, seconds: float | None) -> None:
        """Take no new work for so long, or until `resume`. What was accepted is finished."""
        self.work.pause(seconds)
        self.market.advertising.changed()

    def resume(self) -> None:
        """Take work again, after a pause or a drain."""
        self.work.resume()
        self.market.advertising.changed()

    def drain(self) -> None:
        """Take no new agreements, finish the open ones."""
        self.work.drain()
        self.market.advertising.changed()

    def apply_config(self, config: NodeConfig) -> tuple[list[str], list[str]]:
        """Use changed settings at once; gives the names of those that apply now and of those that wait for a restart."""
        now, later = live_changes(self.config, config)
        paused, self.config = self.config.provide.pause, config
        self.discovery.apply(layer_settings.discovery_settings(config))
        self.work.apply(layer_settings.work_settings(config))
        self.market.apply(layer_settings.market_settings(config))
        self.jobs.apply(layer_settings.job_settings(config))
        if config.provide.pause and not paused:
            self.pause(None)
        elif paused and not config.provide.pause:
            self.resume()
        return now, later

    def status(self) -> dict[str, Any]:
        """Give how the node is: plain values that JSON can hold."""
        clock = self.environment.clock
        return {
            "node": node_text(self.node_id),
            "version": __version__,
            "network": self.config.network.id,
            "profile": self.config.network.profile,
            "uptime_seconds": round(clock.monotonic() - self._started_at, 1),
            "listen": list(self.transport.bound_addresses),
            "state": self.state(),
            "selling": self.config.provide.enabled,
            "sandbox": self.environment.runtime.level,
            "hardware": self.hardware.as_dict() if self.hardware is not None else {},
            "discovery": self.discovery.status(),
            "work": self.work.status(),
            "market": self.market.status(),
            "loop_lag_worst_seconds": round(self.watchdog.worst_seconds, 4),
            "health": self.health,
            "bugs": int(self.metrics.total("bugs_total")),
        }

    def state(self) -> str:
        """Give in one word or two what the node does: stopping, buying only, paused, draining, working."""
        if self.is_stopping:
            return "stopping"
        if not self.config.provide.enabled:
            return "buying only"
        work = self.work.status()
        if work["is_paused"]:
            return Reason.PAUSED.value
        if work["is_draining"]:
            busy = work["calls_running"] + work["calls_queued"]
            return f"{Reason.DRAINING.value}, {busy} calls left" if busy else "drained"
        return "taking work"

    def why(self) -> dict[str, Any]:
        """Give the reasons for no work, in sentences, with the counts behind them."""
        return explain(self.status(), self.metrics, self.work.why(), self.config)

    def _transport_settings(self, strict: bool) -> TransportSettings:
        network = self.config.network
        return TransportSettings(
            listen=(network.listen,), addresses=network.announce, agent=AGENT,
            limits=layer_settings.transport_limits(self.config), exempt_private=network.diversity != "strict",
            puzzle_bits=network.puzzle_bits, strict=strict,
        )  # fmt: skip

    def _offer_facts(self) -> OfferFacts:
        """Give what the offer says of this machine, as it is now."""
        return OfferFacts(
            addresses=self.discovery.own_addresses(),
            hardware=offered_hardware(self.hardware),
            engines=layer_settings.work_settings(self.config).execution_providers,
            sandbox=self.environment.runtime.level,
            models=tuple(item.model_id for item in self.models.list() if not item.is_partial),
        )

    def _link_up(self, link: Link) -> None:
        self.discovery.link_up(link)
        self.market.link_up(link)

    def _link_down(self, link: Link, reason: Reason) -> None:
        self.discovery.link_down(link, reason)
        self.market.link_down(link, reason)

    def _violated(self, node_id: bytes, reason: Reason) -> None:
        self.discovery.misbehaved(node_id, reason)

    async def _reconcile_for_ever(self) -> None:
        """Once a minute compare what should be with what is, and repair what an event missed."""
        while True:
            await trio.sleep(RECONCILE_SECONDS)
            await self.reconcile()

    async def reconcile(self) -> None:
        """Let each layer compare its books with the world: agreements with links, work with agreements, jobs with both."""
        await self.market.reconcile()
        await self.jobs.reconcile()


def offered_hardware(hardware: Hardware | None) -> OfferedHardware:
    """Give what an offer says of a machine: bounded texts, whole numbers; all empty while it is not measured."""
    if hardware is None:
        return OfferFacts().hardware
    return OfferedHardware(
        cpu_model=hardware.processor.model[:64],
        cpu_cores=hardware.processor.cores,
        memory_bytes=hardware.memory_bytes,
        gpus=tuple(gpu.name[:64] for gpu in hardware.graphics_processors[:32]),
        gpu_memory_bytes=sum(gpu.memory_bytes for gpu in hardware.graphics_processors),
        operations_per_second=round(hardware.operations_per_second),
    )

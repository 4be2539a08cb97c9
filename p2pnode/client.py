"""p2pnode for Python programs: `connect()`, `connect_async()`, and a drop-in for `onnxruntime.InferenceSession`.

A connection attaches to the daemon of the configured data folder (P2PNODE_HOME moves it) when one lives, and otherwise runs a
node inside this process. Amounts are integer micro-credits or texts in decimal credits; the provider sees all inputs.
"""

import atexit
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from p2pnode.attached import DaemonConnection
from p2pnode.dropin import CPU, ModelMetadata, NodeArg, check_names, check_values, model_metadata, translated
from p2pnode.errors import ConfigError, P2PNodeError
from p2pnode.ids import JOB, MODEL, id_text
from p2pnode.jobs.feeds import ValueInfo, as_values
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec, Terms
from p2pnode.node.config import NodeConfig, load_config
from p2pnode.reasons import EndReason
from p2pnode.units import parse_credits, parse_duration


def connect(home: str | Path | None = None, *, config: NodeConfig | None = None, embed: bool | None = None) -> "Connection":
    """Connect to the network, blocking. home: a folder in place of P2PNODE_HOME; config: settings in place of those there.

    embed: True runs a node in this process, False insists on a daemon, None takes a daemon when one lives. Close the
    connection, or use it in a `with` block. Raises ConfigError.
    """
    config = config or load_config(None if home is None else {**os.environ, "P2PNODE_HOME": str(home)})
    daemon = DaemonConnection(config.data_folder)
    if embed is not True and daemon.alive():
        return Connection(_Attached(daemon))
    if embed is False:
        raise ConfigError(f"no p2pnode daemon runs on {config.data_folder}: start one with `p2pnode up`")
    return Connection(_Embedded(config))


@asynccontextmanager
async def connect_async(home: str | Path | None = None, *, config: NodeConfig | None = None) -> AsyncIterator["AsyncConnection"]:
    """Connect from a trio program: `async with p2pnode.connect_async() as network: await network.run(…)`."""
    import trio

    from p2pnode.embedded import embedded_config, embedded_node

    config = config or load_config(None if home is None else {**os.environ, "P2PNODE_HOME": str(home)})
    daemon = DaemonConnection(config.data_folder)
    if await trio.to_thread.run_sync(daemon.alive):
        connection = Connection(_Attached(daemon))
        yield AsyncConnection(connection)
        return
    async with embedded_node(embedded_config(config)) as node:
        yield AsyncConnection(Connection(_InLoop(node)))


class AsyncConnection:
    """A connection for trio. Methods and arguments are those of `Connection`."""

    def __init__(self, connection: "Connection") -> None:
        self._backend = connection.backend

    async def run(
        self, model: str | Path, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None, **terms: Any
    ) -> JobResult:
        """Run one inference. Cancelling cancels the job."""
        spec = JobSpec(str(model), inputs, tuple(outputs or ()), terms_of(terms))
        return await self._backend.run_async(spec)

    async def map(
        self, model: str | Path, data: str | Path, output: str | Path, *, outputs: Sequence[str] = (), batch: int = 0, **terms: Any
    ) -> dict[str, Any]:
        """Run a model over a data set and give the ended job's description. Started again, it goes on."""
        spec = MapSpec(str(model), str(data), str(output), tuple(outputs), batch, terms_of(terms))
        return await self._backend.map_async(spec)


class Connection:
    """A blocking connection, usable from many threads. `terms` of its methods are the fields of `jobs.spec.Terms`."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, model: str | Path, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None, **terms: Any
    ) -> JobResult:
        """Run one inference: outputs by name, provider, amount, seconds. model: a file, a model id or the start of one."""
        return self.backend.run(JobSpec(str(model), inputs, tuple(outputs or ()), terms_of(terms)))  # type: ignore[no-any-return]

    def dry_run(self, model: str | Path, inputs: Mapping[str, Any], **terms: Any) -> dict[str, Any]:
        """Give what `run` would do: providers in order, prices, rejected peers with reasons. Spends nothing."""
        return self.backend.dry_run(JobSpec(str(model), inputs, (), terms_of(terms)))  # type: ignore[no-any-return]

    def map(
        self, model: str | Path, data: str | Path, output: str | Path, *, outputs: Sequence[str] = (), batch: int = 0, **terms: Any
    ) -> Iterator[dict[str, Any]]:
        """Run a model over a data set; gives progress (done, total, rate, spent, eta_seconds …) until it has ended.

        Killed at any point and called again with the same arguments, it goes on where it was and pays nothing twice.
        """
        spec = MapSpec(str(model), str(data), str(output), tuple(outputs), batch, terms_of(terms))
        return self.backend.map(spec)  # type: ignore[no-any-return]

    def session(self, model: str | Path, **terms: Any) -> "NetworkSession":
        """Open a session: agreements are kept from call to call."""
        return self.backend.session(SessionSpec(str(model), terms_of(terms)))  # type: ignore[no-any-return]

    def offers(self) -> list[dict[str, Any]]:
        """Give the offers known now."""
        return self.backend.books("offers")  # type: ignore[no-any-return]

    def models(self) -> list[dict[str, Any]]:
        """Give the models stored here."""
        return self.backend.books("models")  # type: ignore[no-any-return]

    def receipts(self) -> list[dict[str, Any]]:
        """Give the receipts kept here, newest first."""
        return self.backend.books("receipts")  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the connection: agreements end with their last receipts and cheques. Idempotent."""
        self.backend.close()


def terms_of(values: Mapping[str, Any]) -> Terms:
    """Give Terms from keyword arguments: amounts may be texts in credits, the deadline a text such as `90s`."""
    plain = dict(values)
    for name in ("max_price", "max_total"):
        if isinstance(plain.get(name), str):
            plain[name] = parse_credits(plain[name])
    if isinstance(plain.get("deadline_seconds"), str):
        plain["deadline_seconds"] = parse_duration(plain["deadline_seconds"])
    if "deny" in plain:
        plain["deny"] = (plain["deny"],) if isinstance(plain["deny"], str) else tuple(plain["deny"])
    try:
        return Terms(**plain)
    except TypeError as error:
        raise ConfigError(str(error).replace("Terms.__init__() got an unexpected keyword argument", "there is no term called")) from error


class NetworkSession:
    """One open session of a blocking connection. inputs, outputs: what the model takes and gives."""

    def __init__(self, inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo], metadata: Mapping[str, Any]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.metadata = metadata

    def infer(self, values: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
        """Make one call with converted values and give the outputs by name. Raises P2PNodeError."""
        raise P2PNodeError(f"{type(self).__name__} makes no calls")

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """Convert a feed, make one call, give the outputs in order."""
        names = list(output_names) if output_names else [info.name for info in self.outputs]
        outputs = self.infer(as_values(self.inputs, feed), names)
        return [outputs[name] for name in names]

    def close(self) -> None:
        """End the session."""


class _Attached:
    """Through a living daemon."""

    def __init__(self, daemon: DaemonConnection) -> None:
        self._daemon = daemon

    def run(self, spec: JobSpec) -> JobResult:
        head, outputs = self._run(spec, dry=False)
        return JobResult(
            **{**head, "receipts": tuple(head["receipts"]), "end_reason": EndReason(head["end_reason"])}, outputs=outputs
        )

    def dry_run(self, spec: JobSpec) -> dict[str, Any]:
        return self._run(spec, dry=True)[0]

    def _run(self, spec: JobSpec, *, dry: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        head = {"model": _absolute(spec.model), "outputs": list(spec.outputs), "terms": asdict(spec.terms), "dry_run": dry}
        return self._daemon.tensors("/v1/jobs/run", head, as_values((), spec.inputs))

    async def run_async(self, spec: JobSpec) -> JobResult:
        import trio

        return await trio.to_thread.run_sync(self.run, spec, abandon_on_cancel=True)

    def map(self, spec: MapSpec) -> Iterator[dict[str, Any]]:
        body = asdict(spec) | {name: _absolute(getattr(spec, name)) for name in ("model", "data", "output")}
        job = self._daemon.json("POST", "/v1/jobs/map", body)["job"]
        for event in self._daemon.lines(f"/v1/jobs/{job}/events"):
            yield {"job": job, **event}

    async def map_async(self, spec: MapSpec) -> dict[str, Any]:
        import trio

        def whole() -> dict[str, Any]:
            job = list(self.map(spec))[-1]["job"]
            return self._daemon.json("GET", f"/v1/jobs/{job}")  # type: ignore[no-any-return]

        return await trio.to_thread.run_sync(whole, abandon_on_cancel=True)

    def session(self, spec: SessionSpec) -> NetworkSession:
        return _AttachedSession(self._daemon, spec)

    def books(self, name: str) -> Any:
        return self._daemon.json("GET", f"/v1/{name}")[name]

    def close(self) -> None:
        pass


class _AttachedSession(NetworkSession):
    def __init__(self, daemon: DaemonConnection, spec: SessionSpec) -> None:
        told = daemon.json("POST", "/v1/session/open", {"model": _absolute(spec.model), "terms": asdict(spec.terms)})
        inputs, outputs = ([_info(item) for item in told[key]] for key in ("inputs", "outputs"))
        super().__init__(inputs, outputs, told.get("metadata", {}))
        self._daemon, self._name = daemon, told["session"]

    def infer(self, values: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
        return self._daemon.tensors("/v1/session/run", {"session": self._name, "outputs": list(names)}, values)[1]

    def close(self) -> None:
        self._daemon.json("POST", "/v1/session/close", {"session": self._name})

"""p2pnode for Python programs: `connect()`, `connect_async()`, and a drop-in for `onnxruntime.InferenceSession`.

A connection attaches to the daemon of the configured data folder (P2PNODE_HOME moves it) when one lives, and otherwise runs a
node inside this process. Amounts are integer micro-credits or texts in decimal credits; the provider sees all inputs.
"""

import atexit
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from p2pnode.attached import AttachedBackend
from p2pnode.control.client import ControlClient
from p2pnode.dropin import (
    CPU,
    ModelMetadata,
    NetworkSession,
    NodeArg,
    check_names,
    check_values,
    model_metadata,
    runtime_error,
    translated,
)
from p2pnode.embedded import EmbeddedBackend, NodeBackend, embedded_config, embedded_node
from p2pnode.errors import ConfigError, P2PNodeError
from p2pnode.jobs.feeds import as_values
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec, Terms
from p2pnode.node.config import NodeConfig, load_config
from p2pnode.units import parse_credits, parse_duration


def connect(home: str | Path | None = None, *, config: NodeConfig | None = None, embed: bool | None = None) -> "Connection":
    """Connect to the network, blocking. home: a folder in place of P2PNODE_HOME; config: settings in place of those there.

    embed: True runs a node in this process, False insists on a daemon, None takes a daemon when one lives. Close the
    connection, or use it in a `with` block. Raises ConfigError.
    """
    config = config or load_config(None if home is None else {**os.environ, "P2PNODE_HOME": str(home)})
    daemon = ControlClient(config.data_folder)
    if embed is not True and daemon.alive():
        return Connection(AttachedBackend(daemon))
    if embed is False:
        raise ConfigError(f"no p2pnode daemon runs on {config.data_folder}: start one with `p2pnode up`")
    return Connection(EmbeddedBackend(embedded_config(config)))


@asynccontextmanager
async def connect_async(home: str | Path | None = None, *, config: NodeConfig | None = None) -> AsyncIterator["AsyncConnection"]:
    """Connect from a trio program: `async with p2pnode.connect_async() as network: await network.run(…)`."""
    import trio

    config = config or load_config(None if home is None else {**os.environ, "P2PNODE_HOME": str(home)})
    daemon = ControlClient(config.data_folder)
    if await trio.to_thread.run_sync(daemon.alive):
        with Connection(AttachedBackend(daemon)) as connection:
            yield AsyncConnection(connection)
        return
    async with embedded_node(embedded_config(config)) as node:
        yield AsyncConnection(Connection(NodeBackend(node)))


class AsyncConnection:
    """A connection for trio. Methods and arguments are those of `Connection`."""

    def __init__(self, connection: "Connection") -> None:
        self._backend = connection.backend

    async def run(
        self, model: str | Path, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None, **terms: Any
    ) -> JobResult:
        """Run one inference. Cancelling cancels the job."""
        spec = JobSpec(str(model), inputs, tuple(outputs or ()), terms_of(terms))
        result: JobResult = await self._backend.run_async(spec)
        return result

    async def map(
        self,
        model: str | Path,
        data: str | Path,
        output: str | Path,
        *,
        outputs: Sequence[str] = (),
        batch: int = 0,
        **terms: Any,
    ) -> dict[str, Any]:
        """Run a model over a data set and give the ended job's description. Started again, it goes on."""
        spec = MapSpec(str(model), str(data), str(output), tuple(outputs), batch, terms_of(terms))
        description: dict[str, Any] = await self._backend.map_async(spec)
        return description


class Connection:
    """A blocking connection, usable from many threads. `terms` of its methods are the fields of `jobs.spec.Terms`."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, model: str | Path, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None, **terms: Any) -> JobResult:
        """Run one inference: outputs by name, provider, amount, seconds. model: a file, a model id or the start of one."""
        return self.backend.run(JobSpec(str(model), inputs, tuple(outputs or ()), terms_of(terms)))  # type: ignore[no-any-return]

    def dry_run(self, model: str | Path, inputs: Mapping[str, Any], **terms: Any) -> dict[str, Any]:
        """Give what `run` would do: providers in order, prices, rejected peers with reasons. Spends nothing."""
        return self.backend.dry_run(JobSpec(str(model), inputs, (), terms_of(terms)))  # type: ignore[no-any-return]

    def map(
        self,
        model: str | Path,
        data: str | Path,
        output: str | Path,
        *,
        outputs: Sequence[str] = (),
        batch: int = 0,
        **terms: Any,
    ) -> Iterator[dict[str, Any]]:
        """Run a model over a data set; gives progress (done, total, rate, spent, eta_seconds …) until it has ended.

        Killed at any point and called again with the same arguments, it goes on where it was and pays nothing twice.
        """
        spec = MapSpec(str(model), str(data), str(output), tuple(outputs), batch, terms_of(terms))
        return self.backend.map(spec)  # type: ignore[no-any-return]

    def session(self, model: str | Path, **terms: Any) -> NetworkSession:
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
        raise ConfigError(
            str(error).replace("Terms.__init__() got an unexpected keyword argument", "there is no term called")
        ) from error


_default: Connection | None = None
_default_lock = threading.Lock()


def default_connection() -> Connection:
    """Give the process's shared connection, made on first use and closed at exit."""
    global _default
    with _default_lock:
        if _default is None or not _default.backend.alive:
            _default = connect()
            atexit.register(_default.close)
        return _default


class InferenceSession:
    """`onnxruntime.InferenceSession`, run by providers of the network.

    The same arguments, methods, results and errors; execution providers and session options are accepted, since where
    and how the model runs is the network's choice. connection: in place of the shared one. terms: fields of
    `jobs.spec.Terms`, such as max_price="0.01" or local_fallback=True.
    """

    def __init__(
        self,
        path_or_bytes: str | bytes | os.PathLike[str],
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Mapping[Any, Any]] | None = None,
        *,
        connection: Connection | None = None,
        terms: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not isinstance(path_or_bytes, str | bytes | os.PathLike):
            raise TypeError(f"Unable to load from type '{type(path_or_bytes)}'")
        self._sess_options = sess_options
        self._set_providers(providers, provider_options)
        connection = connection or default_connection()
        try:
            self._session = _open(connection, path_or_bytes, dict(terms or {}))
        except P2PNodeError as error:
            raise translated(error) from error
        self._inputs = self._session.inputs
        self._names = [info.name for info in self._session.outputs]

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None) -> list[Any]:
        """Compute the outputs in order. Raises what ONNX Runtime would, and P2PNodeError for the network's own troubles."""
        check_names(self._inputs, input_feed)
        names = list(output_names) if output_names else self._names
        try:
            values = as_values(self._inputs, input_feed)
            check_values(self._inputs, self._session.outputs, names, values)
            outputs = self._session.infer(values, names)
        except P2PNodeError as error:
            raised = translated(error)
            if raised is error:
                raise
            raise raised from error
        return [outputs[name] for name in names]

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[list[Any] | None, Any, str], None],
        user_data: Any,
        run_options: Any = None,
    ) -> None:
        """Run in a thread and give `callback` the results, the user data, and an error's text or an empty one."""

        def work() -> None:
            try:
                results = self.run(output_names, input_feed, run_options)
            except Exception as error:  # ONNX Runtime hands every error to the callback as text
                callback(None, user_data, str(error))
            else:
                callback(results, user_data, "")

        threading.Thread(target=work, name="p2pnode-run-async", daemon=True).start()

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> None:
        """Refuse: bound device memory cannot cross the network."""
        raise runtime_error("NotImplemented", "p2pnode cannot bind device memory of another machine; use run()")

    def io_binding(self) -> None:
        """Refuse, like `run_with_iobinding`."""
        raise runtime_error("NotImplemented", "p2pnode cannot bind device memory of another machine; use run()")

    def run_with_ort_values(self, output_names: Any, input_dict_ort_values: Any, run_options: Any = None) -> None:
        """Refuse: an OrtValue belongs to one process."""
        raise runtime_error("NotImplemented", "p2pnode takes arrays, not OrtValues; use run()")

    def get_inputs(self) -> list[NodeArg]:
        """Give the inputs."""
        return [NodeArg(info) for info in self._inputs]

    def get_outputs(self) -> list[NodeArg]:
        """Give the outputs."""
        return [NodeArg(info) for info in self._session.outputs]

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Give none: initialisers travel with the model."""
        return []

    def get_modelmeta(self) -> ModelMetadata:
        """Give what the model says about itself."""
        return model_metadata(self._session.metadata)

    def get_providers(self) -> list[str]:
        """Give the execution providers asked for that any node has, which is the processor."""
        return list(self._providers)

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """Give the options, which are kept but have no effect at a provider."""
        return {name: dict(self._options.get(name, {})) for name in self._providers}

    def set_providers(self, providers: Sequence[Any] | None = None, provider_options: Any = None) -> None:
        """Take another list of execution providers."""
        self._set_providers(providers, provider_options)

    def get_session_options(self) -> Any:
        """Give the session options as they were passed, or ONNX Runtime's default ones."""
        if self._sess_options is None:
            os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
            from onnxruntime import SessionOptions

            self._sess_options = SessionOptions()
        return self._sess_options

    def disable_fallback(self) -> None:
        """Accepted; there is no execution provider to fall back from."""

    def enable_fallback(self) -> None:
        """Accepted; there is no execution provider to fall back from."""

    def end_profiling(self) -> str:
        """Give an empty file name: nothing is profiled here."""
        return ""

    def get_profiling_start_time_ns(self) -> int:
        """Give 0: nothing is profiled here."""
        return 0

    def close(self) -> None:
        """End the agreements now instead of when the connection closes."""
        self._session.close()

    def _set_providers(self, providers: Sequence[Any] | None, options: Any) -> None:
        if providers is not None and (isinstance(providers, str) or not isinstance(providers, Sequence)):
            raise ValueError("'providers' should be a sequence.")
        asked = [item if isinstance(item, str) else item[0] for item in providers or ()]
        self._options = {item[0]: dict(item[1]) for item in providers or () if not isinstance(item, str)}
        if options is not None:
            if len(options) != len(asked):
                raise ValueError("'providers' and 'provider_options' should be the same length if both are given.")
            self._options = dict(zip(asked, map(dict, options), strict=True))
        self._providers = [CPU]


def _open(connection: Connection, path_or_bytes: str | bytes | os.PathLike[str], terms: dict[str, Any]) -> NetworkSession:
    if not isinstance(path_or_bytes, bytes):
        path = os.fspath(path_or_bytes)
        if not os.path.isfile(path):
            raise runtime_error("NoSuchFile", f"Load model from {path} failed:Load model {path} failed. File doesn't exist")
        return connection.session(path, **terms)
    with tempfile.TemporaryDirectory(prefix="p2pnode-") as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(path_or_bytes)
        return connection.session(file, **terms)


@contextmanager
def patch_onnxruntime(connection: Connection | None = None, **terms: Any) -> Iterator[Any]:
    """Replace `onnxruntime.InferenceSession` within the block, so that unmodified packages run over the network.

    Packages that look the class up when they need it (`onnxruntime.InferenceSession(...)`) are served; a name imported
    before (`from onnxruntime import InferenceSession`) stays ONNX Runtime's own. Sessions made in the block stay usable
    after it; `close_all` of the class that the block gives ends their agreements before the connection closes.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    opened: list[InferenceSession] = []

    class Patched(InferenceSession):
        """An InferenceSession on the connection given to `patch_onnxruntime`."""

        def __init__(self, path_or_bytes: Any, *arguments: Any, **options: Any) -> None:
            options.setdefault("connection", connection)
            options.setdefault("terms", terms)
            super().__init__(path_or_bytes, *arguments, **options)
            opened.append(self)

        @staticmethod
        def close_all() -> None:
            """End the agreements of every session made in the block."""
            while opened:
                opened.pop().close()

    original = onnxruntime.InferenceSession
    onnxruntime.InferenceSession = Patched
    try:
        yield Patched
    finally:
        onnxruntime.InferenceSession = original

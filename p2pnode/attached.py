"""The way to a living daemon for programs: its control socket, with tensors in the body.

Blocking and usable from many threads: each thread keeps a connection of its own, so calls do not wait for one another.
"""

import http.client
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from p2pnode import errors
from p2pnode.dropin import NetworkSession
from p2pnode.jobs.feeds import ValueInfo, as_values
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec
from p2pnode.reasons import EndReason, Reason
from p2pnode.wire.tensors import decode_values, encode_values, headers_bytes, parse_headers

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 3600.0
_SIZES: Final = struct.Struct("<II")


class DaemonConnection:
    """Calls to the daemon on one data folder."""

    def __init__(self, data_folder: Path) -> None:
        self._data_folder = data_folder
        self._local = threading.local()
        self._lock = threading.Lock()
        self._kept: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        """Close the connections of all threads; a later call opens a new one."""
        with self._lock:
            kept, self._kept = self._kept, []
        for connection in kept:
            connection.close()

    def alive(self) -> bool:
        """Say whether a daemon answers here."""
        try:
            self.json("GET", "/v1/alive")
        except errors.P2PNodeError:
            return False
        return True

    def json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Exchange JSON. Raises the daemon's own error."""
        data = b"" if body is None else json.dumps(body).encode()
        return json.loads(self._exchange(method, path, data, "application/json") or b"null")

    def tensors(self, path: str, head: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """POST a JSON head with values, get the same back. Arrays of the answer are views into it."""
        answer = self._exchange("POST", path, pack(head, values), "application/octet-stream")
        return unpack(answer)

    def lines(self, path: str) -> Iterator[dict[str, Any]]:
        """Give the objects of a streaming answer as they come."""
        connection = self._open()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status >= 400:
                raise _error(response.status, response.read())
            while line := response.readline():
                yield json.loads(line)
        except (OSError, http.client.HTTPException) as error:
            raise errors.Unreachable(f"the daemon stopped answering: {error}") from error
        finally:
            connection.close()

    def _exchange(self, method: str, path: str, body: bytes, kind: str) -> bytes:
        for attempt in (1, 2):
            kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            if kept is not None and kept.sock is None:
                kept = None
            connection = kept or self._open()
            if kept is None:
                self._keep(connection)
            try:
                connection.request(method, path, body=body, headers={"content-type": kind})
                response = connection.getresponse()
                data = response.read()
            except (OSError, http.client.HTTPException) as error:
                self._drop(connection)
                # A kept connection may have been closed for idleness before it saw the request: once more on a new one.
                if kept is not None and attempt == 1 and isinstance(error, http.client.RemoteDisconnected | BrokenPipeError):
                    continue
                raise errors.Unreachable(f"the daemon did not answer: {error}") from error
            if response.will_close:
                self._drop(connection)
            if response.status >= 400:
                raise _error(response.status, data)
            return data
        raise errors.Unreachable("the daemon did not answer")

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        self._local.connection = connection
        with self._lock:
            self._kept.append(connection)

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._local.connection = None
        with self._lock:
            if connection in self._kept:
                self._kept.remove(connection)

    def _open(self) -> http.client.HTTPConnection:
        connection = _UnixConnection(_socket_path(self._data_folder))
        try:
            connection.connect()
        except OSError as error:
            raise errors.Unreachable(f"no p2pnode daemon answers on {self._data_folder}: start one with `p2pnode up`") from error
        return connection


def pack(head: Mapping[str, Any], values: Mapping[str, Any]) -> bytes:
    """Give a body: sizes, JSON head, value headers, padding to 64, payload (the control API's tensor form)."""
    head_bytes = json.dumps(head).encode()
    headers, chunks, _ = encode_values(values)
    encoded = headers_bytes(headers)
    start = _SIZES.size + len(head_bytes) + len(encoded)
    return b"".join((_SIZES.pack(len(head_bytes), len(encoded)), head_bytes, encoded, bytes(-start % 64), *chunks))


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give head and values of a body."""
    view = memoryview(body)
    head_size, headers_size = _SIZES.unpack(view[: _SIZES.size])
    middle = _SIZES.size + head_size
    end = middle + headers_size
    head = json.loads(bytes(view[_SIZES.size : middle]))
    return head, decode_values(parse_headers(bytes(view[middle:end])), view[end + -end % 64 :])


class AttachedBackend:
    """What a connection does, done by the daemon."""

    def __init__(self, daemon: DaemonConnection) -> None:
        self._daemon = daemon
        self._open_sessions: dict[str, Callable[[], None]] = {}

    def run(self, spec: JobSpec) -> JobResult:
        """Run one inference."""
        head, outputs = self._run(spec, dry=False)
        return JobResult(
            **{**head, "receipts": tuple(head["receipts"]), "end_reason": EndReason(head["end_reason"])}, outputs=outputs
        )

    def dry_run(self, spec: JobSpec) -> dict[str, Any]:
        """Say what a run would do."""
        return self._run(spec, dry=True)[0]

    def _run(self, spec: JobSpec, *, dry: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        head = {"model": _absolute(spec.model), "outputs": list(spec.outputs), "terms": asdict(spec.terms), "dry_run": dry}
        return self._daemon.tensors("/v1/jobs/run", head, as_values((), spec.inputs))

    async def run_async(self, spec: JobSpec) -> JobResult:
        """Run one inference; cancelled, the daemon finishes it."""
        import trio

        return await trio.to_thread.run_sync(self.run, spec, abandon_on_cancel=True)

    def map(self, spec: MapSpec) -> Iterator[dict[str, Any]]:
        """Start a map, or go on with it, and follow it."""
        body = asdict(spec) | {name: _absolute(getattr(spec, name)) for name in ("model", "data", "output")}
        job = self._daemon.json("POST", "/v1/jobs/map", body)["job"]
        for event in self._daemon.lines(f"/v1/jobs/{job}/events"):
            yield {"job": job, **event}

    async def map_async(self, spec: MapSpec) -> dict[str, Any]:
        """The same for trio; gives the ended job's description."""
        import trio

        def whole() -> dict[str, Any]:
            job = list(self.map(spec))[-1]["job"]
            return self._daemon.json("GET", f"/v1/jobs/{job}")  # type: ignore[no-any-return]

        return await trio.to_thread.run_sync(whole, abandon_on_cancel=True)

    def session(self, spec: SessionSpec) -> NetworkSession:
        """Open a session."""
        told = self._daemon.json("POST", "/v1/session/open", {"model": _absolute(spec.model), "terms": asdict(spec.terms)})
        name = told["session"]

        def infer(values: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
            return self._daemon.tensors("/v1/session/run", {"session": name, "outputs": list(names)}, values)[1]

        def close() -> None:
            if self._open_sessions.pop(name, None) is not None:
                self._daemon.json("POST", "/v1/session/close", {"session": name})

        inputs, outputs = ([_info(item) for item in told[key]] for key in ("inputs", "outputs"))
        self._open_sessions[name] = close
        return NetworkSession(inputs, outputs, told.get("metadata", {}), infer, close)

    def books(self, name: str) -> Any:
        """Give `offers`, `models` or `receipts`."""
        return self._daemon.json("GET", f"/v1/{name}")[name]

    def close(self) -> None:
        """End what was opened here; the daemon lives on."""
        for close in list(self._open_sessions.values()):
            try:
                close()
            except errors.P2PNodeError:
                break
        self._daemon.close()

    @property
    def alive(self) -> bool:
        """Say whether the daemon still answers."""
        return self._daemon.alive()


def _absolute(text: str) -> str:
    """Give a path as the daemon, which runs elsewhere, has to know it; ids stay as they are."""
    return os.path.abspath(text) if os.path.exists(text) or text.endswith(".onnx") or os.sep in text else text


def _info(item: Mapping[str, Any]) -> ValueInfo:
    return ValueInfo(item["name"], item["type"], tuple(item["shape"]))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connecting.settimeout(CONNECT_SECONDS)
        try:
            connecting.connect(str(self._path))
        except BaseException:  # whatever it was, nothing is left open
            connecting.close()
            raise
        connecting.settimeout(self.timeout)
        self.sock = connecting


def _socket_path(data_folder: Path) -> Path:
    """Where the daemon's socket lies: in the data folder, or where a record there says (a path has at most 107 bytes)."""
    try:
        return Path((data_folder / "api.path").read_text().strip())
    except OSError:
        return data_folder / "api.sock"


def _error(status: int, data: bytes) -> errors.P2PNodeError:
    try:
        told = json.loads(data)["error"]
        kind, reason, message = told.get("kind", ""), told.get("reason", ""), told.get("message", "")
    except (ValueError, KeyError, TypeError):
        return errors.P2PNodeError(f"the daemon answered {status} without a reason")
    cls = getattr(errors, kind, errors.P2PNodeError)
    if cls in (errors.Refused, errors.WorkError, errors.ProtocolViolation):
        try:
            return cls(Reason(reason), message)
        except ValueError:
            return errors.P2PNodeError(message)
    return cls(message)

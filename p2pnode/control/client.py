"""Talks to a running daemon over its control socket, blocking; each thread keeps a connection of its own.

Errors that the daemon reports come back as the same classes from `errors.py`, so a command behaves alike whether it attached
to a daemon or embedded a node.
"""

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlencode

import p2pnode.errors as errors
from p2pnode.control.places import find_socket
from p2pnode.control.tensor_body import pack, unpack
from p2pnode.environment import Buffer
from p2pnode.reasons import Reason

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 3600.0


class ControlError(errors.P2PNodeError):
    """The daemon answered with an error. Its message says what to do; `p2pnode status` shows how it is.

    status: the HTTP status; reason: a short stable word such as `not-found`.
    """

    def __init__(self, status: int, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.hint = hint


class ControlClient:
    """A client of the daemon on one data folder, usable from many threads. Close it or use it as a context."""

    def __init__(self, data_folder: Path | str, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._data_folder = Path(data_folder)
        self._answer_seconds = answer_seconds
        self._local = threading.local()
        self._lock = threading.Lock()
        self._kept: list[_UnixConnection] = []

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of all threads; a later call opens a new one."""
        with self._lock:
            kept, self._kept = self._kept, []
        for connection in kept:
            connection.close()

    def alive(self) -> bool:
        """Say whether a daemon answers here."""
        try:
            self.get("/v1/alive")
        except (errors.P2PNodeError, OSError):
            return False
        return True

    def get(self, path: str, **query: Any) -> Any:
        """GET and give the JSON answer. Keyword arguments become the query, None ones are left out."""
        wanted = {name: str(value) for name, value in query.items() if value is not None}
        return self._json("GET", f"{path}?{urlencode(wanted)}" if wanted else path)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """POST JSON and give the JSON answer."""
        return self._json("POST", path, body or {})

    def delete(self, path: str) -> Any:
        """DELETE and give the JSON answer."""
        return self._json("DELETE", path)

    def text(self, path: str) -> str:
        """GET and give the answer as text."""
        return self.exchange("GET", path).decode()

    def post_bytes(self, path: str, body: Buffer, headers: Mapping[str, str] | None = None) -> bytes:
        """POST binary data and give the binary answer."""
        return self._exchange("POST", path, body, {"content-type": "application/octet-stream", **(headers or {})})

    def tensors(self, path: str, head: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """POST a JSON head with values, get the same back. Arrays of the answer are views into it."""
        return unpack(self.post_bytes(path, pack(head, values)))

    def exchange(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request with a JSON body, if any, and give the answer's bytes. Raises the daemon's own error."""
        return self._exchange(method, path, body, {"content-type": "application/json"})

    def lines(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """GET (or POST, with a body) a streaming answer and give its objects as they come.

        It has its own connection, closed when the iterator ends or is closed.
        """
        connection = self._connect()
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, body=data)
            response = connection.getresponse()
            if response.status >= 400:
                raise error_of(response.status, response.read())
            while line := response.readline():
                value = json.loads(line)
                if set(value) == {"error"}:
                    raise error_of(500, line)
                yield value
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise errors.Unreachable(f"the daemon stopped answering: {error}") from error
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = b"" if body is None else json.dumps(body).encode()
        return json.loads(self.exchange(method, path, data) or b"null")

    def _exchange(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> bytes:
        for attempt in (1, 2):
            kept: _UnixConnection | None = getattr(self._local, "connection", None)
            connection = kept or self._keep(self._connect())
            try:
                connection.request(method, path, body=body, headers=dict(headers))
                response = connection.getresponse()
                data = response.read()
            except (OSError, http.client.HTTPException) as error:
                self._drop(connection)
                # A kept connection may have been closed for idleness before it saw the request: once more on a new one.
                if kept is None or attempt == 2 or not isinstance(error, http.client.RemoteDisconnected | BrokenPipeError):
                    raise errors.Unreachable(f"the daemon did not answer: {error}") from error
                continue
            if response.will_close:
                self._drop(connection)
            if response.status >= 400:
                raise error_of(response.status, data)
            return data
        raise errors.Unreachable("the daemon did not answer")

    def _keep(self, connection: "_UnixConnection") -> "_UnixConnection":
        self._local.connection = connection
        with self._lock:
            self._kept.append(connection)
        return connection

    def _drop(self, connection: "_UnixConnection") -> None:
        connection.close()
        self._local.connection = None
        with self._lock:
            if connection in self._kept:
                self._kept.remove(connection)

    def _connect(self) -> "_UnixConnection":
        connection = _UnixConnection(find_socket(self._data_folder), self._answer_seconds)
        try:
            connection.connect()
        except OSError as error:
            raise errors.Unreachable(f"no p2pnode daemon answers on {self._data_folder}: start one with `p2pnode up`") from error
        return connection


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, answer_seconds: float) -> None:
        super().__init__("localhost", timeout=answer_seconds)
        self._path = path

    def connect(self) -> None:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connecting.settimeout(CONNECT_SECONDS)
            connecting.connect(str(self._path))
            connecting.settimeout(self.timeout)
        except BaseException:  # the socket must not leak, whatever happened
            connecting.close()
            raise
        self.sock = connecting


def error_of(status: int, data: bytes) -> errors.P2PNodeError:
    """Give the error behind an error answer: the daemon's own class where it has one."""
    try:
        told = json.loads(data)["error"]
        reason, message, hint, kind = told["reason"], told["message"], told.get("hint", ""), told.get("kind", "")
    except (ValueError, KeyError, TypeError):
        return ControlError(status, "bad-answer", f"the daemon answered {status} without a reason")
    cls = getattr(errors, kind, None) if kind else None
    if not (isinstance(cls, type) and issubclass(cls, errors.P2PNodeError)):
        return ControlError(status, reason, message, hint)
    if cls in (errors.Refused, errors.ProtocolViolation, errors.WorkError):
        try:
            return cls(Reason(reason), message)
        except ValueError:
            return ControlError(status, reason, message, hint)
    return cls(message)

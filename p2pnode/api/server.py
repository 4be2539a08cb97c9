"""Serves the control API on its Unix socket and translates errors into answers.

The socket is 0600 and the kernel's word about the caller's user id is checked besides, so that a mistake with permissions
does not hand the node over. TCP is never bound here: a browser or another user must not reach the owner's controls.
"""

import logging
import os
import socket
import struct
from pathlib import Path
from typing import Final

import trio

from p2pnode import errors
from p2pnode.api.http import JSON_BODY_BYTES_MAX, Answer, HttpConnection, HttpError, Reply, Request
from p2pnode.api.routes import Control, Routes, all_routes
from p2pnode.control.places import choose_socket
from p2pnode.node.main import Daemon
from p2pnode.reasons import Reason

CONNECTIONS_MAX: Final = 64
TENSOR_BODY_BYTES_MAX: Final = 1 << 30
BACKLOG: Final = 64
_STATUS: Final = (
    (errors.ConfigError, 400),
    (errors.WorkError, 422),
    (errors.Refused, 409),
    (errors.Unreachable, 503),
    (errors.TooSlow, 504),
    (errors.PeerError, 502),
    (errors.P2PNodeError, 500),
)
_log = logging.getLogger(__name__)


class ControlServer:
    """The control API of one daemon."""

    def __init__(self, daemon: Daemon, routes: Routes | None = None) -> None:
        self._config = daemon.node.config
        self._routes = routes or all_routes()
        self._control = Control(daemon)
        self._open = 0
        self.path = self._config.socket_file

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; open sessions end and the socket's file is removed."""
        self.path = choose_socket(self._config.data_folder, self._config.socket_file)
        listener = _listen(self.path)
        try:
            async with trio.open_nursery() as nursery:
                self._control.nursery = nursery
                task_status.started()
                await trio.serve_listeners(self._serve, [listener])
        finally:
            self.path.unlink(missing_ok=True)
            with trio.move_on_after(2, shield=True):
                await self._control.aclose()

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if self._open >= CONNECTIONS_MAX or not _is_owner(stream.socket):
                return
            self._open += 1
            try:
                await HttpConnection(stream, self.dispatch, self._body_limit).serve()
            except OSError as error:
                _log.debug("control connection ended: %s", error)
            finally:
                self._open -= 1

    async def dispatch(self, request: Request) -> Reply:
        """Answer one request; every error becomes an answer with a reason, a message and a hint."""
        try:
            return await self._routes.dispatch(self._control, request)
        except HttpError as error:
            return error.answer()
        except errors.P2PNodeError as error:
            return answer_of(error)
        except Exception as error:  # a bug in one answer must not stop the daemon; it is logged and told
            _log.error("bug in %s %s", request.method, "/".join(request.path), exc_info=error)
            return answer_of(errors.P2PNodeError(f"{type(error).__name__}: {error}"))

    def _body_limit(self, method: str, path: tuple[str, ...]) -> int:
        return TENSOR_BODY_BYTES_MAX if self._routes.takes_bytes(method, path) else JSON_BODY_BYTES_MAX


def answer_of(error: errors.P2PNodeError) -> Answer:
    """Give the answer for one of our errors. The hint is the end of the class's docstring, as the command line prints it."""
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    reason, message = type(error).__name__.lower(), str(error)
    told = getattr(error, "reason", None)
    if isinstance(told, Reason):
        reason, message = told.value, str(getattr(error, "detail", "")) or told.value
    words = " ".join((type(error).__doc__ or "").split("\n\n")[0].split())
    return HttpError(status, reason, message, words.partition(". ")[2], type(error).__name__).answer()


def _listen(path: Path) -> trio.SocketListener:
    # The data folder's lock is ours, so whatever lies here is from a daemon that died.
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    former = os.umask(0o177)
    try:
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        raise errors.ConfigError(f"the control socket {path} cannot be made: {error.strerror}") from error
    finally:
        os.umask(former)
    bound.listen(BACKLOG)
    return trio.SocketListener(trio.socket.from_stdlib_socket(bound))


def _is_owner(caller: trio.socket.SocketType) -> bool:
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] in (os.getuid(), 0))

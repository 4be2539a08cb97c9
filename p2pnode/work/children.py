"""The daemon's side of child processes: the zygote it talks to, and a handle on each child.

All of it runs in the event loop. A child is known by a pidfd that the zygote opened before it could reap it, so a signal
never reaches a stranger that got the same process id.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack
import trio

import p2pnode
from p2pnode.errors import ConfigError, WorkError
from p2pnode.reasons import Reason
from p2pnode.work.zygote import ENVIRONMENT, REQUEST_BYTES_MAX

_STATUS_WAIT_SECONDS: Final = 1.0
_RESTART_SECONDS: Final = 0.5
_FAILED_STARTS_MAX: Final = 3
_KEPT_STATUSES_MAX: Final = 1024


class Child:
    """A confined process. `close` frees the descriptors and must be called once it has ended."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._status: int | None = None
        self._reported = trio.Event()

    def report(self, status: int | None) -> None:
        """Note the exit code, negative for a signal, None when nobody knows it."""
        self._status = status
        self._reported.set()

    def kill(self) -> None:
        """SIGKILL. Does nothing to a process that has ended."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    async def wait(self) -> int | None:
        """Wait until the process has ended. Gives its exit code, negative for a signal, None when unknown."""
        if self._pidfd >= 0:
            await trio.lowlevel.wait_readable(self._pidfd)
        with trio.move_on_after(_STATUS_WAIT_SECONDS):
            await self._reported.wait()
        return self._status

    def close(self) -> None:
        """Free the descriptor. Idempotent."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def destroy(self) -> None:
        """Kill, wait until the process is gone, free the descriptor; not cancellable, and bounded by two seconds."""
        self.kill()
        with trio.move_on_after(2, shield=True):
            await self.wait()
        self.close()


class Zygote:
    """The process that forks. Started by `run` and started again when it dies; its children die with it."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**_child_environment(), **(environment or {})}
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = trio.Event()
        self._next_id = 0
        self._waiting: dict[int, _Pending] = {}
        self._children: dict[int, Child] = {}
        self._statuses: dict[int, int] = {}

    @property
    def pid(self) -> int:
        """Process id of the zygote running now, 0 when there is none."""
        return self._process.pid if self._process else 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a zygote alive until cancelled; then it and all its children are killed. Raises ConfigError if none starts."""
        failures = 0
        is_first = True
        try:
            while True:
                self._start()
                was_ready = await self._read_reports()
                complaint = self._stop()
                failures = 0 if was_ready else failures + 1
                if failures >= _FAILED_STARTS_MAX or (is_first and not was_ready):
                    raise ConfigError(f"the sandbox's zygote does not start: {complaint or 'it gave no reason'}")
                await trio.sleep(_RESTART_SECONDS if failures else 0)
                is_first = False
        finally:
            self._stop()

    async def wait_ready(self) -> None:
        """Wait until a zygote takes requests."""
        await self._ready.wait()

    async def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> Child:
        """Start a child; the descriptors stay the caller's. Raises WorkError. Cancelled, it leaves no child behind."""
        await self._ready.wait()
        if self._control is None:
            raise WorkError(Reason.WORKER_DIED, "the zygote ended")
        self._next_id += 1
        identifier = self._next_id
        pending = self._waiting[identifier] = _Pending()
        try:
            socket.send_fds(self._control, [msgpack.packb({**request, "id": identifier})], list(descriptors))
        except OSError as error:
            del self._waiting[identifier]
            raise WorkError(Reason.WORKER_DIED, f"the zygote took no request: {error.strerror}") from error
        try:
            await pending.answered.wait()
        except trio.Cancelled:
            pending.abandoned = True
            if pending.child is not None:
                pending.child.kill()
                pending.child.close()
            raise
        if pending.child is None:
            raise WorkError(Reason.WORKER_DIED, "the zygote ended")
        return pending.child

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            # Not in a helper thread: the kernel ties "die with the parent" to the thread that starts the process.
            self._process = start_process(theirs, "fork", self._environment)
        self._control = ours

    async def _read_reports(self) -> bool:
        """Handle what the zygote says until it ends. Gives whether it ever was ready."""
        control = self._control
        was_ready = False
        while control is not None:
            await trio.lowlevel.wait_readable(control)
            try:
                data, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES_MAX, 1)
            except BlockingIOError:
                continue
            except OSError:
                break
            if not data:
                break
            report = msgpack.unpackb(data)
            if "ready" in report:
                was_ready = True
                self._ready.set()
            elif "forked" in report:
                self._adopt(report["forked"], report["pid"], descriptors[0])
            elif "ended" in report:
                self._note_end(report["ended"], report["status"])
            else:
                raise ConfigError(str(report.get("broken", "the zygote speaks nonsense")))
        return was_ready

    def _adopt(self, identifier: int, pid: int, pidfd: int) -> None:
        child = Child(pid, pidfd)
        if pid in self._statuses:
            child.report(self._statuses.pop(pid))
        else:
            self._children[pid] = child
        pending = self._waiting.pop(identifier)
        if pending.abandoned:
            child.kill()
            child.close()
            return
        pending.child = child
        pending.answered.set()

    def _note_end(self, pid: int, status: int) -> None:
        child = self._children.pop(pid, None)
        if child is not None:
            child.report(status)
        elif len(self._statuses) < _KEPT_STATUSES_MAX:
            self._statuses[pid] = status

    def _stop(self) -> str:
        """Kill the zygote, and with it its children; fail what waits for it. Gives the last of what it wrote to its log."""
        if self._ready.is_set():
            self._ready = trio.Event()
        if self._control is not None:
            self._control.close()
            self._control = None
        complaint = ""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                complaint = (self._process.stderr.read(REQUEST_BYTES_MAX) or b"").decode("utf-8", "replace").strip()[-500:]
                self._process.stderr.close()
            self._process = None
        waiting, self._waiting = self._waiting, {}
        for pending in waiting.values():
            pending.answered.set()
        children, self._children = self._children, {}
        for child in children.values():
            child.report(None)
        self._statuses.clear()
        return complaint


class _Pending:
    def __init__(self) -> None:
        self.answered = trio.Event()
        self.child: Child | None = None
        self.abandoned = False


async def spawn(request: Mapping[str, Any], descriptors: Sequence[int]) -> Child:
    """Start a child by a fresh start instead of a fork, for drivers that do not survive one. Cancelled, it leaves none behind."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = start_process(theirs, "single", _child_environment())
        child = _SpawnedChild(process)
        try:
            await trio.lowlevel.wait_readable(ours)
            if not ours.recv(REQUEST_BYTES_MAX):
                raise WorkError(Reason.WORKER_DIED, "the process for the device did not start")
            socket.send_fds(ours, [msgpack.packb(dict(request))], list(descriptors))
        except BaseException:  # whatever it was, nothing is left open
            await child.destroy()
            raise
    return child


class _SpawnedChild(Child):
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        super().__init__(process.pid, os.pidfd_open(process.pid))
        self._process = process

    async def wait(self) -> int | None:
        await trio.lowlevel.wait_readable(self._pidfd)
        return self._process.wait()

    def close(self) -> None:
        super().close()
        if self._process.stderr is not None:
            self._process.stderr.close()


def start_process(control: socket.socket, mode: str, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start `work.zygote` with one end of a socket pair. The caller waits for the process."""
    arguments = [str(control.fileno()), str(os.getpid()), mode]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "p2pnode.work.zygote", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[control.fileno()],
        env=dict(environment),
        cwd="/",
        start_new_session=True,
    )
    if process.stderr is not None:
        os.set_blocking(process.stderr.fileno(), False)
    return process


def _child_environment() -> dict[str, str]:
    # Nothing of the owner's environment reaches a stranger's code, but for where libraries are found.
    environment = dict(ENVIRONMENT)
    package_parent = str(Path(p2pnode.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([package_parent, *filter(os.path.isabs, sys.path)]))
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment["LC_ALL"] = "C.UTF-8"
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment

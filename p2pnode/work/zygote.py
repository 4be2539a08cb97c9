"""The zygote: a process that has imported everything, knows nothing, and forks a confined child for each request.

Started by `work.children` as `python -P -m p2pnode.work.zygote DESCRIPTOR PARENT MODE`. It has one thread, so a fork is safe
and takes milliseconds where a fresh start takes a quarter of a second; no session is ever made in it. It parses nothing
from strangers. Requests (msgpack + descriptors) arrive on a SOCK_SEQPACKET socket; it answers with a pidfd and, later, the
exit status. MODE `fork` serves requests; MODE `single` becomes the child of its one request, for drivers that do not
survive a fork.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
from typing import Any, Final, NoReturn

REQUEST_BYTES_MAX: Final = 65536
DESCRIPTORS_MAX: Final = 8
# Read by the libraries when they are imported: no telemetry, no thread pools.
ENVIRONMENT: Final = {
    "ORT_DISABLE_TELEMETRY": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# A confined child opens no files, so whatever it may need is imported before the fork.
PRELOADED: Final = (
    "encodings.idna",
    "encodings.latin_1",
    "encodings.utf_8",
    "msgpack",
    "numpy",
    "onnx",
    "onnx.checker",
    "onnx.helper",
    "onnx.numpy_helper",
    "onnx.shape_inference",
    "onnxruntime",
    "p2pnode.work.confined",
    "p2pnode.work.worker",
)


def main(arguments: list[str]) -> int:
    """Run the zygote until its socket closes. arguments: socket descriptor, process id of the daemon, mode."""
    descriptor, parent, mode = int(arguments[0]), int(arguments[1]), arguments[2]
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from p2pnode.work import sandbox

    sandbox.die_with_parent(parent)
    control = socket.socket(fileno=descriptor)
    _import_everything()
    threads = len(os.listdir("/proc/self/task"))
    import msgpack

    if threads != 1 and mode == "fork":
        control.send(msgpack.packb({"broken": f"the zygote has {threads} threads after its imports, so it cannot fork safely"}))
        return 1
    gc.collect()
    gc.freeze()
    control.send(msgpack.packb({"ready": threads}))
    if mode == "single":
        _become_child(control, parent)
    _serve(control)
    return 0


def _import_everything() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        # Only where the package is installed do the types exist that numpy lacks.
        importlib.import_module("ml_dtypes")
    import numpy
    import onnx
    import onnxruntime

    from p2pnode.work import confined

    onnxruntime.set_default_logger_severity(4)
    confined.load_all()
    # First uses that import lazily.
    str(numpy.zeros(1))
    onnx.numpy_helper.from_array(numpy.zeros(1, numpy.float32))


def _receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    import msgpack

    data, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES_MAX, DESCRIPTORS_MAX)
    return (msgpack.unpackb(data, strict_map_key=False), descriptors) if data else None


def _become_child(control: socket.socket, parent: int) -> None:
    from p2pnode.work import worker

    received = _receive(control)
    if received is not None:
        control.close()
        worker.run_child(*received, parent)


def _serve(control: socket.socket) -> None:
    import msgpack

    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(woken, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll()}
        if woken.fileno() in ready:
            _drain(woken)
            _report_ends(control)
        if control.fileno() not in ready:
            continue
        received = _receive(control)
        if received is None:
            return
        request, descriptors = received
        zygote = os.getpid()
        child = os.fork()
        if child == 0:
            _run_fork(request, descriptors, zygote)
        for descriptor in descriptors:
            os.close(descriptor)
        pidfd = os.pidfd_open(child)
        socket.send_fds(control, [msgpack.packb({"forked": request["id"], "pid": child})], [pidfd])
        os.close(pidfd)


def _run_fork(request: dict[str, Any], descriptors: list[int], zygote: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        from p2pnode.work import worker

        worker.run_child(request, descriptors, zygote)
    finally:
        os._exit(1)


def _drain(woken: socket.socket) -> None:
    try:
        while woken.recv(4096):
            pass
    except BlockingIOError:
        pass


def _report_ends(control: socket.socket) -> None:
    import msgpack

    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if child == 0:
            return
        control.send(msgpack.packb({"ended": child, "status": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

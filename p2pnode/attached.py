"""What a connection does, done by a living daemon on this data folder."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from p2pnode import errors
from p2pnode.control.client import ControlClient
from p2pnode.dropin import NetworkSession
from p2pnode.jobs.feeds import ValueInfo, as_values
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec
from p2pnode.reasons import EndReason


class AttachedBackend:
    """What a connection does, done by the daemon."""

    def __init__(self, daemon: ControlClient) -> None:
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
        job = self._daemon.post("/v1/jobs/map", body)["job"]
        for event in self._daemon.lines(f"/v1/jobs/{job}/events"):
            yield {"job": job, **event}

    async def map_async(self, spec: MapSpec) -> dict[str, Any]:
        """The same for trio; gives the ended job's description."""
        import trio

        def whole() -> dict[str, Any]:
            job = list(self.map(spec))[-1]["job"]
            return self._daemon.get(f"/v1/jobs/{job}")  # type: ignore[no-any-return]

        return await trio.to_thread.run_sync(whole, abandon_on_cancel=True)

    def session(self, spec: SessionSpec) -> NetworkSession:
        """Open a session."""
        told = self._daemon.post("/v1/session/open", {"model": _absolute(spec.model), "terms": asdict(spec.terms)})
        name = told["session"]

        def infer(values: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
            return self._daemon.tensors("/v1/session/run", {"session": name, "outputs": list(names)}, values)[1]

        def close() -> None:
            if self._open_sessions.pop(name, None) is not None:
                self._daemon.post("/v1/session/close", {"session": name})

        inputs, outputs = ([_info(item) for item in told[key]] for key in ("inputs", "outputs"))
        self._open_sessions[name] = close
        return NetworkSession(inputs, outputs, told.get("metadata", {}), infer, close)

    def books(self, name: str) -> Any:
        """Give `offers`, `models` or `receipts`."""
        return self._daemon.get(f"/v1/{name}")[name]

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

"""Routes by which commands and programs buy: single runs, maps, sessions, and the list of jobs."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from msgspec import structs

from p2pnode.api.http import BYTES_TYPE, Answer, HttpError, Lines, Reply, Request, json_answer
from p2pnode.api.routes import Control, Route
from p2pnode.control.tensor_body import pack, unpack
from p2pnode.errors import ConfigError, ProtocolViolation
from p2pnode.ids import JOB, MODEL, id_text, node_text
from p2pnode.jobs.feeds import as_values
from p2pnode.jobs.service import JobResult
from p2pnode.jobs.sessions import Session
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec, Terms

SESSIONS_MAX: Final = 256
_TERM_NAMES: Final = frozenset(field.name for field in fields(Terms))


def terms_of(data: Any) -> Terms:
    """Give the Terms in a JSON object; the names are those of `jobs.spec.Terms`. Raises ConfigError."""
    if data is None:
        return Terms()
    if not isinstance(data, Mapping):
        raise ConfigError("terms must be a JSON object")
    unknown = sorted(set(data) - _TERM_NAMES)
    if unknown:
        raise ConfigError(f"there is no term called {unknown[0]!r}; the terms are {', '.join(sorted(_TERM_NAMES))}")
    values = dict(data)
    if "deny" in values:
        values["deny"] = tuple(str(each) for each in values["deny"])
    try:
        return Terms(**values)
    except TypeError as error:
        raise ConfigError(f"the terms cannot be read: {error}") from error


async def jobs(control: Control, request: Request) -> Reply:
    """List jobs, newest first."""
    return json_answer({"jobs": await control.node.jobs.list()})


async def recent_calls(control: Control, request: Request) -> Reply:
    """List the last answered calls, oldest first: who answered, what it cost, how long it took."""
    rows = [
        {**structs.asdict(call), "model_id": id_text(MODEL, call.model_id), "provider": node_text(call.provider)}
        for call in control.node.jobs.suppliers.recent
    ]
    return json_answer({"calls": rows})


async def run(control: Control, request: Request) -> Reply:
    """Run one inference. Body and answer carry tensors; the head names model, outputs and terms, and `dry_run`."""
    head, inputs = _unpacked(request)
    spec = JobSpec(_text(head, "model"), inputs, tuple(head.get("outputs") or ()), terms_of(head.get("terms")))
    if head.get("dry_run"):
        return Answer(200, pack(await control.node.jobs.dry_run(spec), {}), BYTES_TYPE)
    result = await control.node.jobs.run_job(spec)
    return Answer(200, pack(_result_head(result), dict(result.outputs)), BYTES_TYPE)


async def start_map(control: Control, request: Request) -> Reply:
    """Start a map, or go on with it, and give its id."""
    body = request.json()
    spec = MapSpec(
        model=_text(body, "model"),
        data=_text(body, "data"),
        output=_text(body, "output"),
        outputs=tuple(body.get("outputs") or ()),
        batch=int(body.get("batch") or 0),
        terms=terms_of(body.get("terms")),
    )
    return json_answer({"job": id_text(JOB, await control.node.jobs.start_map(spec))}, 202)


async def describe(control: Control, request: Request) -> Reply:
    """Describe one job."""
    return json_answer(await control.node.jobs.describe(await _job(control, request)))


async def stop(control: Control, request: Request) -> Reply:
    """End one job: what is in flight finishes."""
    job = await _job(control, request)
    await control.node.jobs.stop(job)
    return json_answer({"stopped": id_text(JOB, job)})


async def why(control: Control, request: Request) -> Reply:
    """Say what a job waits for."""
    return json_answer(await control.node.jobs.why(await _job(control, request)))


async def events(control: Control, request: Request) -> Reply:
    """Follow a job's progress, one object a line, until it has ended."""
    job = await _job(control, request)

    async def follow() -> AsyncIterator[Mapping[str, Any]]:
        async for event in control.node.jobs.events(job):
            yield event

    return Lines(follow())


async def open_session(control: Control, request: Request) -> Reply:
    """Open a session on a model: gives its id and the model's inputs and outputs."""
    if len(control.closers) >= SESSIONS_MAX:
        raise HttpError(429, "busy", f"{SESSIONS_MAX} sessions are open", "close some")
    body = request.json()
    session = await control.node.jobs.session(SessionSpec(_text(body, "model"), terms_of(body.get("terms"))))
    name = control.node.environment.entropy.token(16).hex()

    async def close() -> None:
        control.sessions.pop(name, None)
        control.closers.pop(name, None)
        await control.node.jobs.close_session(session)

    facts = control.node.work.facts(session.model_id)
    control.sessions[name] = session
    control.closers[name] = close
    return json_answer({
        "session": name,
        "model": id_text(MODEL, session.model_id),
        "inputs": [asdict(info) for info in session.inputs],
        "outputs": [asdict(info) for info in session.outputs],
        "metadata": dict(facts.metadata) if facts is not None else {},
    })  # fmt: skip


async def run_session(control: Control, request: Request) -> Reply:
    """Make one call in a session. The head names the session and the outputs wanted."""
    head, inputs = _unpacked(request)
    session = control.sessions.get(str(head.get("session", "")))
    if not isinstance(session, Session):
        raise HttpError(404, "not-found", "no such session is open", "open one with POST /v1/session/open")
    names = tuple(head.get("outputs") or (info.name for info in session.outputs))
    answer = await session.call(as_values(session.inputs, inputs), names)
    facts = {
        "provider": node_text(answer.provider) if answer.provider else "local",
        "amount": answer.amount,
        "seconds": answer.seconds,
    }
    return Answer(200, pack(facts, {name: answer.outputs[name] for name in names}), BYTES_TYPE)


async def close_session(control: Control, request: Request) -> Reply:
    """Close a session; closing it twice is no error."""
    close = control.closers.get(_text(request.json(), "session"))
    if close is not None:
        await close()
    return json_answer({"closed": True})


async def _job(control: Control, request: Request) -> bytes:
    return await control.node.jobs.find(request.path[2])


def _unpacked(request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        return unpack(request.body)
    except ProtocolViolation as error:
        raise HttpError(400, error.reason.value, error.detail, "send tensors as the client does") from error


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise HttpError(400, "bad-request", f"{name} is missing", f'send {{"{name}": "…"}}')
    return value


def _result_head(result: JobResult) -> dict[str, Any]:
    return {
        "job": result.job,
        "provider": result.provider,
        "amount": result.amount,
        "seconds": result.seconds,
        "bytes_sent": result.bytes_sent,
        "bytes_received": result.bytes_received,
        "receipts": list(result.receipts),
        "end_reason": result.end_reason.value,
    }


JOB_ROUTES: Final = (
    Route("GET", "/v1/jobs", jobs),
    Route("GET", "/v1/calls", recent_calls),
    Route("POST", "/v1/jobs/run", run, takes_bytes=True),
    Route("POST", "/v1/jobs/map", start_map),
    Route("GET", "/v1/jobs/{id}", describe),
    Route("DELETE", "/v1/jobs/{id}", stop),
    Route("GET", "/v1/jobs/{id}/why", why),
    Route("GET", "/v1/jobs/{id}/events", events),
    Route("POST", "/v1/session/open", open_session),
    Route("POST", "/v1/session/run", run_session, takes_bytes=True),
    Route("POST", "/v1/session/close", close_session),
)

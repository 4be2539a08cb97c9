"""The client's side as a service: runs, maps and sessions, listed, explained and stopped.

Every job has a row before anything is sent and exactly one end reason after. Money is integer micro-credits. Other
layers are given as they are: `market` quotes and orders, `work` runs locally, `models` holds the files.
"""

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from p2pnode.environment import Environment
from p2pnode.errors import InputError, P2PNodeError, WorkError
from p2pnode.ids import JOB, MODEL, id_text, matches_prefix, node_text
from p2pnode.jobs.batches import Finished
from p2pnode.jobs.budget import Budget
from p2pnode.jobs.datasets import fingerprint, open_dataset
from p2pnode.jobs.feeds import as_values, value_info
from p2pnode.jobs.item_book import ItemBook
from p2pnode.jobs.job_book import JobBook, map_key, stored_key
from p2pnode.jobs.map_runs import MapRun
from p2pnode.jobs.outputs import claim_parts, output_kind, owns_parts, release_parts
from p2pnode.jobs.progress import past_progress
from p2pnode.jobs.recalls import Recalls
from p2pnode.jobs.retries import Cause, cause_of, reason_of
from p2pnode.jobs.sessions import Answer, Local, ModelView, Session
from p2pnode.jobs.settings import JobSettings
from p2pnode.jobs.shapes import input_shapes
from p2pnode.jobs.spec import JobSpec, MapSpec, SessionSpec, Terms, decode_map_spec
from p2pnode.jobs.suppliers import Suppliers
from p2pnode.metrics import Metrics
from p2pnode.reasons import EndReason, Reason
from p2pnode.store import jobs as rows
from p2pnode.wire.tensors import decode_values, encode_values
from p2pnode.work.calls import WorkRequest

# A job's end is written even if whoever waits for it has given up: one write, which never takes as long as this.
END_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class JobResult:
    """What became of one run. provider: node id as text, `local` for this node's own sandbox; amount: micro-credits."""

    job: str
    outputs: Mapping[str, Any]
    provider: str
    amount: int
    seconds: float
    bytes_sent: int
    bytes_received: int
    receipts: tuple[str, ...]
    end_reason: EndReason


class JobService:
    """Buys inference for this node's owner.

    links: gives the open links by node id. models: the model store. work: this node's own workers, for local fallback.
    """

    def __init__(
        self, environment: Environment, settings: JobSettings, metrics: Metrics, market: Any, work: Any, models: Any,
        links: Callable[[], Mapping[Any, Any]],
    ) -> None:  # fmt: skip
        self._environment = environment
        self._settings = settings
        self._metrics = metrics
        self._market = market
        self._work = work
        self._models = models
        self.suppliers = Suppliers(environment, settings, market, links)
        self.book = JobBook(environment)
        self._nursery: trio.Nursery | None = None
        self._maps: dict[bytes, MapRun] = {}
        self._recalls: dict[bytes, Recalls] = {}
        self._sessions: dict[bytes, Session] = {}
        self._sequence = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry background work until cancelled. What a crash left is reported, or decided at once; maps go on when asked."""
        await self.book.repair()
        for row in await self.book.unfinished():
            if row.kind == "map" and (placed := await self.book.placed(row.id)):
                self._recalls[row.id] = self._recalled(row, placed)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for recalls in list(self._recalls.values()):
                nursery.start_soon(self._decide, recalls)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
                # While the market below still runs: last receipts and cheques of what was left open.
                with trio.move_on_after(self._settings.close_seconds, shield=True):
                    async with trio.open_nursery() as closing:
                        for session in list(self._sessions.values()):
                            closing.start_soon(self.close_session, session, EndReason.CLIENT_STOPPED)

    async def session(self, spec: SessionSpec) -> Session:
        """Open a session. The caller closes it with `close_session`; its first call finds the providers."""
        spec = replace(spec, terms=self._limited(spec.terms))
        model = await self.model(spec.model)
        job = await self.book.new("session", spec.model, model.model_id, spec.terms)
        session = Session(
            self.suppliers, self._environment, model, spec.terms, Budget(spec.terms.max_total),
            local=self._local(model.model_id, spec.terms), job=job,
        )  # fmt: skip
        self._sessions[job] = session
        return session

    async def close_session(self, session: Session, end: EndReason = EndReason.COMPLETED) -> None:
        """End a session's agreements and its job."""
        await session.aclose()
        if session.job is not None and self._sessions.pop(session.job, None) is not None:
            await self.book.end(session.job, end, "")

    async def run_job(self, spec: JobSpec) -> JobResult:
        """Run one inference. Raises the error that ended it; the job then says the same reason."""
        spec = replace(spec, terms=self._limited(spec.terms))
        model = await self.model(spec.model)
        values = as_values(model.inputs, spec.inputs)
        names = spec.outputs or tuple(info.name for info in model.outputs)
        job = await self.book.new("run", spec.model, model.model_id, spec.terms, items=1)
        session = Session(
            self.suppliers, self._environment, model, spec.terms, Budget(spec.terms.max_total),
            local=self._local(model.model_id, spec.terms), job=job, is_single=True,
        )  # fmt: skip
        self._sessions[job] = session
        try:
            answer = await session.call(values, names)
        except P2PNodeError as error:
            await self._closed(session, job, end_of(error), f"{reason_of(error).value}: {error}")
            raise
        except BaseException:  # cancelled, which a nursery below may have wrapped in a group: the job must end in the books
            with trio.move_on_after(END_SECONDS, shield=True):
                await self._closed(session, job, EndReason.CANCELLED, "")
            raise
        await self._closed(session, job, EndReason.COMPLETED, "")
        return await self._result(job, answer)

    async def dry_run(self, spec: JobSpec) -> dict[str, Any]:
        """Give what a run would do, and spend nothing: providers in order with prices, rejected peers with reasons, the risk."""
        model = await self.model(spec.model)
        shapes = input_shapes(as_values(model.inputs, spec.inputs))
        terms = self._limited(spec.terms)
        placement = await self.suppliers.place(model.model_id, shapes, terms)
        best = placement.best
        return {
            "model": id_text(MODEL, model.model_id),
            **placement.explanation(),
            "total_microcredits": best.price if best else None,
            "at_risk_microcredits": best.price if best else 0,
            "notice": "the provider sees the inputs and the outputs",
            "local_fallback": terms.local_fallback,
        }

    async def start_map(self, spec: MapSpec) -> bytes:
        """Start a map, or go on with the one this command started before, and give its job id. Raises InputError.

        A map that is complete, and whose output is still there, is not done again: its job id is given at once.
        """
        elsewhere = self._environment.executor.run
        data, output = await elsewhere(os.path.realpath, spec.data), await elsewhere(os.path.realpath, spec.output)
        spec = replace(spec, data=data, output=output, terms=self._limited(spec.terms))
        model = await self.model(spec.model)
        spec = replace(spec, outputs=spec.outputs or tuple(info.name for info in model.outputs))
        unknown = set(spec.outputs) - {info.name for info in model.outputs}
        if unknown:
            known = ", ".join(info.name for info in model.outputs)
            raise InputError(f"the model has no output {', '.join(sorted(unknown))}; it has {known}")
        batch = spec.batch or self._settings.rows_per_item
        dataset = await self._environment.executor.run(open_dataset, Path(spec.data), model.inputs, batch)
        if not 0 < dataset.items <= self._settings.items_max:
            raise InputError(f"{spec.data} makes {dataset.items} items; between 1 and {self._settings.items_max} are possible")
        kind = output_kind(Path(spec.output), dataset.kind)
        key = map_key(spec, model.model_id, fingerprint(Path(spec.data)))
        stands = await self._environment.executor.run(os.path.exists, spec.output)
        job, row, spent = await self.book.map_row(spec, model.model_id, key, dataset.items, frozenset(self._maps), stands)
        if row.state == "ended":
            await elsewhere(release_parts, Path(spec.output), key)
            return job
        await self._clear_place(job, Path(spec.output))
        past, promised = await self.book.money(job)
        if job in self._maps:
            return job
        if self._nursery is None:
            raise InputError("the job service does not run")
        claim_parts(Path(spec.output), key)
        items = ItemBook(self._environment, job, Path(spec.output), spec.outputs)
        run = self._maps[job] = MapRun(
            self._environment, self._settings, self.suppliers, items, spec, model.model_id, dataset, kind,
            Budget(spec.terms.max_total, spent + past, promised), self._local(model.model_id, spec.terms), self._recalls.get(job),
        )  # fmt: skip
        self._nursery.start_soon(self._carry, run, key)
        return job

    async def _clear_place(self, job: bytes, output: Path) -> None:
        """Make sure that nobody else writes parts where this map's will lie. Raises InputError."""
        if any(run.items.output == output for other, run in self._maps.items() if other != job):
            raise InputError(f"another map writes {output} now; `p2pnode job list` shows it")
        for other, recalls in list(self._recalls.items()):
            if other != job and recalls.items.output == output:
                await recalls.stop()

    async def events(self, job: bytes) -> AsyncIterator[dict[str, Any]]:
        """Give a map's progress each time it changed (at most ten times a second), the last time when it has ended."""
        run = self._maps.get(job)
        if run is None:
            yield past_progress(await self.book.describe(job)).as_json()
            return
        while not run.ended.is_set():
            changed = run.changed
            yield run.progress().as_json()
            await trio.sleep(0.1)
            with trio.move_on_after(1.0):
                await changed.wait()
        yield run.progress().as_json()

    async def wait(self, job: bytes) -> dict[str, Any]:
        """Wait until a map has ended and give its description."""
        while (run := self._maps.get(job)) is not None:
            await run.ended.wait()
        return await self.describe(job)

    async def find(self, typed: str) -> bytes:
        """Give the one job whose id starts with what a person typed. Raises InputError for none or several."""
        return await self.book.find(typed)

    async def describe(self, job: bytes) -> dict[str, Any]:
        """Give a job's state, items, money, history, and its progress while it runs. Raises InputError."""
        description = await self.book.describe(job)
        run = self._maps.get(job)
        return description if run is None else description | {"progress": run.progress().as_json()}

    async def why(self, job: bytes) -> dict[str, Any]:
        """Say what a job waits for, with the refusals this node met since its start."""
        description = await self.describe(job)
        run, session = self._maps.get(job), self._sessions.get(job)
        waits = (run.waits_for if run else None) or (session.waits_for if session else None)
        sentences = []
        if description["state"] == "ended":
            sentences.append(f"the job has ended: {description['end_reason']} {description['end_detail']}".strip())
        elif waits is not None:
            sentences.append(f"it waits because every provider refused: {waits.value}")
        else:
            sentences.append("nothing stands in its way")
        refusals = dict(self.suppliers.refusals.most_common(20))
        return {"job": description["id"], "waits_for": waits.value if waits else "", "sentences": sentences, "refusals": refusals}

    async def stop(self, job: bytes) -> None:
        """End a job: what is in flight finishes, nothing new begins."""
        if (run := self._maps.get(job)) is not None:
            run.stop()
        elif (session := self._sessions.get(job)) is not None:
            await self.close_session(session, EndReason.CANCELLED)
        else:
            await self.book.end(job, EndReason.CANCELLED, "")

    async def list(self, limit: int = 100) -> Sequence[dict[str, Any]]:
        """Give jobs, newest first."""
        return await self.book.newest(limit)

    def apply(self, settings: JobSettings) -> None:
        """Use changed settings for what starts from now on."""
        self._settings = settings
        self.suppliers.settings = settings

    async def reconcile(self) -> None:
        """Compare the jobs' rows with what runs: a row without a runner that is not a map is ended as lost."""
        old = self._environment.clock.wall_ms() - 60_000
        for row in await self.book.unfinished():
            if row.kind != "map" and row.id not in self._sessions and row.created_ms < old:
                await self.book.end(row.id, EndReason.FAILED, "its process ended")

    async def model(self, text: str) -> ModelView:
        """Give what is known of a model, for a path, an id or the start of one. Raises InputError, WorkError."""
        is_file = await self._environment.executor.run(os.path.isfile, text)
        if text.endswith(".onnx") and not is_file:
            raise InputError(f"there is no file {text}")
        if is_file:
            model_id, _ = await self._models.add_file(Path(text))
        else:
            found = [
                item.model_id
                for item in self._models.list()
                if not item.is_partial and matches_prefix(MODEL, item.model_id, text)
            ]
            if len(found) != 1:
                raise InputError(f"{len(found) or 'no'} models start with {text!r}; `p2pnode model list` shows them")
            model_id = found[0]
        # Inspected, not run: a model that somebody else is to run need not be loaded and measured here.
        facts = await self._work.inspect(model_id)
        inputs, outputs = tuple(map(value_info, facts.inputs)), tuple(map(value_info, facts.outputs))
        return ModelView(model_id, inputs, outputs, dict(facts.metadata))

    def _limited(self, terms: Terms) -> Terms:
        """Give the terms with the owner's settings where they say nothing."""
        settings = self._settings
        return replace(
            terms,
            max_price=settings.price_max if terms.max_price is None else terms.max_price,
            max_total=settings.agreement_amount_max if terms.max_total is None else terms.max_total,
            local_fallback=terms.local_fallback or settings.local_fallback,
            share_worker=terms.share_worker or settings.share_worker,
        )

    def _local(self, model_id: bytes, terms: Terms) -> Local | None:
        """Give the function that runs a call in this node's own sandbox, or None when the terms forbid it."""
        if not terms.local_fallback:
            return None

        async def run_here(values: Mapping[str, Any], outputs: Sequence[str]) -> Mapping[str, Any]:
            await self._work.prepare(model_id)
            headers, chunks, size = encode_values(values)
            payload = bytearray(size)
            position = 0
            for chunk in chunks:
                payload[position : position + len(chunk)] = chunk
                position += len(chunk)
            request = WorkRequest(
                model_id=model_id, headers=headers, payload=memoryview(payload), outputs=tuple(outputs), priority=terms.priority,
                timeout_seconds=self._settings.run_seconds, owner=b"", share=False, tolerance=terms.accept_tolerance,
            )  # fmt: skip
            outcome = await self._work.execute(request)
            if outcome.reason is not None:
                raise WorkError(outcome.reason, outcome.detail)
            # The worker's memory is used again after this; the copy is the caller's.
            return decode_values(outcome.headers, memoryview(bytes(outcome.payload)))

        return run_here

    async def _closed(self, session: Session, job: bytes, end: EndReason, detail: str) -> None:
        self._sessions.pop(job, None)
        try:
            await session.aclose()
        finally:
            # Closing may take as long as a peer is cut off, and be given up; the job has ended all the same.
            with trio.move_on_after(END_SECONDS, shield=True):
                await self.book.end(job, end, detail)

    async def _result(self, job: bytes, answer: Answer) -> JobResult:
        return JobResult(
            job=id_text(JOB, job),
            outputs=answer.outputs,
            provider=node_text(answer.provider) if answer.provider else "local",
            amount=answer.amount,
            seconds=answer.seconds,
            bytes_sent=answer.bytes_sent,
            bytes_received=answer.bytes_received,
            receipts=await self.book.receipts(job),
            end_reason=EndReason.COMPLETED,
        )

    async def _carry(self, run: MapRun, key: bytes) -> None:
        try:
            finished = await run.run()
        except P2PNodeError as error:
            finished = run.finished = Finished(EndReason.FAILED, reason_of(error), str(error))
        reason = f"{finished.reason.value}: " if finished.reason else ""
        await self.book.end(run.job, finished.end, f"{reason}{finished.detail}".rstrip(": "))
        if finished.end is EndReason.COMPLETED:
            # Only now: a map killed with its parts gone and its end not written would be done, and paid for, again.
            await self._environment.executor.run(release_parts, run.items.output, key)
        self._maps.pop(run.job, None)
        run.ended.set()
        run.tell()

    # --- what an earlier process had under way ------------------------------------------------------------------------

    def _recalled(self, row: rows.JobRow, placed: Sequence[rows.ItemRow]) -> Recalls:
        try:
            spec = decode_map_spec(row.spec)
        except InputError:
            spec = MapSpec("", "", "")  # its data does not fit the job then, so its calls are given up

        async def read(position: int) -> Mapping[str, Any]:
            try:
                model = await self.model(id_text(MODEL, row.model_id))
                batch = spec.batch or self._settings.rows_per_item
                dataset = await self._environment.executor.run(open_dataset, Path(spec.data), model.inputs, batch)
                return await self._environment.executor.run(dataset.read, position)
            except (WorkError, OSError) as error:
                raise InputError(f"the inputs cannot be read again: {error}") from error

        async def can_store() -> bool:
            key = await self._environment.executor.run(stored_key, spec, row.model_id, row.id)
            return key is not None and await self._environment.executor.run(owns_parts, Path(spec.output), key)

        items = ItemBook(self._environment, row.id, Path(spec.output), spec.outputs)
        return Recalls(self._environment, self._settings, self._market.agreement, items, placed, read, can_store)

    async def _decide(self, recalls: Recalls) -> None:
        await recalls.run()
        self._recalls.pop(recalls.items.job, None)


def end_of(error: Exception) -> EndReason:
    """Give the end reason that an error means for a run."""
    if reason_of(error) in (Reason.BUDGET, Reason.DEADLINE):
        return EndReason.BUDGET if reason_of(error) is Reason.BUDGET else EndReason.EXPIRED
    return {Cause.REFUSED: EndReason.REFUSED, Cause.UNREACHABLE: EndReason.PEER_LOST}.get(cause_of(error), EndReason.FAILED)

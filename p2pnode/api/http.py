"""HTTP/1.1 on trio streams with h11: requests with bounded heads and bodies, JSON answers, lines that stream.

Small on purpose: the only clients are this machine's own commands and scripts. Measured, it answers ten times cheaper than a
framework, and a daemon that idles should not import one.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

HEAD_BYTES_MAX: Final = 32 * 1024
JSON_BODY_BYTES_MAX: Final = 4 << 20
RECEIVE_BYTES: Final = 64 * 1024
IDLE_SECONDS: Final = 300.0
HEAD_SECONDS: Final = 10.0
BODY_SECONDS: Final = 120.0
SEND_SECONDS: Final = 120.0
DISCARD_SECONDS: Final = 2.0
DISCARD_BYTES_MAX: Final = 64 << 20
JSON_TYPE: Final = "application/json"
LINES_TYPE: Final = "application/x-ndjson"
TEXT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
BYTES_TYPE: Final = "application/octet-stream"


class HttpError(Exception):
    """An answer with an error status. reason: a short stable word; message: one sentence; hint: what to do."""

    def __init__(self, status: int, reason: str, message: str, hint: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.hint = hint
        self.kind = kind

    def answer(self) -> "Answer":
        """Give it as an answer."""
        error = {"reason": self.reason, "message": self.message, "hint": self.hint, "kind": self.kind}
        return json_answer({"error": error}, self.status)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. path: decoded parts between the slashes; query: last value of each name; headers: lower-case names."""

    method: str
    path: tuple[str, ...]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        """Give the JSON object in the body, empty when there is none. Raises HttpError."""
        if not self.body:
            return {}
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            raise HttpError(400, "bad-json", "the body is not JSON", "send one JSON object") from None
        if not isinstance(value, dict):
            raise HttpError(400, "bad-json", "the body is not a JSON object", "send one JSON object")
        return value


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: str = JSON_TYPE


@dataclass(frozen=True, slots=True)
class Lines:
    """An answer of one JSON object per line, sent as they come. The iterator is closed when the client goes away."""

    items: AsyncIterator[Mapping[str, Any]] = field()


Reply = Answer | Lines
Dispatch = Callable[[Request], Awaitable[Reply]]
BodyLimit = Callable[[str, tuple[str, ...]], int]


def json_answer(value: Any, status: int = 200) -> Answer:
    """Give a value as a JSON answer."""
    return Answer(status, json.dumps(value, default=_plain).encode() + b"\n")


class HttpConnection:
    """Serves one client until it closes, idles too long or sends nonsense.

    body_limit: most bytes of a body, by method and path. A slow client cannot hold anything but its own connection.
    """

    def __init__(self, stream: trio.abc.Stream, dispatch: Dispatch, body_limit: BodyLimit) -> None:
        self._stream = stream
        self._dispatch = dispatch
        self._body_limit = body_limit
        self._machine = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def serve(self) -> None:
        """Answer requests one after the other; the stream is closed by the caller."""
        while True:
            try:
                request = await self._receive_request()
                if request is None:
                    return
                await self._send(await self._dispatch(request), request.method)
            except HttpError as error:
                await self._send_error(error.answer())
            except h11.RemoteProtocolError as error:
                hint = HttpError(error.error_status_hint, "bad-http", str(error) or "this is not HTTP", "use HTTP/1.1")
                await self._send_error(hint.answer())
                return
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                return
            if self._machine.our_state is not h11.DONE or self._machine.their_state is not h11.DONE:
                await self._discard()
                return
            self._machine.start_next_cycle()

    async def _receive_request(self) -> Request | None:
        with trio.move_on_after(IDLE_SECONDS) as idle:
            event = await self._next_event()
        if idle.cancelled_caught or not isinstance(event, h11.Request):
            return None
        target = urlsplit(event.target.decode("ascii", "replace"))
        path = tuple(unquote(part) for part in target.path.split("/") if part)
        method = event.method.decode("ascii", "replace")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        body = await self._receive_body(self._body_limit(method, path), headers)
        return Request(method, path, dict(parse_qsl(target.query)), headers, body)

    async def _receive_body(self, limit: int, headers: Mapping[str, str]) -> bytes:
        too_large = HttpError(413, "too-large", f"the body may have at most {limit} bytes", "send less at once")
        if int(headers.get("content-length", "0")) > limit:
            raise too_large
        body = bytearray()
        with trio.fail_after(BODY_SECONDS):
            while True:
                event = await self._next_event()
                if isinstance(event, h11.EndOfMessage):
                    return bytes(body)
                if not isinstance(event, h11.Data):
                    raise trio.BrokenResourceError
                body += event.data
                if len(body) > limit:
                    raise too_large

    async def _discard(self) -> None:
        """Swallow the rest of a refused body for a moment: a client that is still sending would miss the answer otherwise."""
        if self._machine.their_state is not h11.SEND_BODY or self._machine.our_state is not h11.DONE:
            return
        with trio.move_on_after(DISCARD_SECONDS), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            left = DISCARD_BYTES_MAX
            while left > 0 and (data := await self._stream.receive_some(RECEIVE_BYTES)):
                left -= len(data)

    async def _next_event(self) -> Any:
        while True:
            event = self._machine.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._machine.they_are_waiting_for_100_continue:
                await self._write(h11.InformationalResponse(status_code=100, headers=[]))
            if self._machine.trailing_data[0] or self._machine.their_state is not h11.IDLE:
                with trio.fail_after(HEAD_SECONDS):
                    data = await self._stream.receive_some(RECEIVE_BYTES)
            else:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            self._machine.receive_data(bytes(data))

    async def _send(self, reply: Reply, method: str) -> None:
        if isinstance(reply, Answer):
            headers = [("content-type", reply.content_type), ("content-length", str(len(reply.body)))]
            await self._write(h11.Response(status_code=reply.status, headers=headers))
            if method != "HEAD":
                await self._write(h11.Data(data=reply.body))
            await self._write(h11.EndOfMessage())
            return
        await self._write(h11.Response(status_code=200, headers=[("content-type", LINES_TYPE)]))
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._leave_when_gone, nursery.cancel_scope)
            try:
                await self._send_lines(reply)
            except Exception as error:  # carried out of the nursery bare, not as a group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send_lines(self, reply: Lines) -> None:
        async with _closing(reply.items) as items:
            try:
                async for item in items:
                    await self._write(h11.Data(data=json.dumps(item, default=_plain).encode() + b"\n"))
            except HttpError as error:
                # The head is gone: the error is the last line.
                await self._write(h11.Data(data=error.answer().body))
        await self._write(h11.EndOfMessage())

    async def _leave_when_gone(self, scope: trio.CancelScope) -> None:
        """A client that closes ends the stream's work; anything it sends meanwhile is against the protocol."""
        with suppress(trio.BrokenResourceError):
            await self._stream.receive_some(RECEIVE_BYTES)
        scope.cancel()

    async def _send_error(self, answer: Answer) -> None:
        if self._machine.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        try:
            await self._send(answer, "GET")
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, h11.LocalProtocolError):
            return

    async def _write(self, event: Any) -> None:
        data = self._machine.send(event)
        if data:
            with trio.fail_after(SEND_SECONDS):
                await self._stream.send_all(data)


def _closing(items: AsyncIterator[Mapping[str, Any]]) -> aclosing[Any]:
    return aclosing(items)


def _plain(value: Any) -> Any:
    """Give what JSON can hold for the odd value in a view: bytes as hex, sets and tuples as lists, enums as their text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return str(value)

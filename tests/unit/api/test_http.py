"""The HTTP server: bounded heads and bodies, errors as JSON, lines that stream and stop when the client goes."""

import json

import pytest
import trio

from p2pnode.api.http import HEAD_BYTES_MAX, HttpConnection, HttpError, Lines, json_answer


class Closed(Exception):
    pass


async def exchange(dispatch, data, *, limit=1000):
    """Send raw bytes, give what comes back until the server closes."""
    client, server = trio.testing.memory_stream_pair()
    received = bytearray()
    async with trio.open_nursery() as nursery:

        async def serve():
            await HttpConnection(server, dispatch, lambda method, path: limit).serve()
            await server.aclose()

        nursery.start_soon(serve)
        await client.send_all(data)
        await client.send_eof()
        async for chunk in client:
            received += chunk
    return bytes(received)


async def echo(request):
    return json_answer({"method": request.method, "path": request.path, "query": request.query, "size": len(request.body)})


def body_of(answer):
    return json.loads(answer.rpartition(b"\r\n\r\n")[2])


async def test_a_request_is_parsed():
    answer = await exchange(echo, b"POST /v1/a%20b/c?x=1&y=z HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 200")
    assert body_of(answer) == {"method": "POST", "path": ["v1", "a b", "c"], "query": {"x": "1", "y": "z"}, "size": 3}


async def test_one_connection_serves_many_requests():
    request = b"GET /v1 HTTP/1.1\r\nhost: h\r\n\r\n"
    answer = await exchange(echo, request * 3)
    assert answer.count(b"HTTP/1.1 200") == 3


async def test_a_body_over_the_limit_is_refused_by_its_length():
    answer = await exchange(echo, b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1001\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert body_of(answer)["error"]["reason"] == "too-large"


async def test_a_chunked_body_over_the_limit_is_refused_as_it_comes():
    data = b"POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n" + b"100\r\n" + bytes(256) + b"\r\n"
    answer = await exchange(echo, data, limit=100)
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\nx: " + bytes(HEAD_BYTES_MAX + 10),
        b"GET /\x00 HTTP/1.1\r\nhost: h\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_and_closed(data):
    answer = await exchange(echo, data)
    assert answer.startswith(b"HTTP/1.1 4")
    assert "reason" in body_of(answer)["error"]


async def test_an_http_error_is_an_answer_with_reason_and_hint():
    async def refuse(request):
        raise HttpError(404, "not-found", "nothing here", "look elsewhere")

    answer = await exchange(refuse, b"GET / HTTP/1.1\r\nhost: h\r\n\r\n" * 2)
    assert answer.count(b"HTTP/1.1 404") == 2, "the connection goes on after an error"
    assert body_of(answer)["error"] == {"reason": "not-found", "message": "nothing here", "hint": "look elsewhere", "kind": ""}


async def test_bad_json_is_refused():
    async def parse(request):
        return json_answer(request.json())

    for body in (b"{", b"[1]", b"[" * 900):
        head = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
        assert body_of(await exchange(parse, head + body))["error"]["reason"] == "bad-json"


async def test_lines_stream_as_they_come_and_the_source_closes_when_the_client_goes(autojump_clock):
    log = []

    async def source():
        try:
            for number in range(1000):
                log.append(number)
                yield {"number": number}
                await trio.sleep(1)
        finally:
            log.append("closed")

    async def follow(request):
        return Lines(source())

    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HttpConnection(server, follow, lambda method, path: 0).serve)
        await client.send_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        seen = b""
        while b'"number": 2' not in seen:
            seen += await client.receive_some(4096)
        assert log[-1] == 2
        await client.aclose()
    assert log[-1] == "closed"
    assert len(log) < 10


async def test_an_error_in_the_middle_of_lines_is_the_last_line():
    async def source():
        yield {"number": 1}
        raise HttpError(500, "broken", "it broke")

    async def follow(request):
        return Lines(source())

    answer = await exchange_until_close(follow)
    assert b'{"number": 1}' in answer
    assert b'"reason": "broken"' in answer


async def exchange_until_close(dispatch):
    client, server = trio.testing.memory_stream_pair()
    seen = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(HttpConnection(server, dispatch, lambda method, path: 0).serve)
        await client.send_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        while not seen.endswith(b"0\r\n\r\n"):
            seen += await client.receive_some(4096)
        await client.aclose()
    return seen

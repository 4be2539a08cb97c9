"""The control server on a real Unix socket, with the real client: permissions, errors, streams, and who may call."""

import stat
from types import SimpleNamespace

import pytest
import trio

from p2pnode import errors
from p2pnode.api.http import Answer, Lines, json_answer
from p2pnode.api.routes import Route, Routes, all_routes
from p2pnode.api.server import ControlServer, answer_of
from p2pnode.control.client import ControlClient, ControlError
from p2pnode.reasons import Reason


async def hello(control, request):
    return json_answer({"path": list(request.path), "body": request.json(), "query": dict(request.query)})


async def fail(control, request):
    raise {
        "refused": errors.Refused(Reason.PRICE, "too dear"),
        "config": errors.ConfigError("a setting is wrong"),
        "work": errors.WorkError(Reason.WRONG_SHAPE, "two by three"),
        "bug": ZeroDivisionError("oops"),
    }[request.path[2]]


async def echo_bytes(control, request):
    return Answer(200, request.body[::-1], "application/octet-stream")


async def count(control, request):
    async def lines():
        for number in range(3):
            yield {"number": number}

    return Lines(lines())


ROUTES = Routes([
    Route("GET", "/v1/alive", hello),
    Route("POST", "/v1/hello/{name}", hello),
    Route("GET", "/v1/fail/{how}", fail),
    Route("POST", "/v1/bytes", echo_bytes, takes_bytes=True),
    Route("GET", "/v1/count", count),
])  # fmt: skip


@pytest.fixture
async def served(tmp_path, nursery):
    config = SimpleNamespace(data_folder=tmp_path, socket_file=tmp_path / "api.sock")
    server = ControlServer(SimpleNamespace(node=SimpleNamespace(config=config)), ROUTES)
    await nursery.start(server.run)
    return server


def client_of(server):
    return ControlClient(server.path.parent, answer_seconds=10)


async def ask(server, function):
    def work():
        with client_of(server) as client:
            return function(client)

    return await trio.to_thread.run_sync(work)


async def test_requests_and_answers(served):
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
    assert await ask(served, ControlClient.alive)
    answer = await ask(served, lambda client: client.post("/v1/hello/bob?x=1", {"a": [1, 2]}))
    assert answer == {"path": ["v1", "hello", "bob"], "body": {"a": [1, 2]}, "query": {"x": "1"}}


async def test_one_client_makes_many_requests_on_one_connection(served):
    def work(client):
        return [client.get("/v1/alive", n=number)["query"]["n"] for number in range(5)]

    assert await ask(served, work) == ["0", "1", "2", "3", "4"]


async def test_large_binary_bodies_pass_where_a_route_takes_them(served):
    body = bytes(range(256)) * 40_000
    assert await ask(served, lambda client: client.post_bytes("/v1/bytes", body)) == body[::-1]
    with pytest.raises(ControlError) as caught:
        await ask(served, lambda client: client.post_bytes("/v1/hello/x", body))
    assert caught.value.reason == "too-large"


async def test_streams_come_line_by_line(served):
    assert await ask(served, lambda client: [line["number"] for line in client.lines("/v1/count")]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("refused", errors.Refused, Reason.PRICE),
        ("config", errors.ConfigError, None),
        ("work", errors.WorkError, Reason.WRONG_SHAPE),
    ],
)
async def test_errors_come_back_as_the_same_class(served, how, kind, reason):
    with pytest.raises(kind) as caught:
        await ask(served, lambda client: client.get(f"/v1/fail/{how}"))
    assert getattr(caught.value, "reason", None) is reason


async def test_a_bug_in_one_answer_does_not_stop_the_server(served):
    with pytest.raises(errors.P2PNodeError, match="ZeroDivisionError: oops"):
        await ask(served, lambda client: client.get("/v1/fail/bug"))
    assert await ask(served, ControlClient.alive)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/alive", 405)])
async def test_what_does_not_exist_is_said(served, method, path, status):
    with pytest.raises(ControlError) as caught:
        await ask(served, lambda client: client.exchange(method, path))
    assert caught.value.status == status


async def test_the_socket_is_gone_afterwards_and_a_stale_one_is_no_obstacle(tmp_path):
    config = SimpleNamespace(data_folder=tmp_path, socket_file=tmp_path / "api.sock")
    config.socket_file.write_text("left by a crash")
    server = ControlServer(SimpleNamespace(node=SimpleNamespace(config=config)), ROUTES)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        assert await ask(server, ControlClient.alive)
        nursery.cancel_scope.cancel()
    assert not server.path.exists()
    assert not await ask(server, ControlClient.alive)


def test_no_daemon_is_unreachable_and_says_what_to_do(tmp_path):
    with pytest.raises(errors.Unreachable, match="p2pnode up"):
        ControlClient(tmp_path).get("/v1/status")


def test_every_error_class_has_an_answer():
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.P2PNodeError):
            needs_reason = cls in (errors.Refused, errors.ProtocolViolation, errors.WorkError)
            answer = answer_of(cls(Reason.BUSY, "why") if needs_reason else cls("why"))
            assert answer.status >= 400
            assert b'"why"' in answer.body


def test_routes_are_unambiguous():
    rows = all_routes().rows
    assert len({(row.method, row.path) for row in rows}) == len(rows)
    assert all(row.handler.__doc__ for row in rows)

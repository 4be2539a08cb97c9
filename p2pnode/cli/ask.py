"""One question to the node: over the control socket when a daemon lives, else to a node that this command runs for a moment.

Either way the same routes answer, so a command behaves alike with and without a daemon.
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit


def ask(method: str, path: str, body: Mapping[str, Any] | None = None, *, peers_seconds: float = 0.0) -> Any:
    """Give the JSON answer of a route. peers_seconds: how long a node of our own first looks for peers."""
    return json.loads(ask_bytes(method, path, body, peers_seconds=peers_seconds) or b"null")


def ask_bytes(method: str, path: str, body: Mapping[str, Any] | None = None, *, peers_seconds: float = 0.0) -> bytes:
    """Give the bytes of a route's answer."""
    from p2pnode.control.client import ControlClient
    from p2pnode.node.config import load_config

    client = ControlClient(load_config().data_folder)
    if client.alive():
        return client.exchange(method, path, json.dumps(body or {}).encode() if method != "GET" else b"")
    return _ask_own_node(method, path, body, peers_seconds)


def _ask_own_node(method: str, path: str, body: Mapping[str, Any] | None, peers_seconds: float) -> bytes:
    import trio

    from p2pnode.api.http import Answer, Request
    from p2pnode.api.server import ControlServer
    from p2pnode.control.client import error_of
    from p2pnode.embedded import embedded_config, embedded_node
    from p2pnode.node.main import Daemon

    url = urlsplit(path)
    parts = tuple(part for part in url.path.split("/") if part)
    request = Request(method, parts, dict(parse_qsl(url.query)), {}, json.dumps(body).encode() if body else b"")

    async def once() -> Answer:
        async with embedded_node(embedded_config()) as node:
            with trio.move_on_after(peers_seconds):
                while not node.transport.links():  # noqa: ASYNC110 - links come from peers; there is no event for a command
                    await trio.sleep(0.05)
                await trio.sleep(min(1.0, peers_seconds / 4))
            answer = await ControlServer(Daemon(node)).dispatch(request)
            if not isinstance(answer, Answer):
                raise TypeError(f"{path} streams; ask the daemon for it")
            return answer

    answer = trio.run(once)
    if answer.status >= 400:
        raise error_of(answer.status, answer.body)
    return answer.body

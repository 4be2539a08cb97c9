"""Invite, join, look up and examine through the control API's routes, on two simulated nodes that know nobody."""

import json

import pytest
import trio

from p2pnode.api.http import Request
from p2pnode.api.routes import Control, all_routes
from p2pnode.errors import ConfigError, InputError
from p2pnode.ids import node_text
from p2pnode.node.main import Daemon
from p2pnode.sim.world import run_world

pytestmark = pytest.mark.slow


async def ask(node, method, path, body=None, **query):
    parts = tuple(path.strip("/").split("/"))
    request = Request(method, parts, query, {}, json.dumps(body).encode() if body else b"")
    return json.loads((await all_routes().dispatch(Control(Daemon(node)), request)).body)


def by_subject(answer):
    return {finding["what"]: finding for finding in answer["findings"]}


def test_an_invitation_makes_first_contact():
    async def scenario(world):
        alice, bob = await world.start("alice"), await world.start("bob")
        await trio.sleep(5)
        alone = await ask(bob, "GET", "/v1/net/doctor")
        assert alone["failing"]
        assert by_subject(alone)["peers"]["evidence"] == "no peer is known"

        invitation = await ask(alice, "GET", "/v1/net/invite", valid="1h")
        assert invitation["addresses"] == [world.residents["alice"].address]
        assert invitation["expires_ms"] > alice.environment.clock.wall_ms()
        joined = await ask(bob, "POST", "/v1/net/join", {"link": invitation["link"]})
        assert joined["is_connected"], joined
        assert joined["node"] == node_text(alice.node_id)

        await world.settle(lambda: bob.discovery.roles.is_server and len(bob.discovery.dht.table) == 1)
        found = await ask(bob, "GET", "/v1/net/lookup", id=node_text(alice.node_id))
        assert found["found"]
        assert found["nearest"][0]["addresses"][0] == world.residents["alice"].address
        well = by_subject(await ask(bob, "GET", "/v1/net/doctor"))
        assert {well[what]["state"] for what in ("peers", "reachable", "own address", "NAT", "clock", "hash table")} == {"ok"}
        (row,) = (await ask(bob, "GET", "/v1/peers"))["peers"]
        assert "entry" in row["kept_for"]
        assert row["table"].startswith("in the table")

    run_world(scenario)


def test_a_link_whose_node_is_gone_says_what_happened():
    async def scenario(world):
        alice, bob = await world.start("alice"), await world.start("bob")
        link = (await ask(alice, "GET", "/v1/net/invite"))["link"]
        await world.stop("alice")
        joined = await ask(bob, "POST", "/v1/net/join", {"link": link})
        assert not joined["is_connected"]
        assert joined["what"]
        await world.start("alice")
        # It is kept as a bootstrap node and tried again.
        await world.settle(lambda: bob.transport.links(), 120)

    run_world(scenario)


@pytest.mark.parametrize(("network", "kind", "words"), [("other", ConfigError, "network.id main"), ("main", InputError, "own")])
def test_links_that_are_no_use_here_are_refused_in_words(network, kind, words):
    async def scenario(world):
        alice = await world.start("alice")
        bob = alice if network == "main" else await world.start("bob", {"network.id": network})
        link = (await ask(alice, "GET", "/v1/net/invite"))["link"]
        with pytest.raises(kind, match=words):
            await ask(bob, "POST", "/v1/net/join", {"link": link})

    run_world(scenario)


def test_the_doctor_tries_each_bootstrap_entry_and_sees_a_wrong_clock():
    async def scenario(world):
        for name in ("alice", "carol"):
            await world.start(name)
        alice, carol = (world.residents[name].address for name in ("alice", "carol"))
        gone = "80.200.0.1:7470"
        bob = await world.start("bob", {"network.bootstrap": f"{alice},{carol},{gone}"}, skew_ms=600_000)
        await world.settle(lambda: len(bob.discovery.introductions.skews_seconds) == 2)
        found = by_subject(await ask(bob, "GET", "/v1/net/doctor"))
        assert found[f"bootstrap {alice}"]["state"] == "ok"
        assert found[f"bootstrap {gone}"]["state"] == "fail"
        assert found["clock"]["state"] == "fail"
        assert "600.0 s ahead" in found["clock"]["evidence"]

    run_world(scenario)


def test_the_doctor_sees_address_translation():
    async def scenario(world):
        servers = [await world.start("s0", nat="none")]
        bootstrap = {"network.bootstrap": world.residents["s0"].address}
        servers += [await world.start(f"s{number}", bootstrap, nat="none") for number in (1, 2)]
        hidden = await world.start("bob", bootstrap, nat="symmetric")
        await trio.sleep(60)
        found = by_subject(await ask(hidden, "GET", "/v1/net/doctor"))
        assert found["NAT"]["state"] == "warn"
        assert found["NAT"]["evidence"].startswith("symmetric")
        assert found["reachable"]["state"] == "warn"
        assert "forward TCP" in found["NAT"]["fix"] or "network.announce" in found["NAT"]["fix"]

    run_world(scenario)

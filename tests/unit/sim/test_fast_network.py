"""The modelled wires: when requests arrive, what is lost, who can be reached, and when links end."""

import math

import pytest

from p2pnode.reasons import Reason
from p2pnode.sim.driver import NodeOptions
from p2pnode.sim.fast_network import DIAL_ONE_WAYS, SILENT_LINK_SECONDS, SLOW_SECONDS, FastNetwork
from p2pnode.sim.fast_node import CRASHED, LEFT, UP, FastNode
from p2pnode.sim.gossip_swarm import IDLE_SECONDS
from p2pnode.sim.latency import Place, flat
from p2pnode.sim.trace import Trace
from p2pnode.wire.messages.discovery import Contact, FindNode
from p2pnode.wire.messages.session import Done

ONE_WAY = 0.05
QUESTION = FindNode(bytes(32), True)


class Wires:
    """A network of three nodes that all say Done."""

    def __init__(self, **options) -> None:
        self.network = FastNetwork(1, flat(ONE_WAY), Trace("messages", keep=50))
        self.network.serve = lambda node, target, message: (Done(), None)
        self.nodes = []
        for index in range(3):
            contact = Contact(bytes([index]) * 32, (f"60.0.{index}.1:7470",))
            node = FastNode(index, NodeOptions(**options if index == 1 else {}), contact, bytes(32), Place(0, 0.0), 0.0)
            node.state = UP
            self.network.nodes.append(node)
            self.network.by_id[contact.node_id] = node
            self.nodes.append(node)
        self.answers = []

    def send(self, source=0, target=1, timeout=3.0, contact=None) -> None:
        def answer(reply, reason) -> None:
            self.answers.append((round(self.network.now, 6), reply, reason))

        node = self.nodes[source]
        self.network.send(node, contact or self.nodes[target].contact, QUESTION, timeout, answer)

    def run(self, until) -> None:
        self.network.run(until, lambda: False)


def test_the_first_request_pays_for_the_connection_and_the_next_does_not() -> None:
    wires = Wires()
    wires.send()
    wires.run(5.0)
    wires.send()
    wires.run(10.0)
    first, second = (at for at, _, _ in wires.answers)
    assert first == pytest.approx((DIAL_ONE_WAYS + 2) * ONE_WAY)
    assert second - 5.0 == pytest.approx(2 * ONE_WAY)
    assert wires.network.links_opened == 1


def test_a_link_closes_after_a_minute_without_use_unless_it_is_pinned() -> None:
    for is_pinned in (False, True):
        wires = Wires()
        wires.network.is_pinned = lambda node, peer, is_pinned=is_pinned: is_pinned
        wires.send()
        wires.run(1.0 + 2 * IDLE_SECONDS)
        assert (1 in wires.nodes[0].links) is is_pinned
        assert (0 in wires.nodes[1].links) is is_pinned


def test_silence_is_noticed_when_the_time_is_over() -> None:
    wires = Wires()
    wires.nodes[1].state = CRASHED
    wires.send(timeout=2.0)
    wires.run(10.0)
    assert wires.answers == [(2.0, None, None)]
    assert wires.network.timeouts == 1


def test_a_machine_without_its_node_refuses_at_once() -> None:
    wires = Wires()
    wires.nodes[1].state = LEFT
    wires.send()
    wires.run(10.0)
    ((at, _, reason),) = wires.answers
    assert at < 1.0
    assert reason is Reason.CONNECTION_LOST


def test_nobody_answers_at_an_address_that_is_another_nodes() -> None:
    wires = Wires()
    wires.send(contact=Contact(wires.nodes[1].contact.node_id, wires.nodes[2].contact.addresses))
    wires.send(contact=Contact(b"?" * 32, wires.nodes[2].contact.addresses))
    wires.run(10.0)
    assert [reply for _, reply, _ in wires.answers] == [None, None]


def test_a_node_behind_a_translator_is_reached_over_its_own_link_alone() -> None:
    wires = Wires(is_reachable=False)
    wires.send()
    wires.run(5.0)
    assert wires.answers.pop()[1] is None
    wires.send(source=1, target=0)
    wires.run(10.0)
    wires.send()
    wires.run(15.0)
    assert [reply for _, reply, _ in wires.answers] == [Done(), Done()]


def test_an_answer_that_comes_too_late_is_none() -> None:
    wires = Wires(is_slow=True)
    wires.send(timeout=0.4)
    wires.run(2.0)
    assert wires.answers == [(0.4, None, None)]
    wires.send(timeout=3.0)
    wires.run(6.0)
    assert wires.answers[1][0] - 2.0 == pytest.approx(2 * ONE_WAY + SLOW_SECONDS)


def test_nothing_passes_between_groups_and_an_asymmetric_cut_lets_only_questions_through() -> None:
    for is_symmetric, heard in ((True, 0), (False, 1)):
        wires = Wires()
        asked = []
        wires.network.serve = lambda node, target, message, asked=asked: (asked.append(1), (Done(), None))[1]
        wires.network.partition([[0], [1, 2]], is_symmetric=is_symmetric)
        wires.send()
        wires.send(source=1, target=2)
        wires.run(5.0)
        replies = [reply for _, reply, _ in wires.answers]
        assert sorted(map(str, replies)) == sorted(map(str, [None, Done()]))
        assert len(asked) == heard + 1
        wires.network.heal()
        wires.send()
        wires.run(10.0)
        assert wires.answers[-1][1] == Done()


def test_links_across_a_cut_are_given_up_after_a_while() -> None:
    wires = Wires()
    lost = []
    wires.network.on_unlink = lambda node, peer: lost.append((node.index, peer.index))
    wires.network.is_pinned = lambda node, peer: True
    wires.send()
    wires.run(1.0)
    wires.network.partition([[0], [1, 2]])
    wires.run(SILENT_LINK_SECONDS - 1)
    assert not lost
    wires.run(SILENT_LINK_SECONDS + 2)
    assert sorted(lost) == [(0, 1), (1, 0)]


def test_about_the_share_that_was_asked_for_is_lost() -> None:
    wires = Wires()
    wires.send()
    wires.run(1.0)
    wires.answers.clear()
    wires.network.set_loss(0.1)
    for number in range(2000):
        wires.network.at(1.0 + number * 0.02, wires.send)
    wires.run(60.0)
    lost = sum(reply is None for _, reply, _ in wires.answers) / 2000
    assert lost == pytest.approx(1 - 0.9**2, abs=0.03), "either the request or the reply"


def test_an_answer_to_an_earlier_life_is_dropped() -> None:
    wires = Wires()
    wires.send()
    wires.run(0.2)
    wires.nodes[0].epoch += 1
    wires.run(10.0)
    assert wires.answers == []


def test_bytes_are_those_of_the_encoded_messages_and_their_frames() -> None:
    from p2pnode.sim.gossip_swarm import HANDSHAKE_BYTES, MESSAGE_OVERHEAD
    from p2pnode.wire.codec import encode

    wires = Wires()
    wires.send()
    wires.run(5.0)
    assert wires.network.bytes == HANDSHAKE_BYTES + 2 * MESSAGE_OVERHEAD + len(encode(QUESTION)) + len(encode(Done()))
    assert math.isfinite(wires.network.now)

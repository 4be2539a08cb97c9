"""The liars themselves: that each of them really lies in the way it says."""

import pytest

from p2pnode.crypto.keys import Identity
from p2pnode.discovery.records.record import make_record, open_record
from p2pnode.errors import ProtocolViolation
from p2pnode.sim import adversaries
from p2pnode.sim.adversaries import AGAIN_SECONDS, FLOOD_PER_SECOND, KINDS, plan
from p2pnode.sim.fast_driver import FastDriver
from p2pnode.wire.messages.discovery import Closest, Contact, FindNode, FindRecord, FoundRecord, Record, StoreRecord
from p2pnode.wire.messages.session import Done

KEY = b"\x40" * 32
ASKER = Contact(b"a" * 32, ("60.9.9.1:7470",))
NETWORK_ID = bytes(32)


def place(node_id: bytes) -> int:
    return int.from_bytes(node_id, "big")


class Attack:
    """Attackers of one kind on a driver of their own, with three victims that only listen."""

    def __init__(self, kind: str, count: int = 4, subnets: int = 2, within: int = 1 << 200) -> None:
        self.driver = FastDriver(1)
        self.heard: dict[bytes, int] = {}
        self.victims = [Contact(bytes([number]) * 32, (f"60.1.{number}.1:7470",)) for number in range(1, 4)]
        self.driver.ask = self._listen
        self.attackers, self.options = plan(kind, self.driver, lambda: self.victims, count, subnets, KEY, within)
        for each in self.options:
            self.attackers.indices.append(self.driver.add_node(each))

    def _listen(self, index, contact, message, done) -> None:
        self.heard[contact.node_id] = self.heard.get(contact.node_id, 0) + 1

    def ask(self, message, asker=ASKER):
        return self.options[0].adversary.answer(asker, message, 0.0)

    def named(self, count=16):
        answer = self.ask(FindNode(KEY, True, count))
        assert isinstance(answer, Closest)
        assert answer.is_server
        return answer.contacts

    def run(self, seconds: float) -> None:
        self.driver.network.run(self.driver.now + seconds, lambda: False)


def a_record(version: int) -> bytes:
    record = Record(b"salt", version, 1_767_225_600_000 + 3_600_000, b"version %d" % version)
    return make_record(Identity(b"p" * 32), NETWORK_ID, record).data


def key_of(data: bytes) -> bytes:
    return open_record(data, NETWORK_ID, 1_767_225_600.0).key


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_speaks_to_every_victim_and_again_until_it_is_ended(kind) -> None:
    attack = Attack(kind)
    attack.run(30.0)
    assert set(attack.heard) == {victim.node_id for victim in attack.victims}
    before = sum(attack.heard.values())
    attack.run(AGAIN_SECONDS)
    assert sum(attack.heard.values()) > before
    attack.attackers.is_on = False
    attack.run(1.0)
    before = sum(attack.heard.values())
    attack.run(AGAIN_SECONDS)
    assert sum(attack.heard.values()) == before


def test_ground_ids_stand_nearer_than_any_honest_node_and_in_few_networks() -> None:
    attack = Attack("eclipse", 10, 3, within=1 << 210)
    contacts = attack.named()
    assert len(contacts) == 10
    assert all(0 < place(contact.node_id) ^ place(KEY) < 1 << 210 for contact in contacts)
    assert len({contact.addresses[0].rpartition(".")[0] for contact in contacts}) == 3
    distances = [place(contact.node_id) ^ place(KEY) for contact in contacts]
    assert distances == sorted(distances)


def test_an_eclipse_takes_a_record_and_has_none() -> None:
    attack = Attack("eclipse")
    assert attack.ask(StoreRecord(a_record(1), True)) == Done()
    answer = attack.ask(FindRecord(key_of(a_record(1)), True))
    assert isinstance(answer, FoundRecord)
    assert answer.record == b""
    assert answer.contacts


def test_sybils_name_only_each_other_and_have_ids_of_chance() -> None:
    attack = Attack("sybil", 6)
    own = {attack.driver.contact(index).node_id for index in range(6)}
    assert {contact.node_id for contact in attack.named()} == own
    assert min(place(node_id) ^ place(KEY) for node_id in own) > 1 << 220


def test_a_poisoner_names_nodes_that_are_not_there_near_the_target() -> None:
    attack = Attack("poison")
    contacts = attack.named()
    known = {victim.node_id for victim in attack.victims}
    assert len(contacts) == 16
    for contact in contacts:
        assert contact.node_id not in known
        assert place(contact.node_id) ^ place(KEY) < 1 << 250
        assert contact.addresses in [victim.addresses for victim in attack.victims]


def test_a_liar_names_real_nodes_the_farthest_first() -> None:
    contacts = Attack("liar").named()
    distances = [place(contact.node_id) ^ place(KEY) for contact in contacts]
    assert distances == sorted(distances, reverse=True)


def test_the_silent_answer_each_node_once() -> None:
    attack = Attack("silent")
    question = FindNode(KEY, True)
    assert attack.ask(question) is not None
    assert attack.ask(question) is None
    assert attack.ask(question, Contact(b"b" * 32, ASKER.addresses)) is not None


def test_a_replayer_hands_out_the_first_version_for_ever() -> None:
    attack = Attack("replay")
    old, new = a_record(1), a_record(2)
    attack.ask(StoreRecord(old, True))
    attack.ask(StoreRecord(new, True))
    assert attack.ask(FindRecord(key_of(new), True)).record == old


def test_a_forgers_records_do_not_pass_the_check() -> None:
    attack = Attack("forge")
    good = a_record(1)
    assert attack.ask(FindRecord(key_of(good), True)).record == b""
    attack.ask(StoreRecord(good, True))
    forged = attack.ask(FindRecord(key_of(good), True)).record
    assert forged != good
    with pytest.raises(ProtocolViolation):
        open_record(forged, NETWORK_ID, 1_767_225_600.0)
    other = attack.ask(FindRecord(bytes(32), True)).record
    assert key_of(other) != bytes(32), "a good record of another key"


def test_flooders_ask_as_often_as_they_say() -> None:
    attack = Attack("flood", 1)
    attack.run(10.5)
    assert sum(attack.heard.values()) == pytest.approx(10 * FLOOD_PER_SECOND, rel=0.15)


def test_ground_kinds_are_those_that_stand_at_a_key() -> None:
    assert set(adversaries.GROUND) < set(KINDS)

"""The doctor: every trouble is a finding with its evidence and what corrects it."""

from dataclasses import replace

import pytest

from p2pnode.discovery.doctor import FAIL, OK, WARN, EntryTrial, Facts, examine, is_failing, nat_kind

HEALTHY = Facts(
    profile="lan", listen="0.0.0.0:7470", bound=("0.0.0.0:7470",), own_addresses=("192.168.1.5:7470",), mdns_state="working",
    role="server", reached=1, confirmed=("192.168.1.5:7470",), seen_as=("192.168.1.5:7470",), ports=(("4000", "4000"),),
    skew_seconds=0.2, skew_peers=3, peers_connected=3, peers_known=5, table_entries=3, network_size=4,
    publications=(("addresses", 4, 4, True),),
)  # fmt: skip


def finding(facts, what):
    return next(each for each in examine(facts) if each.what.startswith(what))


def test_a_healthy_node_has_nothing_to_correct():
    findings = examine(HEALTHY)
    assert [each.what for each in findings if each.state != OK] == []
    assert not is_failing(findings)
    subjects = {each.what for each in findings}
    assert subjects >= {"daemon", "identity", "multicast (mDNS)", "port", "peers", "reachable", "own address", "NAT", "clock"}


@pytest.mark.parametrize(
    ("what", "changes", "state", "fix"),
    [
        ("daemon", {"is_daemon": False}, WARN, "p2pnode up"),
        ("identity", {"is_duplicate": True}, FAIL, "P2PNODE_HOME"),
        ("multicast", {"mdns_state": "not-working", "mdns_reason": "port 5353 is blocked"}, FAIL, "UDP 5353"),
        ("multicast", {"mdns_state": "not-working", "mdns_advice": "use eth0"}, FAIL, "use eth0"),
        ("multicast", {"mdns_state": "off"}, WARN, "network.mdns true"),
        ("multicast", {"mdns_state": "starting"}, WARN, "UDP 5353"),
        ("port", {"bound": ()}, FAIL, "network.listen"),
        ("peers", {"peers_connected": 0}, FAIL, "net peers"),
        ("peers", {"peers_connected": 0, "peers_known": 0}, FAIL, "net join"),
        ("reachable", {"role": "client", "reached": 0, "failed": 3}, WARN, "TCP 7470"),
        ("reachable", {"role": "client", "reached": 0, "failed": 0}, WARN, "wait"),
        ("own address", {"seen_as": ()}, WARN, "wait"),
        ("own address", {"profile": "public"}, WARN, "profile lan"),
        ("NAT", {"role": "client", "seen_as": ("203.0.113.7:4000",)}, WARN, "forward TCP 7470"),
        ("NAT", {"seen_as": ()}, WARN, "wait"),
        ("clock", {"skew_seconds": 300.0}, FAIL, "set-ntp"),
        ("clock", {"skew_seconds": -300.0}, FAIL, "set-ntp"),
        ("clock", {"skew_seconds": 300.0, "skew_peers": 1}, WARN, "set-ntp"),
        ("clock", {"skew_seconds": 20.0}, WARN, "set-ntp"),
        ("clock", {"skew_seconds": None}, WARN, "wait"),
        ("bootstrap", {"entries": (EntryTrial("10.0.0.1:7470", "refused"),)}, FAIL, "net bootstrap --remove"),
        ("bootstrap", {"profile": "public"}, WARN, "net join"),
        ("hash table", {"table_entries": 0}, WARN, "net peers"),
        ("hash table", {"table_entries": 0, "peers_connected": 0}, WARN, "find peers"),
        ("record addresses", {"publications": (("addresses", 1, 16, False),)}, WARN, "tried again"),
    ],
)
def test_each_trouble_is_found_and_says_what_to_do(what, changes, state, fix):
    found = finding(replace(HEALTHY, **changes), what)
    assert found.state == state
    assert fix in found.fix
    assert found.evidence
    assert is_failing([found]) == (state == FAIL)


def test_evidence_says_which_way_the_clock_is_wrong():
    assert "behind" in finding(replace(HEALTHY, skew_seconds=300.0), "clock").evidence, "peers are ahead of us"
    assert "ahead of" in finding(replace(HEALTHY, skew_seconds=-300.0), "clock").evidence


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "none"),
        ({"seen_as": ()}, "unknown"),
        ({"seen_as": ("203.0.113.7:4000",)}, "cone"),
        ({"seen_as": ("203.0.113.7:4001",), "ports": (("4000", "4001"),)}, "symmetric"),
        ({"seen_as": ("203.0.113.7:4000", "203.0.113.8:4000")}, "symmetric"),
        ({"seen_as": ("192.168.1.5:4000", "203.0.113.8:4000")}, "cone"),
    ],
)
def test_the_kind_of_translation_follows_from_what_peers_see(changes, kind):
    assert nat_kind(replace(HEALTHY, **changes)) == kind


def test_a_forwarded_port_is_no_trouble():
    assert finding(replace(HEALTHY, seen_as=("203.0.113.7:4000",)), "NAT").state == OK


def test_an_entry_that_answers_is_well():
    assert finding(replace(HEALTHY, entries=(EntryTrial("10.0.0.1:7470"),)), "bootstrap").state == OK

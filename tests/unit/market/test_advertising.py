"""This node's listing: announced when it sells, renewed, taken back, and signed above whatever the network remembers."""

import dataclasses

import pytest
import trio

from p2pnode.discovery.gossip.events import Arrived, Gone, Republish, Suspect
from p2pnode.discovery.gossip.items import Kind
from p2pnode.market.advertising import CHECK_SECONDS
from p2pnode.market.listings import DocumentCheck, make_listing, seal_listing
from p2pnode.market.offers import OfferFacts, make_offer
from p2pnode.reasons import Reason

NETWORK_ID = b"market test"


class Spread:
    """What a machine has published, opened; it is told of its own items as gossip tells."""

    def __init__(self, machine):
        self.items = []
        self._clock = machine.market._environment.clock
        self._market = machine.market
        machine.market.advertising.publish = self.take
        machine.market.advertising.changed()

    def take(self, document):
        item = DocumentCheck(NETWORK_ID)(document, self._clock.wall_ms())
        self.items.append(item)
        self._market.advertising.heard(Arrived(item))

    @property
    def kinds(self):
        return [item.kind.value for item in self.items]


def test_a_listing_is_announced_and_renewed_at_half_its_life(simulated):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        assert spread.kinds == ["offer"]
        await trio.sleep(800)
        assert len(spread.items) == 1, "nothing has changed"
        await trio.sleep(200)
        assert len(spread.items) == 2
        assert spread.items[1].sequence > spread.items[0].sequence
        assert alice.market.advertising.book.get(alice.identity.node_id) is not None
        assert alice.market.finding.listings() == [], "one's own offer is not for sale to oneself"

    simulated(scenario)


def test_a_changed_price_or_address_is_listed_anew(simulated):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        alice.market.apply(dataclasses.replace(alice.settings, operations_price=777))
        await trio.sleep(1)
        alice.market.advertising.place = lambda: (("80.9.9.9:1",), True)
        await trio.sleep(CHECK_SECONDS + 1)
        assert spread.kinds == ["offer"] * 3
        sequences = [item.sequence for item in spread.items]
        assert sequences == sorted(set(sequences))
        assert spread.items[2].addresses == ("80.9.9.9:1",)
        alice.market.advertising.place = lambda: (("80.9.9.9:1",), False)
        await trio.sleep(CHECK_SECONDS + 1)
        assert spread.items[3].addresses == (), "monitors are not to dial it"
        listing = alice.market.advertising.book.get(alice.identity.node_id).listing
        assert listing.addresses == ("80.9.9.9:1",), "a client may try"

    simulated(scenario)


def test_who_sells_nothing_takes_its_listing_back_and_lists_a_new_one_later(simulated):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        alice.market.apply(dataclasses.replace(alice.settings, selling=False))
        await trio.sleep(1)
        alice.market.apply(alice.settings)
        await trio.sleep(1)
        alice.work.drain()
        alice.market.advertising.changed()
        await trio.sleep(1)
        assert spread.kinds == ["offer", "withdrawal"] * 2
        sequences = [item.sequence for item in spread.items]
        assert sequences == sorted(set(sequences)), "each above the last"
        assert spread.items[1].expires_ms >= spread.items[0].expires_ms
        alice.market.advertising.close()
        await trio.sleep(60)
        assert len(spread.items) == 4

    simulated(scenario)


def test_closing_takes_it_back_at_once_and_for_good(simulated):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        alice.market.advertising.close()
        assert spread.kinds == ["offer", "withdrawal"]
        await trio.sleep(100)
        assert len(spread.items) == 2

    simulated(scenario)


@pytest.mark.parametrize("selling", [True, False])
def test_what_the_network_remembers_is_outbid(simulated, selling):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        if not selling:
            alice.market.apply(dataclasses.replace(alice.settings, selling=False))
            await trio.sleep(1)
        count = len(spread.items)
        now_ms = alice.market._environment.clock.wall_ms()
        old = make_listing(make_offer(OfferFacts(), alice.settings, 5000, now_ms))
        item = DocumentCheck(NETWORK_ID)(seal_listing(old, alice.identity, NETWORK_ID), now_ms)
        alice.market.advertising.heard(Arrived(item))
        alice.market.advertising.heard(Republish(5000))
        await trio.sleep(1)
        (answer,) = spread.items[count:]
        assert answer.kind is (Kind.OFFER if selling else Kind.WITHDRAWAL)
        assert answer.sequence > 5000

    simulated(scenario)


def test_a_monitor_signs_what_it_found(simulated):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        expires_ms = alice.market._environment.clock.wall_ms() + 1000
        alice.market.advertising.heard(Suspect(b"p" * 32, 7, expires_ms))
        doubt = spread.items[-1]
        assert (doubt.kind, doubt.subject, doubt.about, doubt.expires_ms) == (Kind.SUSPICION, b"p" * 32, 7, expires_ms)

    simulated(scenario)


def test_the_offers_of_others_come_and_go_and_linked_ones_count_without_gossip(simulated):
    async def scenario(world, alice, bob, model_id):
        spread = Spread(alice)
        await trio.sleep(1)
        assert bob.market.finding.search("").found == ()
        bob.market.advertising.heard(Arrived(spread.items[0]))
        assert [found.listed.provider for found in bob.market.finding.search("", use_default=False).found] == [
            alice.identity.node_id
        ]
        assert bob.market.finding.price_hint(alice.identity.node_id) == alice.settings.operations_price
        bob.market.advertising.heard(Gone(spread.items[0]))
        assert bob.market.finding.listings() == []
        link = await world.link(bob, alice)
        await bob.market.fetch_offers([link])
        assert [each.provider for each in bob.market.finding.listings()] == [alice.identity.node_id]
        alice.market.advertising.close()
        bob.market.advertising.heard(Arrived(spread.items[-1]))
        assert bob.market.finding.listings() == [], "a withdrawal counts for offers that were asked for, too"
        await bob.market.fetch_offers([link])
        link.close(Reason.IDLE)
        await trio.sleep(1)
        assert bob.market.finding.listings() == [], "what nobody spreads is for sale while its provider is there"

    simulated(scenario)

"""How often one peer, and one network of peers, may ask for what costs the answerer more than the asker.

Identities are free to make and addresses are not, so the same rate binds a whole network (/24, IPv6 /48) as binds one peer.
Calls that are paid for do not pass here: their handlers are registered bare. What costs still more has a lower rate beside
these, where it is answered: puts in the stores, comparisons of books in the gossip, dial-backs with the role.
"""

from collections import OrderedDict
from collections.abc import Callable
from enum import Enum

from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason
from p2pnode.transport.limits import Limits, TokenBucket, address_groups, is_private
from p2pnode.transport.requests import Incoming

Handler = Callable[[Incoming], bool]


class Traffic(Enum):
    """What kinds of requests have a rate; each value is the start of the limits' names in `Limits`."""

    LOOKUP = "lookup"
    DISCOVERY = "discovery"


class RequestRates:
    """Token buckets per kind of traffic, for each peer and for each network of peers; the least recently used are forgotten.

    exempt_private: networks of loopback and private addresses have no common rate, because a household shares one; each peer
    there still has its own.
    """

    def __init__(self, limits: Limits, metrics: Metrics, exempt_private: bool) -> None:
        self._metrics = metrics
        self._exempt_private = exempt_private
        self._buckets_max = limits.rate_buckets_max
        self._rates = {
            Traffic.LOOKUP: (limits.lookup_rate, limits.lookup_burst),
            Traffic.DISCOVERY: (limits.discovery_rate, limits.discovery_burst),
        }
        self._buckets: OrderedDict[tuple[Traffic, bytes | str], TokenBucket] = OrderedDict()

    def admit(self, traffic: Traffic, peer: bytes, address: str, now: float) -> None:
        """Let one request pass. peer: its node id. address: the `host:port` it speaks from. Raises Refused with RATE.

        Counted as `lookup_rate` and so on when the peer is too fast, `lookup_rate_per_network` when its network is.
        """
        if not self._take(traffic, peer, now):
            self._refuse(f"{traffic.value}_rate")
        network = address_groups(address)[1]
        if not (self._exempt_private and is_private(address)) and not self._take(traffic, network, now):
            self._refuse(f"{traffic.value}_rate_per_network")

    def limited(self, traffic: Traffic, handler: Handler, now: Callable[[], float]) -> Handler:
        """Give a handler for the router that lets only so many requests through to this one."""

        def check(incoming: Incoming) -> bool:
            peer = incoming.link.peer
            self.admit(traffic, peer.node_id, peer.seen_address, now())
            return handler(incoming)

        return check

    def _take(self, traffic: Traffic, key: bytes | str, now: float) -> bool:
        buckets = self._buckets
        bucket = buckets.get((traffic, key))
        if bucket is None:
            bucket = buckets[traffic, key] = TokenBucket(*self._rates[traffic], now)
            if len(buckets) > self._buckets_max:
                buckets.popitem(last=False)
        else:
            buckets.move_to_end((traffic, key))
        return bucket.take(now)

    def _refuse(self, limit: str) -> None:
        self._metrics.add("limit_hits_total", limit)
        raise Refused(Reason.RATE, limit)

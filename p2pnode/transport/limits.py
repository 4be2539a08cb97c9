"""Every limit of the transport, by name, and the two small machines that keep the per-address and per-rate ones.

A limit that stops something is counted as `limit_hits_total{name of the field}`; those of `rates` also with `_per_network`.
Sources: the values of go-libp2p's resource manager (`limit_defaults.go`) as a yardstick, scaled to one daemon on one
volunteer's machine.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from p2pnode.errors import Refused
from p2pnode.metrics import Metrics
from p2pnode.reasons import Reason

# Parsing an address takes 20 µs, and each connection needs it twice.
_HOSTS_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """The named limits. Times in seconds, sizes in bytes, rates per second."""

    # Connections: an attacker with many sockets must neither exhaust memory nor keep this node from dialling out.
    connections_max: int = 96
    # Of these at most so many opened by others ...
    inbound_max: int = 64
    # ... and so many kept free for our own dials: inbound sessions stop at connections_max - outbound_reserved.
    outbound_reserved: int = 16
    # One machine, or one network (/24, IPv6 /48), may not take all inbound places.
    per_address_max: int = 8
    per_network_max: int = 16
    # Half-open handshakes cost a task and two Diffie-Hellman operations each.
    half_open_max: int = 32
    # Opening the connection below the handshake: three SYNs.
    dial_seconds: float = 10.0
    # The next of a peer's addresses is tried beside one that has not answered for so long (RFC 8305 section 5).
    dial_stagger_seconds: float = 0.25
    # Whole handshake: five seconds of round trips on the worst link, doubled.
    handshake_seconds: float = 10.0
    # A connection that says nothing is a port scan.
    first_byte_seconds: float = 5.0
    # Token bucket on accepting: a handshake costs 0.3 ms of processor time, so a flood costs at most 0.6 % of a core.
    accept_rate: float = 20.0
    accept_burst: float = 64.0
    # Handshake messages are under 1 KiB; addresses and features are bounded by their types.
    handshake_message_bytes_max: int = 4096
    # Unpinned sessions without requests are closed so that a place is free for others.
    idle_seconds: float = 60.0
    # When all places are taken, the unpinned session that has been idle longest makes room for a new one, if it was for so long.
    # Long enough for the first request of a newcomer, short enough for a lookup's many peers.
    evict_idle_seconds: float = 0.5
    # A pinned session, or one with requests in flight, is probed this often so that NAT mappings live (30 s is common) ...
    keepalive_seconds: float = 20.0
    # ... and given up when a probe brings nothing for so long.
    pong_seconds: float = 15.0
    # Message bodies are control data; anything larger travels as an attachment under flow control.
    message_bytes_max: int = 262_144
    # One attachment; handlers bound theirs further by what the quote allows before they call `receive`.
    attachment_bytes_max: int = 64 << 30
    # Slowloris: whatever we wait for, a record or all attachments with credit, must come at this rate over this time.
    minimum_rate: float = 1024.0
    minimum_rate_seconds: float = 20.0
    # A peer that takes nothing we send for so long is dropped.
    send_stall_seconds: float = 20.0
    # An attachment we offered and for which the peer grants no credit for so long is given up; so is one of which nothing comes.
    stream_stall_seconds: float = 300.0
    # Only headers and messages count here: attachments wait at their owner until there is credit and room.
    send_queue_bytes_max: int = 1 << 20
    # Attachments go into the message's own frame up to this size; a frame must fit a Noise message of 65 535 bytes.
    inline_bytes_max: int = 61_440
    # Flow control: first window of a session's first streams, and what it may grow to (80 MB/s at 200 ms round trip).
    window_initial_bytes: int = 262_144
    window_bytes_max: int = 16 << 20
    # Half a window used up within this time, or two round trips if longer, doubles it.
    window_growth_seconds: float = 0.02
    # Requests one peer may have open with us, replies that are still flowing included.
    requests_in_flight_max: int = 256
    # Requests one peer may send: twice what the bare session of one core answers, so that only floods are stopped.
    request_rate: float = 100_000.0
    request_burst: float = 100_000.0
    # Control frames without content (pings, cancels, credits) one peer may send.
    control_rate: float = 20_000.0
    control_burst: float = 40_000.0
    # What discovery costs the answerer more than the asker, for each peer and again for each network (/24, /48) of peers.
    # Lookups: a node's own lookup asks one peer once; sixty at once is a node that starts and fills its table.
    lookup_rate: float = 20.0
    lookup_burst: float = 60.0
    # The rest of discovery, gossip above all: ten times what a neighbour of a busy network has to tell.
    discovery_rate: float = 50.0
    discovery_burst: float = 200.0
    # Of so many peers and networks the rates are remembered; far more than can be connected at once.
    rate_buckets_max: int = 4096
    # All buffers that peers can make this node allocate, together.
    buffer_bytes_max: int = 128 << 20
    # Old keys are destroyed after so many records or so long, whichever is first (AES-GCM's bound is 2^24.5 full records).
    rekey_records: int = 1 << 22
    rekey_seconds: float = 3600.0
    # Requests get 32-bit numbers that are never reused: near the end the session is retired and a new one opened.
    request_number_max: int = (1 << 32) - (1 << 20)
    # A session that lost to another one with the same peer may finish what it has in flight.
    retire_seconds: float = 10.0
    # Saying goodbye must not hold up shutdown.
    goodbye_seconds: float = 1.0
    # The receive buffer of one session; touched only as far as traffic fills it.
    receive_buffer_bytes: int = 524_288
    # Sealed bytes waiting for the socket; large enough for one burst, small enough for the processor's cache.
    send_buffer_bytes: int = 524_360


class TokenBucket:
    """So many events a second on average, with a burst. Pure: time comes in as an argument."""

    __slots__ = ("_burst", "_rate", "_tokens", "_updated")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._updated = now

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Take tokens if there are enough; say whether there were."""
        if now > self._updated:
            self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._rate)
            self._updated = now
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True


class BufferBudget:
    """All bytes that peers' traffic may make one node hold, counted across its sessions."""

    __slots__ = ("_metrics", "limit", "used")

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self.limit = limit
        self.used = 0
        self._metrics = metrics

    def take(self, size: int) -> bool:
        """Reserve bytes; False (and one count) when the budget does not allow it."""
        if self.used + size > self.limit:
            self._metrics.add("limit_hits_total", "buffer_bytes_max")
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        """Return reserved bytes."""
        self.used -= size


class ConnectionGate:
    """Decides who may connect: pure bookkeeping over addresses, half-open handshakes and open sessions.

    exempt_private: loopback, link-local and private addresses are not bound by the per-address limits, because a whole
    household or test machine shares them. make_room: asked, when all places are taken, to close a session that nobody needs
    (argument: only one opened by its peer) and to give its place back; says whether it did.
    """

    def __init__(self, limits: Limits, metrics: Metrics, exempt_private: bool, now: float) -> None:
        self._limits = limits
        self._metrics = metrics
        self._exempt_private = exempt_private
        self._accepting = TokenBucket(limits.accept_rate, limits.accept_burst, now)
        self._by_address: Counter[str] = Counter()
        self._by_network: Counter[str] = Counter()
        self.half_open = 0
        self.inbound = 0
        self.outbound = 0
        self.make_room: Callable[[bool], bool] = lambda only_inbound: False

    def admit(self, remote_address: str, now: float) -> None:
        """Count a new inbound connection as half-open. Raises Refused with the reason when a limit forbids it.

        Every admitted connection must be given back with `leave`.
        """
        limits = self._limits
        if self.half_open >= limits.half_open_max:
            self._refuse("half_open_max", Reason.TOO_MANY_CONNECTIONS)
        exempt = self._exempt_private and is_private(remote_address)
        address, network = address_groups(remote_address)
        if not exempt:
            if self._by_address[address] >= limits.per_address_max:
                self._refuse("per_address_max", Reason.TOO_MANY_CONNECTIONS)
            if self._by_network[network] >= limits.per_network_max:
                self._refuse("per_network_max", Reason.TOO_MANY_CONNECTIONS)
        if not exempt and not self._accepting.take(now):
            self._refuse("accept_rate", Reason.RATE)
        # Last, so that whoever is refused for another reason costs nobody a session.
        full = self._full_for_inbound()
        if full and self.make_room(True):
            full = self._full_for_inbound()
        if full:
            self._refuse(full, Reason.TOO_MANY_CONNECTIONS)
        self._by_address[address] += 1
        self._by_network[network] += 1
        self.inbound += 1
        self.half_open += 1

    def verified(self) -> None:
        """A half-open inbound connection finished its handshake, or failed to."""
        self.half_open -= 1

    def leave(self, remote_address: str) -> None:
        """An admitted inbound connection is gone."""
        address, network = address_groups(remote_address)
        for counter, key in ((self._by_address, address), (self._by_network, network)):
            counter[key] -= 1
            if counter[key] <= 0:
                del counter[key]
        self.inbound -= 1

    def dial(self, may_make_room: bool = True) -> None:
        """Count an outbound connection. Raises Refused when all places are taken and none can, or may, be made."""
        full = self.inbound + self.outbound >= self._limits.connections_max
        if full and not (may_make_room and self.make_room(False)):
            self._refuse("connections_max", Reason.TOO_MANY_CONNECTIONS)
        self.outbound += 1

    def hang_up(self) -> None:
        """An outbound connection is gone."""
        self.outbound -= 1

    def _full_for_inbound(self) -> str:
        """Name the limit by which no more inbound connections fit, or give nothing."""
        limits = self._limits
        total = self.inbound + self.outbound
        if self.inbound >= limits.inbound_max:
            return "inbound_max"
        if total >= limits.connections_max:
            return "connections_max"
        if total >= limits.connections_max - max(0, limits.outbound_reserved - self.outbound):
            return "outbound_reserved"
        return ""

    def _refuse(self, limit: str, reason: Reason) -> None:
        self._metrics.add("limit_hits_total", limit)
        raise Refused(reason, limit)


def address_groups(remote_address: str) -> tuple[str, str]:
    """Give the host of `host:port` and the network it belongs to: /24 for IPv4, /48 for IPv6, itself for a name."""
    return _groups_of(remote_address.rpartition(":")[0].strip("[]"))


@lru_cache(_HOSTS_REMEMBERED)
def _groups_of(host: str) -> tuple[str, str]:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host, host
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    prefix = 24 if address.version == 4 else 48
    return str(address), str(ipaddress.ip_network((address, prefix), strict=False))


def is_private(remote_address: str) -> bool:
    """Say whether `host:port` is a loopback, link-local or private address."""
    return _is_private(remote_address.rpartition(":")[0].strip("[]"))


@lru_cache(_HOSTS_REMEMBERED)
def _is_private(host: str) -> bool:
    try:
        address = ipaddress.ip_address(_groups_of(host)[0])
    except ValueError:
        return False
    return address.is_private or address.is_loopback or address.is_link_local

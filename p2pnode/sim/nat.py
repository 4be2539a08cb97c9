"""What stands between a simulated machine and the others: nothing, a firewall, or a translator of one of two kinds.

Kinds as RFC 4787 sorts them. `none`: the machine's own address is public. `firewalled`: it is public too, but connections from
outside are dropped. `cone`: a translator whose outside port depends on the inside port alone, so every peer sees the same.
`symmetric`: one port per destination, so what one peer sees helps no other. All but `none` drop connections that come in unless
the machine has opened its listening port towards that peer, or the owner has forwarded it.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

from p2pnode.errors import ConfigError

NONE: Final = "none"
FIREWALLED: Final = "firewalled"
CONE: Final = "cone"
SYMMETRIC: Final = "symmetric"
KINDS: Final = (NONE, FIREWALLED, CONE, SYMMETRIC)
# How long a translator or firewall remembers that the inside has spoken to somebody.
OPENING_SECONDS: Final = 30.0
_FIRST_PORT: Final = 1024


class Nat:
    """One machine's way out and in.

    outside: the address that others see. is_forwarded: the owner has opened the listening port for everybody.
    """

    __slots__ = ("_openings", "_seed", "is_forwarded", "kind", "outside")

    def __init__(self, kind: str, outside: str, seed: int = 0) -> None:
        if kind not in KINDS:
            raise ConfigError(f"there is no NAT kind {kind!r}; choose {', '.join(KINDS)}")
        self.kind = kind
        self.outside = outside
        self.is_forwarded = False
        self._seed = seed
        # Until when connections from an address are let in. One entry per peer the owner punched towards.
        self._openings: dict[str, float] = {}

    @property
    def is_translating(self) -> bool:
        """True if the machine's own address is not the one that others see."""
        return self.kind in (CONE, SYMMETRIC)

    def seen_address(self, port: int, destination: str) -> str:
        """Give what `destination` (`host:port`) sees of a connection from a local port."""
        if not self.is_translating:
            return f"{self.outside}:{port}"
        towards = destination if self.kind == SYMMETRIC else ""
        text = f"{self._seed}/{self.outside}/{port}/{towards}"
        digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
        return f"{self.outside}:{_FIRST_PORT + int.from_bytes(digest, 'big') % (65536 - _FIRST_PORT)}"

    def open_towards(self, host: str, now: float) -> None:
        """Speak from the listening port to a host: it may connect for a while, unless the translator is symmetric."""
        for known in [known for known, until in self._openings.items() if until <= now]:
            del self._openings[known]
        if self.kind != SYMMETRIC:
            self._openings[host] = now + OPENING_SECONDS

    def lets_in(self, host: str, now: float) -> bool:
        """Say whether a connection from a host's outside address reaches the machine."""
        return self.kind == NONE or self.is_forwarded or self._openings.get(host, 0.0) > now


def drawn_kind(shares: Mapping[str, float], uniform: float) -> str:
    """Give the kind that a uniform draw in [0, 1) falls on; what the shares leave over is `none`."""
    for kind in KINDS:
        uniform -= shares.get(kind, 0.0)
        if uniform < 0:
            return kind
    return NONE

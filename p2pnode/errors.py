"""Every error of p2pnode, sorted by whose fault it is, because that decides what happens next.

P2PNodeError
├── ConfigError             the owner's settings: the command stops and names the setting
│   └── InputError          a file or value given to a command or call
│       └── QueryError      a search for offers that cannot be read
├── PeerError               the other side or the network between us
│   ├── Unreachable         no connection: try another peer
│   ├── ProtocolViolation   the peer broke the protocol: its link is dropped, its score lowered
│   ├── Refused             the peer said no, with a reason from `reasons.Reason`
│   └── TooSlow             a deadline passed
├── WorkError               the task's own fault: the task fails and is refunded
├── LedgerError             books that do not balance: the node stops
└── StoreError              the disk: the node stops

The class docstring is the sentence the command line prints under the message; it ends with what to do.
"""

from p2pnode.reasons import Reason


class P2PNodeError(Exception):
    """Something went wrong inside p2pnode. Set P2PNODE_DEBUG=1, run the command again, and report what it prints."""


class ConfigError(P2PNodeError):
    """A setting is missing or wrong. Correct it with `p2pnode config set NAME VALUE`."""


class InputError(ConfigError):
    """A file or value that was given cannot be used. Correct it and run the command again."""


class QueryError(InputError):
    """The search cannot be read. See `p2pnode offers fields` and docs/reference/offer-queries.md, and write it again."""

    @classmethod
    def at(cls, query: str, position: int, problem: str) -> "QueryError":
        """Give the error with the query and a caret under the character at fault. position: counted from 0."""
        return cls(f"{problem}\n  {query}\n  {' ' * position}^\n")


class PeerError(P2PNodeError):
    """Another node could not do its part. Try again; another provider will be chosen."""


class Unreachable(PeerError):
    """No connection to the other node could be made. Check that it runs and see `p2pnode net peers`."""


class ProtocolViolation(PeerError):
    """The other node broke the protocol and was disconnected. Update both sides if this repeats.

    reason: the closed-list reason that is counted and, where the link still stands, sent to the peer.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class Refused(PeerError):
    """The other node refused. The reason says why; `p2pnode offers list` shows who else could do it."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class TooSlow(PeerError):
    """A deadline passed before the other node answered. Allow more time with --deadline or choose another provider."""


class WorkError(P2PNodeError):
    """The model or its input is at fault. Check the model with `p2pnode model inspect FILE` and the input's shapes.

    reason: the closed-list reason, as it would be sent to a client.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail


class LedgerError(P2PNodeError):
    """The books do not balance. Stop the node, keep its data folder, and report this."""


class StoreError(P2PNodeError):
    """The database could not be read or written. Check free space and that no other node uses this data folder."""

"""Stable exit codes: what a script may rely on. Each one has a paragraph in docs/reference/exit-codes.md."""

from enum import IntEnum

from p2pnode import errors
from p2pnode.reasons import Reason


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    BUG = 1
    USAGE = 2
    CONFIG = 3
    NOT_RUNNING = 4
    ALREADY_RUNNING = 5
    UNREACHABLE = 6
    REFUSED = 7
    TOO_SLOW = 8
    WORK = 9
    LEDGER = 10
    STORE = 11
    VERIFICATION = 12
    BUDGET = 13
    NOT_FOUND = 14
    PEER = 15
    UNHEALTHY = 16
    FIGURES = 17
    INTERRUPTED = 130


class NotRunning(errors.P2PNodeError):
    """No daemon answers on this data folder. Start one with `p2pnode up`."""


class AlreadyRunning(errors.P2PNodeError):
    """A daemon already runs on this data folder. Look at it with `p2pnode status` or stop it with `p2pnode down`."""


class NotFound(errors.P2PNodeError):
    """Nothing here has that name or id. List what there is with the command's `list`."""


class VerificationFailed(errors.P2PNodeError):
    """A check failed: do not rely on this receipt. Ask the provider for it again with `p2pnode receipt list`."""


class FiguresMissed(errors.P2PNodeError):
    """A simulation missed a figure. Add --shrink to find the smallest run that does, and --trace to see its events."""


_BY_CLASS: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (NotRunning, ExitCode.NOT_RUNNING),
    (AlreadyRunning, ExitCode.ALREADY_RUNNING),
    (NotFound, ExitCode.NOT_FOUND),
    (VerificationFailed, ExitCode.VERIFICATION),
    (FiguresMissed, ExitCode.FIGURES),
    (errors.InputError, ExitCode.USAGE),
    (errors.ConfigError, ExitCode.CONFIG),
    (errors.Unreachable, ExitCode.UNREACHABLE),
    (errors.TooSlow, ExitCode.TOO_SLOW),
    (errors.Refused, ExitCode.REFUSED),
    (errors.PeerError, ExitCode.PEER),
    (errors.WorkError, ExitCode.WORK),
    (errors.LedgerError, ExitCode.LEDGER),
    (errors.StoreError, ExitCode.STORE),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)


def exit_code_of(error: BaseException) -> ExitCode:
    """Give the exit code for an error; a spent budget has its own, whatever class reports it."""
    if getattr(error, "reason", None) is Reason.BUDGET:
        return ExitCode.BUDGET
    for kind, code in _BY_CLASS:
        if isinstance(error, kind):
            return code
    return ExitCode.BUG


def advice(error: BaseException) -> str:
    """Give the sentence that says what to do: the end of the error class's docstring."""
    text = " ".join((type(error).__doc__ or "").split())
    return text.partition(". ")[2] or text

"""How a child ended, told from its exit code and its last words; and its processor-time allowance.

Sources: the exit code that the zygote reports, and what libraries wrote to standard error (a C++ program that runs out of
memory in a thread ends with SIGABRT and says so only there).
"""

import os
import resource
import signal
from collections.abc import Set as AbstractSet
from typing import Final

from p2pnode.reasons import Reason
from p2pnode.work.channel import GarbledResponse

EXIT_MEMORY: Final = 71
_LAST_WORDS_MAX: Final = 4096
_CAP_SYS_RESOURCE: Final = 24


def explain(status: int | None, errors: int) -> tuple[Reason, str]:
    """Give why a child ended, for the call or load that it was busy with. errors: non-blocking end of its standard error."""
    try:
        words = os.read(errors, _LAST_WORDS_MAX).decode("utf-8", "replace").strip()
    except OSError:
        words = ""
    said = f": {words[:300]}" if words else ""
    if status == EXIT_MEMORY or "bad_alloc" in words or "MemoryError" in words:
        return Reason.MEMORY, f"the worker ran out of its memory{said}"
    if status == -signal.SIGXCPU:
        return Reason.TIME_LIMIT, "the worker used up its processor time"
    if status is not None and status < 0:
        return Reason.WORKER_DIED, f"the worker was ended by signal {-status}{said}"
    return Reason.WORKER_DIED, f"the worker ended{said}"


def parse_failure(tail: bytes, allowed: AbstractSet[Reason]) -> tuple[Reason, str]:
    """Give (reason, detail) of a failure message. Raises GarbledResponse when the reason is not one a worker may give."""
    name, separator, detail = tail.partition(b"\0")
    try:
        reason = Reason(name.decode())
    except ValueError as error:
        raise GarbledResponse("reason") from error
    if not separator or reason not in allowed:
        raise GarbledResponse("reason")
    return reason, detail.decode("utf-8", "replace")


def may_extend_processor_time() -> bool:
    """True when this process may raise a child's RLIMIT_CPU: same user, or the capability (containers often lack it)."""
    if os.geteuid() != 0:
        return True
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)


def extend_processor_time(pid: int, seconds: float) -> None:
    """Let a child use `seconds` more of processor time from now. One that burns it without calls gets SIGXCPU."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        soft, hard = resource.prlimit(pid, resource.RLIMIT_CPU)
        if soft != resource.RLIM_INFINITY and hard == resource.RLIM_INFINITY:
            resource.prlimit(pid, resource.RLIMIT_CPU, (int(used + seconds) + 1, hard))
    except (OSError, ValueError, IndexError):
        pass

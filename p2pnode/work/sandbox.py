"""What a child process gives up before it touches a stranger's model.

Layers, in the order they must be applied: other users' descriptors and our user id, no_new_privs and no dumps, landlock,
resource limits, system-call filter. Each layer alone stops part of the attacks in the tests; the filter stops all of them,
the others are what remains when one has a hole. Nothing here needs root, and nothing can be undone.
"""

import ctypes
import math
import os
import platform
import resource
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from p2pnode.work import landlock, seccomp

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
# A glibc malloc arena reserves 64 MiB of address space for each thread beside its 8 MiB stack.
_THREAD_ADDRESS_SPACE: Final = 72 << 20

FULL: Final = "full"
DEVICES: Final = "gpu"


@dataclass(frozen=True, slots=True)
class Policy:
    """How far one child is confined.

    user, group: ids to become when the process is root. memory_bytes: address space beyond what is mapped now, 0 for no
    limit. cpu_seconds: processor time per thread, then SIGXCPU, 0 for no limit; may_extend lets the parent raise it.
    threads: threads that the work may use. gpu: the `gpu` level, with the filter's longer list. readable, devices: the
    files that landlock leaves.
    """

    user: int = 65534
    group: int = 65534
    memory_bytes: int = 0
    cpu_seconds: float = 60.0
    may_extend: bool = False
    threads: int = 1
    gpu: bool = False
    readable: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


def close_other_descriptors(keep: Iterable[int]) -> None:
    """Close every descriptor of this process but those named."""
    upper = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    upper = 1 << 20 if upper in (resource.RLIM_INFINITY, -1) else upper
    start = 0
    for descriptor in sorted(set(keep)):
        if start < descriptor:
            # An empty range that starts at 0 would close everything (seen with Python 3.11.7).
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, upper)


def die_with_parent(parent: int) -> None:
    """Have the kernel SIGKILL this process when the thread that started it ends; ends at once if that has happened.

    A change of user clears the setting, so it comes after one.
    """
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def lock_down(policy: Policy, parent: int, start_threads: Callable[[], object] | None = None) -> tuple[str, ...]:
    """Apply every layer to this process and give the names of those the kernel does not have.

    start_threads: called when only the resource limits and the filter are left, so that own threads can still be made
    although the filter will allow none. Raises OSError when a layer that exists cannot be applied.
    """
    missing = []
    baseline = _address_space()
    _prefer_as_victim()
    if not _become(policy.user, policy.group):
        missing.append("user")
    die_with_parent(parent)
    _control(_PR_SET_NO_NEW_PRIVS, 1)
    _control(_PR_SET_DUMPABLE, 0)
    os.environ.clear()
    try:
        landlock.restrict(policy.readable, policy.devices)
    except landlock.LandlockUnavailable:
        missing.append("landlock")
    if start_threads is not None:
        start_threads()
    _limit_resources(policy, baseline)
    try:
        # Clone stays forbidden for work of one thread.
        wanted = seccomp.FilterPolicy(os.getpid(), threads=policy.threads > 1, devices=policy.gpu)
        seccomp.apply_filter(seccomp.build_filter(wanted, platform.machine()))
    except seccomp.FilterUnavailable:
        missing.append("seccomp")
    return tuple(missing)


def level_name(missing: Iterable[str], gpu: bool = False) -> str:
    """Give the level's name as it stands in offers: `full`, `gpu` or `reduced:<layer>,<layer>`."""
    lacking = ",".join(sorted(missing))
    return f"reduced:{lacking}" if lacking else DEVICES if gpu else FULL


def _become(user: int, group: int) -> bool:
    if os.getuid() == 0:
        if user == 0:
            return False
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)
    return os.getuid() != 0 and os.geteuid() != 0


def _prefer_as_victim() -> None:
    # When the machine runs out of memory, the stranger's work goes first. Not a layer: where /proc is absent it is skipped.
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def _limit_resources(policy: Policy, baseline: int) -> None:
    limits = [
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NOFILE, *((512, 512) if policy.gpu else (32, 32))),
    ]
    if policy.cpu_seconds:
        seconds = math.ceil(policy.cpu_seconds * policy.threads) + 1
        limits.append((resource.RLIMIT_CPU, seconds, resource.RLIM_INFINITY if policy.may_extend else seconds + 1))
    if policy.threads == 1 and not policy.gpu:
        # Counts threads too; for work with several of them the filter alone forbids new processes.
        limits.append((resource.RLIMIT_NPROC, 0, 0))
    if policy.memory_bytes and not policy.gpu:
        # Graphics drivers reserve terabytes of address space, so there the limit would only break them.
        space = baseline + policy.memory_bytes + (policy.threads + 1) * _THREAD_ADDRESS_SPACE
        limits.append((resource.RLIMIT_AS, space, space))
    for kind, soft, hard in limits:
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
            soft = min(soft, hard)
        resource.setrlimit(kind, (soft, hard))


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _control(option: int, value: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")

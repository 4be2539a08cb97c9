"""The system-call filter of confined processes: an allow-list compiled to classic BPF, for x86-64 and aarch64.

Everything not listed fails with EPERM, so libraries degrade instead of crashing. Some calls are allowed for harmless
arguments only. The program and its loader are our own few lines of ctypes because the packages for it are unmaintained.
Source: Documentation/userspace-api/seccomp_filter.rst of Linux; numbers from its `unistd` tables.
"""

import ctypes
import errno
import platform
import struct
from dataclasses import dataclass
from typing import Final

AUDIT_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD_WORD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16
_CLONE_THREAD, _PROT_EXEC = 0x10000, 0x4
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

# name: (x86-64, aarch64); None where the architecture has no such call.
NUMBERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "mincore": (27, 232), "madvise": (28, 233), "dup": (32, 23),
    "nanosleep": (35, 101), "getpid": (39, 172), "clone": (56, 220), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25),
    "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrusage": (98, 165), "sysinfo": (99, 179),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44), "prctl": (157, 167), "arch_prctl": (158, None),
    "mlock": (149, 228), "gettid": (186, 178), "futex": (202, 98), "sched_setaffinity": (203, 122),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96), "restart_syscall": (219, 128),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, None), "epoll_ctl": (233, 21), "tgkill": (234, 131), "mbind": (237, 235),
    "get_mempolicy": (239, 236), "openat": (257, 56), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "pipe2": (293, 59),
    "prlimit64": (302, 261), "getcpu": (309, 168), "getrandom": (318, 278), "memfd_create": (319, 279),
    "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293), "clone3": (435, 435), "faccessat2": (439, 439),
}  # fmt: skip

# The hot ones first: the program is a list and is walked from its start. No call here opens, creates or reaches anything.
PLAIN_CALLS: Final = (
    "read", "write", "futex", "mmap", "munmap", "mprotect", "madvise", "clock_gettime", "brk", "mremap", "close", "readv",
    "writev", "poll", "ppoll", "fstat", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "sched_yield",
    "lseek", "sched_getaffinity",
    "nanosleep", "clock_nanosleep", "gettimeofday", "getpid", "gettid", "getrandom", "getrusage", "getcpu",
    "membarrier", "rseq", "set_robust_list", "get_robust_list", "restart_syscall", "sysinfo", "uname", "exit", "exit_group",
    "tgkill", "prlimit64",
)  # fmt: skip

# What CUDA and its relatives need besides: files and devices (landlock bounds which), threads, no sockets, no processes.
DEVICE_CALLS: Final = (
    "open", "stat", "lstat", "ioctl", "pread64", "access", "pipe", "mincore", "dup", "fcntl", "getcwd", "readlink", "getuid",
    "getgid", "geteuid", "getegid", "getppid", "statfs", "fstatfs", "arch_prctl", "mlock", "sched_setaffinity",
    "getdents64", "set_tid_address", "clock_getres", "epoll_wait", "epoll_ctl", "mbind", "get_mempolicy", "openat", "newfstatat",
    "readlinkat", "faccessat", "epoll_pwait", "eventfd2", "epoll_create1", "pipe2", "memfd_create", "statx", "faccessat2",
)  # fmt: skip


class FilterUnavailable(OSError):
    """The kernel or the processor has no system-call filter that we can load."""


@dataclass(frozen=True, slots=True)
class FilterPolicy:
    """What a filter allows beyond the plain list.

    process_id: the only process `tgkill` may name, so that abort() works and nobody else can be signalled.
    threads: allow new threads (never processes). devices: the wider list for graphics processors; also executable mappings,
    because device libraries are loaded late and compile code.
    """

    process_id: int
    threads: bool = False
    devices: bool = False


def build_filter(policy: FilterPolicy, architecture: str) -> bytes:
    """Give the BPF program for a policy. Raises FilterUnavailable on an architecture without a table."""
    if architecture not in AUDIT_ARCHITECTURES:
        raise FilterUnavailable(errno.ENOSYS, f"no system-call table for {architecture}")
    column = list(AUDIT_ARCHITECTURES).index(architecture)
    code = [
        _instruction(_LOAD_WORD, 0, 0, _OFFSET_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[architecture]),
        _instruction(_RETURN, 0, 0, _KILL_PROCESS),
        _instruction(_LOAD_WORD, 0, 0, _OFFSET_NUMBER),
    ]
    for name in (*PLAIN_CALLS, *(DEVICE_CALLS if policy.devices else ())):
        number = NUMBERS[name][column]
        if number is not None:
            code += _rule(number, _body(name, policy))
    if policy.threads or policy.devices:
        code += _rule(_number("clone", column), _when_any_bit(0, _CLONE_THREAD))
    # glibc falls back from clone3, whose flags a filter cannot read, to clone when it is said not to exist.
    code += _rule(_number("clone3", column), [_instruction(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)])
    code.append(_instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(code)


def apply_filter(program: bytes) -> None:
    """Load a program for every thread of this process. It cannot be taken off. Raises FilterUnavailable or OSError.

    no_new_privs must be set before.
    """
    library = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code)))
    number = {"x86_64": 317, "aarch64": 277}.get(platform.machine())
    if number is None:
        raise FilterUnavailable(errno.ENOSYS, f"no system-call table for {platform.machine()}")
    ctypes.set_errno(0)
    result = library.syscall(number, _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.c_void_p(ctypes.addressof(header)))
    if result == 0:
        return
    code_number = ctypes.get_errno()
    if code_number in (errno.ENOSYS, errno.EINVAL):
        raise FilterUnavailable(code_number, "the kernel has no seccomp filter")
    raise OSError(code_number, f"the system-call filter was not accepted ({result})")


def _number(name: str, column: int) -> int:
    number = NUMBERS[name][column]
    if number is None:
        raise KeyError(name)
    return number


def _body(name: str, policy: FilterPolicy) -> list[bytes]:
    if name == "tgkill":
        return _when_equal(((0, policy.process_id),))
    if name == "prlimit64":
        # Reading one's own limits only: workers share a user, and could otherwise change each other's.
        return _when_equal(((0, 0), (2, 0)))
    if name in ("mmap", "mprotect") and not policy.devices:
        return _unless_any_bit(2, _PROT_EXEC)
    return [_instruction(_RETURN, 0, 0, _ALLOW)]


def _instruction(code: int, jump_true: int, jump_false: int, constant: int) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, constant)


def _rule(number: int, body: list[bytes]) -> list[bytes]:
    return [_instruction(_JUMP_EQUAL, 0, len(body), number), *body]


def _argument(index: int, high: bool = False) -> bytes:
    return _instruction(_LOAD_WORD, 0, 0, _OFFSET_ARGUMENTS + 8 * index + 4 * high)


def _when_any_bit(index: int, bits: int) -> list[bytes]:
    """Allow if one of the bits of an argument is set, refuse otherwise. A matched rule never falls through."""
    refuse = _instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM)
    return [_argument(index), _instruction(_JUMP_ANY_BIT, 1, 0, bits), refuse, _instruction(_RETURN, 0, 0, _ALLOW)]


def _unless_any_bit(index: int, bits: int) -> list[bytes]:
    refuse = _instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM)
    return [_argument(index), _instruction(_JUMP_ANY_BIT, 0, 1, bits), refuse, _instruction(_RETURN, 0, 0, _ALLOW)]


def _when_equal(wanted: tuple[tuple[int, int], ...]) -> list[bytes]:
    """Allow if every named argument, compared over its 64 bits, has its value."""
    checks: list[tuple[bytes, int]] = []
    for index, value in wanted:
        checks.append((_argument(index), value & 0xFFFFFFFF))
        checks.append((_argument(index, high=True), value >> 32))
    body: list[bytes] = []
    for position, (load, value) in enumerate(checks):
        remaining = 2 * (len(checks) - position - 1)
        body += [load, _instruction(_JUMP_EQUAL, 0, remaining + 1, value)]
    return [*body, _instruction(_RETURN, 0, 0, _ALLOW), _instruction(_RETURN, 0, 0, _ERRNO | errno.EPERM)]

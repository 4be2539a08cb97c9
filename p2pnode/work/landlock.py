"""Landlock: an unprivileged process gives up the file system, TCP and signals to others, by three raw system calls.

Each kernel knows some of it (its ABI number); what it knows is used and the rest is left to the system-call filter. A
ruleset binds the calling thread and the threads and processes it starts later, so it is applied while there is one thread.
Source: Documentation/userspace-api/landlock.rst of Linux.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1

_ALL_FILES_V1: Final = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TCP_BIND_CONNECT: Final = 0b11
_SCOPE_SOCKETS_SIGNALS: Final = 0b11


class LandlockUnavailable(OSError):
    """The kernel has no landlock or it is switched off."""


def abi_version() -> int:
    """Give the kernel's landlock ABI, 0 where there is none."""
    try:
        return _system_call(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def restrict(readable: Iterable[str] = (), devices: Iterable[str] = ()) -> int:
    """Give up all files but those below the named paths, and TCP and signals where the kernel can. Gives the ABI used.

    readable: folders or files that may be read and mapped executable. devices: files that may also be written and take
    ioctls. Paths that do not exist are left out. no_new_privs must be set. Raises LandlockUnavailable.
    """
    abi = abi_version()
    if abi < 1:
        raise LandlockUnavailable(errno.ENOSYS, "the kernel has no landlock")
    handled = handled_files(abi)
    attributes = struct.pack("QQQ", handled, _TCP_BIND_CONNECT, _SCOPE_SOCKETS_SIGNALS)[: attribute_size(abi)]
    ruleset = _system_call(_CREATE_RULESET, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, (_READ_FILE | _READ_FOLDER | _EXECUTE) & handled)
        for path in devices:
            _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _READ_FOLDER | _IOCTL_DEVICE) & handled)
        _system_call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def handled_files(abi: int) -> int:
    """Give the file rights that an ABI can withhold."""
    return _ALL_FILES_V1 | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0) | (_IOCTL_DEVICE if abi >= 5 else 0)


def attribute_size(abi: int) -> int:
    """Give the size of the ruleset attributes that an ABI knows: files, then network (4), then scopes (6)."""
    return 24 if abi >= 6 else 16 if abi >= 4 else 8


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= ~_READ_FOLDER
        _system_call(
            _ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.create_string_buffer(struct.pack("=Qi", rights, place), 12), 0
        )
    finally:
        os.close(place)


def _system_call(number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    # A stale errno must never be read as this call's own.
    ctypes.set_errno(0)
    result: int = library.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise LandlockUnavailable(code, "the kernel has no landlock")
        raise OSError(code, f"landlock call {number}: {os.strerror(code)}")
    return result

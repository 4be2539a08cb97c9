"""The filter program, run by a small interpreter of classic BPF, for both architectures."""

import errno
import os
import struct

import pytest

from p2pnode.work.seccomp import (
    AUDIT_ARCHITECTURES,
    DEVICE_CALLS,
    NUMBERS,
    PLAIN_CALLS,
    FilterPolicy,
    FilterUnavailable,
    build_filter,
)

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, ABSENT = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
OWN = 4321
MACHINES = tuple(AUDIT_ARCHITECTURES)


def verdict(program: bytes, machine: str, name: str | int, *arguments: int, architecture: int | None = None) -> int:
    """Interpret a program as the kernel would."""
    number = NUMBERS[name][MACHINES.index(machine)] if isinstance(name, str) else name
    assert number is not None
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, architecture or AUDIT_ARCHITECTURES[machine], 0, *padded)
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, position = 0, 0
    while True:
        operation, yes, no, constant = code[position]
        position += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, constant)[0]
        elif operation == 0x15:
            position += yes if accumulator == constant else no
        elif operation == 0x45:
            position += yes if accumulator & constant else no
        elif operation == 0x06:
            return constant
        else:
            raise AssertionError(f"instruction {operation:#x}")


@pytest.mark.parametrize("machine", MACHINES)
def test_plain_calls_pass_and_others_do_not(machine):
    program = build_filter(FilterPolicy(OWN), machine)
    column = MACHINES.index(machine)
    allowed = {NUMBERS[name][column] for name in PLAIN_CALLS}
    special = {NUMBERS[name][column] for name in ("tgkill", "clone3")}
    for number in range(600):
        expected = ALLOW if number in allowed else REFUSE
        if number not in special:
            assert verdict(program, machine, number) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("threads", [False, True])
def test_threads_and_processes(machine, threads):
    program = build_filter(FilterPolicy(OWN, threads=threads), machine)
    assert verdict(program, machine, "clone", 0x10000 | 0xF00) == (ALLOW if threads else REFUSE)
    assert verdict(program, machine, "clone", 17) == REFUSE
    assert verdict(program, machine, "clone3") == ABSENT


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments(machine):
    program = build_filter(FilterPolicy(OWN), machine)
    assert verdict(program, machine, "mmap", 0, 4096, 3) == ALLOW
    assert verdict(program, machine, "mmap", 0, 4096, 7) == REFUSE
    assert verdict(program, machine, "mprotect", 0, 4096, 4) == REFUSE
    assert verdict(program, machine, "tgkill", OWN, 1, 6) == ALLOW
    assert verdict(program, machine, "tgkill", OWN + 1, 1, 6) == REFUSE
    assert verdict(program, machine, "tgkill", OWN | 1 << 32, 1, 6) == REFUSE
    assert verdict(program, machine, "prlimit64", 0, 7, 0, 0x7000) == ALLOW
    assert verdict(program, machine, "prlimit64", 0, 7, 0x7000, 0) == REFUSE
    assert verdict(program, machine, "prlimit64", 0, 7, 0x700000000000, 0) == REFUSE
    assert verdict(program, machine, "prlimit64", 1, 7, 0, 0x7000) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_is_killed(machine):
    program = build_filter(FilterPolicy(OWN), machine)
    assert verdict(program, machine, "read", architecture=0x40000003) == KILL


def test_x32_calls_are_refused():
    assert verdict(build_filter(FilterPolicy(OWN), "x86_64"), "x86_64", 0x40000000) == REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_devices_get_files_but_no_network_and_no_processes(machine):
    program = build_filter(FilterPolicy(OWN, devices=True), machine)
    column = MACHINES.index(machine)
    for name in DEVICE_CALLS:
        if NUMBERS[name][column] is not None:
            assert verdict(program, machine, name) == ALLOW
    sockets = range(41, 60) if machine == "x86_64" else range(198, 213)
    for number in sockets:
        assert verdict(program, machine, number) == REFUSE
    for number in {"x86_64": (57, 58, 59, 62, 101, 272, 310, 321, 322, 425, 434), "aarch64": (117, 97, 221, 129, 270, 280, 425)}[
        machine
    ]:
        assert verdict(program, machine, number) == REFUSE
    assert verdict(program, machine, "mmap", 0, 4096, 7) == ALLOW


def test_unknown_machine():
    with pytest.raises(FilterUnavailable):
        build_filter(FilterPolicy(OWN), "riscv64")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="compares with the C library's numbers of x86-64")
def test_numbers_are_the_kernels():
    path = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    if not os.path.exists(path):
        pytest.skip("no kernel headers here")
    with open(path) as file:
        known = dict(line.split()[1:3] for line in file if line.startswith("#define __NR_"))
    for name, (number, _) in NUMBERS.items():
        assert number == int(known[f"__NR_{name}"])


def test_numbers_of_the_generic_table():
    path = "/usr/include/asm-generic/unistd.h"
    if not os.path.exists(path):
        pytest.skip("no kernel headers here")
    with open(path) as file:
        lines = [line.split() for line in file if line.startswith("#define __NR")]
    numbers = [words for words in lines if len(words) > 2 and words[2].isdigit()]
    known = {words[1].removeprefix("__NR3264_").removeprefix("__NR_"): words[2] for words in numbers}
    renamed = {"newfstatat": "fstatat"}
    for name, (_, number) in NUMBERS.items():
        if number is not None:
            assert number == int(known[renamed.get(name, name)]), name

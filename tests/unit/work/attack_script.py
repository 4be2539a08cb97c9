"""Nineteen attacks, tried by an unprivileged process with or without the sandbox. Prints JSON: name -> `worked` or the error.

Usage: attack_script.py control|sandboxed FOLDER. FOLDER belongs to the unprivileged user and holds .ssh/id_ed25519.
"""

import ctypes
import encodings.idna
import errno
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

from p2pnode.work import sandbox

# The unprivileged user may not be able to read Python's own files, so nothing is imported late.
assert encodings.idna
LIBRARY = ctypes.CDLL(None, use_errno=True)
ATTACKS = {}
CALLS = {  # x86-64, aarch64
    "ptrace": (101, 117), "io_uring_setup": (425, 425), "bpf": (321, 280), "unshare": (272, 97), "memfd_create": (319, 279),
    "process_vm_readv": (310, 270), "pidfd_open": (434, 434),
}  # fmt: skip


def attack(function):
    ATTACKS[function.__name__] = function
    return function


def system_call(name, *arguments):
    ctypes.set_errno(0)
    number = CALLS[name][os.uname().machine == "aarch64"]
    result = LIBRARY.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


@attack
def read_ssh_key(place):
    (place.folder / ".ssh" / "id_ed25519").read_text()


@attack
def list_home(place):
    os.listdir(place.folder)


@attack
def read_passwd(place):
    Path("/etc/passwd").read_text()


@attack
def write_file(place):
    (place.folder / f"written-{place.mode}").write_text("x")


@attack
def tcp_connect(place):
    socket.create_connection(place.tcp, 2).close()


@attack
def udp_send(place):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", place.tcp)


@attack
def unix_socket(place):
    socket.socket(socket.AF_UNIX)


@attack
def netlink(place):
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)


@attack
def fork(place):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@attack
def execute(place):
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


@attack
def signal_other(place):
    os.kill(place.victim, 0)


@attack
def ptrace(place):
    system_call("ptrace", 0x4206, place.victim, 0, 0)


@attack
def io_uring_setup(place):
    system_call("io_uring_setup", 8, ctypes.create_string_buffer(120))


@attack
def bpf(place):
    system_call("bpf", 0, ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1) + bytes(112), 128), 128)


@attack
def memory_file(place):
    system_call("memfd_create", b"x", 0)


@attack
def read_other_memory(place):
    target = ctypes.create_string_buffer(8)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(target), 8)
    remote = (ctypes.c_size_t * 2)(ctypes.addressof(place.secret), 8)
    system_call("process_vm_readv", place.victim, local, 1, remote, 1, 0)


@attack
def pidfd_open(place):
    system_call("pidfd_open", place.victim, 0)


@attack
def read_environment(place):
    Path(f"/proc/{place.victim}/environ").read_bytes()


@attack
def user_namespace(place):
    # Last: inside its own namespace the attacker could no longer reach the victim.
    system_call("unshare", 0x10000000)


class Place:
    """What there is to attack."""

    def __init__(self, mode, folder):
        self.mode, self.folder = mode, Path(folder)
        self.secret = ctypes.create_string_buffer(b"secret", 8)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.tcp = self.listener.getsockname()
        read, write = os.pipe()
        self.victim = os.fork()
        if self.victim == 0:
            # A process of the same user, as another worker or a program of a careless owner would be.
            become_user()
            LIBRARY.prctl(4, 1, 0, 0, 0)
            LIBRARY.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
            os.write(write, b"x")
            while True:
                signal.pause()
        os.read(read, 1)


def become_user():
    sandbox.die_with_parent(os.getppid())
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


def main(mode, folder):
    place = Place(mode, folder)
    signal.alarm(20)
    read, write = os.pipe()
    # The attacker is a child, so that the victim and it are siblings of one user.
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        missing = ()
        if mode == "sandboxed":
            missing = sandbox.lock_down(sandbox.Policy(memory_bytes=1 << 30), parent)
        else:
            become_user()
        results = {"missing": list(missing)}
        for name, function in ATTACKS.items():
            try:
                function(place)
                results[name] = "worked"
            except OSError as error:
                results[name] = errno.errorcode.get(error.errno, str(error))
            except BaseException as error:
                results[name] = type(error).__name__
        os.write(write, json.dumps(results).encode())
        os._exit(0)
    os.close(write)
    data = b""
    while part := os.read(read, 65536):
        data += part
    os.waitpid(child, 0)
    os.kill(place.victim, signal.SIGKILL)
    os.waitpid(place.victim, 0)
    print(data.decode())


if __name__ == "__main__":
    main(*sys.argv[1:])

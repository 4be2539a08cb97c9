"""TCP behind `environment.Network`: non-blocking sockets on trio's readiness, straight into the caller's buffers.

trio's own socket wrapper costs a checkpoint on each call; here data is sent with a plain system call and waited for only
when the kernel has none, or no room.
"""

import errno
import os
import socket
from collections.abc import Sequence

import trio

from p2pnode.environment import Buffer
from p2pnode.errors import ConfigError, Unreachable

# Who receives so much at once probably finds more at once.
_BULK_BYTES = 65_536
# After so many receives without a wait the other tasks get their turn.
_EAGER_RECEIVES = 8
_BACKLOG = 128
# The kernel takes at most this many buffers in one call (IOV_MAX).
_CHUNKS_MAX = 1024


class TcpStream:
    """One TCP connection as `environment.ByteStream`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._eager = 0
        try:
            self._local = _text(sock.getsockname())
            self._remote = _text(sock.getpeername())
        except OSError as error:
            sock.close()
            raise Unreachable(f"the connection broke at once: {error.strerror}") from error

    @property
    def local_address(self) -> str:
        """`host:port` of this end."""
        return self._local

    @property
    def remote_address(self) -> str:
        """`host:port` of the other end."""
        return self._remote

    def send_nowait(self, chunks: Sequence[Buffer]) -> int:
        """Give the kernel what it takes without waiting. Raises Unreachable."""
        try:
            if len(chunks) == 1:
                return self._socket.send(chunks[0])
            return self._socket.sendmsg(chunks[:_CHUNKS_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Unreachable(f"the connection to {self._remote} broke: {error.strerror}") from error

    async def wait_writable(self) -> None:
        """Wait for room in the kernel's send buffer."""
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except (trio.ClosedResourceError, ValueError) as error:
            raise Unreachable(f"the connection to {self._remote} is closed") from error

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end."""
        while True:
            await self.wait_readable()
            count = self.receive_nowait(buffer)
            if count >= 0:
                return count

    async def wait_readable(self) -> None:
        """Wait for bytes; a few times not at all after many came at once: then more are probably there."""
        if self._eager > 0:
            return
        try:
            await trio.lowlevel.wait_readable(self._socket)
        except (trio.ClosedResourceError, ValueError) as error:
            raise Unreachable(f"the connection to {self._remote} is closed") from error
        self._eager = _EAGER_RECEIVES

    def receive_nowait(self, buffer: memoryview) -> int:
        """Take what the kernel has; 0 at the end, -1 when it has nothing now."""
        try:
            count = self._socket.recv_into(buffer)
        except BlockingIOError:
            self._eager = 0
            return -1
        except OSError as error:
            raise Unreachable(f"the connection to {self._remote} broke: {error.strerror}") from error
        self._eager = self._eager - 1 if count >= _BULK_BYTES or count == len(buffer) else 0
        return count

    def poll(self, buffer: memoryview, seconds: float) -> int:
        """Ask the kernel again and again for a time, but let others have this processor in between; -1 when it had nothing."""
        until = trio.current_time() + seconds
        while (count := self.receive_nowait(buffer)) < 0 and trio.current_time() < until:
            os.sched_yield()
        return count

    def close(self) -> None:
        """Close at once. Idempotent; whoever waits on the stream gets Unreachable."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def aclose(self) -> None:
        """Close, and let other tasks have a turn."""
        self.close()
        await trio.lowlevel.checkpoint()


class TcpListener:
    """One listening socket as `environment.Listener`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._address = _text(sock.getsockname())

    @property
    def address(self) -> str:
        """`host:port` actually bound."""
        return self._address

    async def accept(self) -> TcpStream:
        """Wait for a connection. Connections that break before they are taken are passed over."""
        while True:
            try:
                await trio.lowlevel.wait_readable(self._socket)
                sock, _ = self._socket.accept()
                return TcpStream(sock)
            except (trio.ClosedResourceError, ValueError) as error:
                raise Unreachable(f"{self._address} is closed") from error
            except Unreachable:
                continue
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise Unreachable(f"{self._address} is closed") from error
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Out of descriptors or memory: the connection stays in the backlog; do not spin on it.
                    await trio.sleep(0.05)

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        await trio.lowlevel.checkpoint()


class TcpNetwork:
    """TCP as `environment.Network`."""

    async def dial(self, address: str) -> TcpStream:
        """Connect to `host:port`, trying each address of a name in turn. Raises Unreachable. Cancelled: nothing is left."""
        host, port = _split(address)
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Unreachable(f"no address is known for {host}") from error
        failure = f"no address is known for {host}"
        for family, kind, protocol, _, target in found:
            try:
                return await _connect(family, kind, protocol, target)
            except OSError as error:
                failure = f"{address}: {error.strerror or error}"
        raise Unreachable(failure)

    async def listen(self, address: str) -> TcpListener:
        """Listen on `host:port`; port 0 picks one. Raises ConfigError when the address cannot be taken.

        `[::]` takes every IPv4 and IPv6 address, or every IPv4 address where the machine has no IPv6.
        """
        try:
            host, port = _split(address)
            found = await trio.socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError, Unreachable) as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from error
        family, _, _, _, target = found[0]
        try:
            return TcpListener(_bind(family, target))
        except OSError as error:
            if host == "::" and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                return await self.listen(f"0.0.0.0:{port}")
            raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error


def _bind(family: int, target: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if target[0] == "::":
            # Systems differ in what they do unasked.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(target)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


async def _connect(family: int, kind: int, protocol: int, target: tuple[object, ...]) -> TcpStream:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(target)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, errno.errorcode.get(code, str(code)))
        return TcpStream(sock)
    except BaseException:  # whatever it was, nothing is left open
        sock.close()
        raise


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise Unreachable(f"{address!r} is not an address such as 192.0.2.7:4001 or [2001:db8::7]:4001")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _text(name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Give a socket's name as `host:port`; an IPv4 peer of a listener for both families is written as IPv4.

    A link-local address keeps the number of the interface it was met on, without which nothing could be sent back there.
    """
    host, port = name[0].removeprefix("::ffff:") if "." in name[0] else name[0], name[1]
    if len(name) == 4 and name[3] and "%" not in host:
        host = f"{host}%{name[3]}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

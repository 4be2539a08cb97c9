"""The bare transport beside raw sockets and gRPC with TLS: paired rounds in one run, between two processes on loopback.

    python benchmarks/transport.py [--rounds 5] [--only p2pnode] [--quick]

(a) a 4 KB request with a 4 KB reply, one at a time (p50) and 32 in flight (per second, and processor time of both sides per
request); (b) one transfer of 256 MB (MB/s and processor time). Contenders take turns within a round and the direction of the
turns alternates; ratios are medians over the rounds, so that load from elsewhere hits all alike. No figure here is a test.
"""

import argparse
import contextlib
import datetime
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import threading
import time
from types import SimpleNamespace

SMALL = 4096
LARGE = 256 * 1000 * 1000
IN_FLIGHT = 32


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- p2pnode -----------------------------------------------------------------------------------------------------------


class SystemEntropy:
    def token(self, size):
        return os.urandom(size)


class SystemClock:
    def monotonic(self):
        return time.perf_counter()


def make_service(seed: bytes, router, listen):
    from p2pnode.crypto.keys import Identity
    from p2pnode.metrics import Metrics
    from p2pnode.transport.service import TransportService, TransportSettings
    from p2pnode.transport.tcp import TcpNetwork

    environment = SimpleNamespace(clock=SystemClock(), entropy=SystemEntropy(), network=TcpNetwork())
    settings = TransportSettings(listen=listen, strict=True)
    return TransportService(environment, Identity(seed), b"n" * 32, settings, Metrics(), router)


def p2pnode_server(pipe) -> None:
    import trio

    from p2pnode.wire.messages.session import Done

    arena = memoryview(bytearray(LARGE))
    answer = Done()

    def router(incoming) -> None:
        if incoming.message.note == "cpu":
            incoming.reply(Done(note=repr(cpu_seconds())))
        elif incoming.attachment_size > SMALL:
            incoming.receive(lambda: arena, lambda view: incoming.reply(answer))
        else:
            incoming.receive(lambda: arena, lambda view: incoming.reply(answer, [view]))

    async def main() -> None:
        service = make_service(b"s" * 32, router, ("127.0.0.1:0",))
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            pipe.send(service.bound_addresses)
            await trio.to_thread.run_sync(wait_for_end, pipe)
            nursery.cancel_scope.cancel()

    trio.run(main)


def wait_for_end(pipe) -> None:
    with contextlib.suppress(EOFError):
        pipe.recv()


class P2pnode:
    name = "p2pnode"
    server = staticmethod(p2pnode_server)

    def run(self, job, address):
        """Run one job in a fresh event loop over a fresh link."""
        import trio

        from p2pnode.wire.messages.session import Done

        request = Done(note="x")
        data = [b"x" * SMALL]

        async def main():
            service = make_service(b"c" * 32, lambda incoming: None, ())
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                link = await service.connect(address)
                server_cpu = lambda: link.request(Done(note="cpu"))  # noqa: E731

                async def once():
                    await link.request(request, data)

                if job == "latency":
                    result = await one_at_a_time(once)
                elif job == "rate":
                    for _ in range(200):
                        await once()
                    count = 6000
                    before = float((await server_cpu()).message.note) + cpu_seconds()
                    started = time.perf_counter()
                    left = iter(range(count))

                    async def worker():
                        for _ in left:
                            await once()

                    async with trio.open_nursery() as workers:
                        for _ in range(IN_FLIGHT):
                            workers.start_soon(worker)
                    elapsed = time.perf_counter() - started
                    after = float((await server_cpu()).message.note) + cpu_seconds()
                    result = count / elapsed, (after - before) / count * 1e6
                else:
                    blob = [memoryview(bytes(LARGE))]
                    await link.request(request, [blob[0][: 16 << 20]])
                    before = float((await server_cpu()).message.note) + cpu_seconds()
                    started = time.perf_counter()
                    await link.request(request, blob)
                    elapsed = time.perf_counter() - started
                    after = float((await server_cpu()).message.note) + cpu_seconds()
                    result = LARGE / elapsed / 1e6, after - before
                nursery.cancel_scope.cancel()
            return result

        return trio.run(main)


async def one_at_a_time(once):
    times = []
    for _ in range(300):
        await once()
    for _ in range(2000):
        started = time.perf_counter()
        await once()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6, min(times) * 1e6


# --- raw sockets -------------------------------------------------------------------------------------------------------


def raw_server(pipe) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname())

    def serve(sock) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        arena = memoryview(bytearray(1 << 19))
        with contextlib.suppress(OSError):
            while header := read_exactly(sock, arena, 8):
                size = int.from_bytes(header, "big")
                if size == 0:
                    sock.sendall(repr(cpu_seconds()).encode().ljust(32))
                    continue
                left = size
                while left:
                    left -= sock.recv_into(arena, min(left, len(arena)))
                sock.sendall(arena[: SMALL if size == SMALL else 1])

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    wait_for_end(pipe)


def read_exactly(sock, arena, size):
    got = 0
    while got < size:
        count = sock.recv_into(arena[got:size])
        if count == 0:
            return b""
        got += count
    return bytes(arena[:size])


class RawSocket:
    name = "raw socket (no encryption)"
    server = staticmethod(raw_server)

    def run(self, job, address):
        sock = socket.create_connection(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        arena = memoryview(bytearray(1 << 19))
        message = SMALL.to_bytes(8, "big") + b"x" * SMALL

        def server_cpu():
            sock.sendall(bytes(8))
            return float(read_exactly(sock, arena, 32))

        def once():
            sock.sendall(message)
            read_exactly(sock, arena, SMALL)

        if job == "latency":
            times = []
            for _ in range(2300):
                started = time.perf_counter()
                once()
                times.append(time.perf_counter() - started)
            return statistics.median(times[300:]) * 1e6, min(times) * 1e6
        if job == "rate":
            count = 6400
            before = server_cpu() + cpu_seconds()
            started = time.perf_counter()
            for _ in range(IN_FLIGHT):
                sock.sendall(message)
            for _ in range(count - IN_FLIGHT):
                read_exactly(sock, arena, SMALL)
                sock.sendall(message)
            for _ in range(IN_FLIGHT):
                read_exactly(sock, arena, SMALL)
            elapsed = time.perf_counter() - started
            return count / elapsed, (server_cpu() + cpu_seconds() - before) / count * 1e6
        blob = bytes(LARGE)
        before = server_cpu() + cpu_seconds()
        started = time.perf_counter()
        sock.sendall(LARGE.to_bytes(8, "big"))
        sock.sendall(blob)
        read_exactly(sock, arena, 1)
        elapsed = time.perf_counter() - started
        return LARGE / elapsed / 1e6, server_cpu() + cpu_seconds() - before


# --- gRPC with TLS -----------------------------------------------------------------------------------------------------

GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
GRPC_PIECE = 1 << 20


def make_certificate() -> tuple[bytes, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(serialization.Encoding.PEM)


def grpc_server(pipe) -> None:
    from concurrent import futures

    import grpc

    key, certificate = pipe.recv()

    def echo(request, context):
        return request

    def upload(pieces, context):
        total = 0
        for piece in pieces:
            total += len(piece)
        return str(total).encode()

    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Cpu": grpc.unary_unary_rpc_method_handler(lambda request, context: repr(cpu_seconds()).encode()),
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
    }
    server = grpc.server(futures.ThreadPoolExecutor(8), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    pipe.send((port, certificate))
    wait_for_end(pipe)
    server.stop(0)


class GrpcTls:
    name = "gRPC + TLS"
    server = staticmethod(grpc_server)

    def run(self, job, address):
        import grpc

        port, certificate = address
        credentials = grpc.ssl_channel_credentials(certificate)
        with grpc.secure_channel(f"localhost:{port}", credentials, options=GRPC_OPTIONS) as channel:
            echo = channel.unary_unary("/bench/Echo")
            cpu = channel.unary_unary("/bench/Cpu")
            message = b"x" * SMALL
            for _ in range(300):
                echo(message)
            if job == "latency":
                times = []
                for _ in range(2000):
                    started = time.perf_counter()
                    echo(message)
                    times.append(time.perf_counter() - started)
                return statistics.median(times) * 1e6, min(times) * 1e6
            before = float(cpu(b"")) + cpu_seconds()
            started = time.perf_counter()
            if job == "rate":
                count = 3000
                room = threading.Semaphore(IN_FLIGHT)
                for _ in range(count):
                    room.acquire()
                    echo.future(message).add_done_callback(lambda _: room.release())
                for _ in range(IN_FLIGHT):
                    room.acquire()
                elapsed = time.perf_counter() - started
                return count / elapsed, (float(cpu(b"")) + cpu_seconds() - before) / count * 1e6
            piece = bytes(GRPC_PIECE)
            whole, rest = divmod(LARGE, GRPC_PIECE)
            pieces = (piece if index < whole else piece[:rest] for index in range(whole + 1))
            assert channel.stream_unary("/bench/Upload")(pieces) == str(LARGE).encode()
            elapsed = time.perf_counter() - started
            return LARGE / elapsed / 1e6, float(cpu(b"")) + cpu_seconds() - before


# --- the run -----------------------------------------------------------------------------------------------------------

JOBS = {
    "latency": ("4 KB one at a time", "p50 µs", "best µs"),
    "rate": (f"4 KB, {IN_FLIGHT} in flight", "per second", "CPU µs each, both sides"),
    "bulk": ("256 MB", "MB/s", "CPU s, both sides"),
}


def child(contender, job, address, pipe) -> None:
    pipe.send(contender.run(job, address))


def measure(contender, job, address):
    """Run one job in a process of its own, so that no contender inherits another's threads or heap."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(contender, job, address, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--job", choices=[*JOBS, ""], default="")
    options = parser.parse_args()
    contenders = [c for c in (RawSocket(), GrpcTls(), P2pnode()) if options.only in c.name]
    context = multiprocessing.get_context("spawn")
    addresses, pipes = {}, []
    for contender in contenders:
        ours, theirs = context.Pipe()
        context.Process(target=contender.server, args=(theirs,), daemon=True).start()
        theirs.close()
        if contender.name == GrpcTls.name:
            ours.send(make_certificate())
        addresses[contender.name] = ours.recv()
        pipes.append(ours)
    results = {(job, c.name): [] for job in JOBS for c in contenders}
    for round_number in range(options.rounds):
        for job in [options.job] if options.job else JOBS:
            for contender in contenders if round_number % 2 == 0 else reversed(contenders):
                results[job, contender.name].append(measure(contender, job, addresses[contender.name]))
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    for job, (title, first, second) in JOBS.items():
        print(f"\n{title:<28}{first:>14}{second:>26}{'p2pnode : this':>18}")
        own = results.get((job, "p2pnode"), [])
        for contender in contenders:
            rows = results[job, contender.name]
            if not rows:
                continue
            ratios = [mine[0] / other[0] for mine, other in zip(own, rows, strict=False)]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            middle = [statistics.median(column) for column in zip(*rows, strict=True)]
            print(f"{contender.name:<28}{middle[0]:>14.1f}{middle[1]:>26.2f}{ratio:>18}")
    for pipe in pipes:
        pipe.close()


if __name__ == "__main__":
    main()

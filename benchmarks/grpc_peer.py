"""The peer to beat: an ONNX server behind gRPC with TLS, as one would write it by hand, and its client."""

import concurrent.futures
import datetime
import json
import statistics
import sys
import time

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from models import reduce_model
from processes import tell

OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
METHOD = "/bench.Onnx/Run"


def certificate() -> tuple[bytes, bytes]:
    """Give (key, certificate) in PEM for `localhost`, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, built.public_bytes(pem)


def serve() -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(reduce_model(), options, providers=["CPUExecutionProvider"])

    def run(request: bytes, context: grpc.ServicerContext) -> bytes:
        return session.run(None, {"x": np.frombuffer(request, np.float32)})[0].tobytes()

    handler = grpc.unary_unary_rpc_method_handler(run)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Onnx", {"Run": handler}),))
    key, chain = certificate()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    tell({"port": port, "certificate": chain.decode()})
    sys.stdin.read()


def client(port: int, chain: str) -> None:
    credentials = grpc.ssl_channel_credentials(chain.encode())
    options = [*OPTIONS, ("grpc.ssl_target_name_override", "localhost")]
    channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options)
    call = channel.unary_unary(METHOD)
    grpc.channel_ready_future(channel).result(10)
    tell({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        array = np.random.default_rng(1).random(command["bytes"] // 4, np.float32)
        if command["what"] == "latency":
            tell({"p50": _latency(call, array, command["calls"])})
        else:
            tell({"rate": _rate(call, array, command["calls"], command["in_flight"])})


def _latency(call: grpc.UnaryUnaryMultiCallable, array: np.ndarray, calls: int) -> float:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        np.frombuffer(call(array.tobytes()), np.float32)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _rate(call: grpc.UnaryUnaryMultiCallable, array: np.ndarray, calls: int, in_flight: int) -> float:
    start = time.perf_counter()
    waiting: set[grpc.Future] = set()
    for _ in range(calls):
        if len(waiting) >= in_flight:
            done = next(iter(waiting))
            done.result()
            waiting.discard(done)
        waiting.add(call.future(array.tobytes()))
    for future in waiting:
        future.result()
    return calls / (time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        arguments = json.loads(sys.argv[2])
        client(arguments["port"], arguments["certificate"])

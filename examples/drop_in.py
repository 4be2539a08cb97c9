"""The same program twice: with ONNX Runtime here, and with p2pnode's session in its place. Run `make_model.py` first."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime's wheels send usage data unless told before the import

import numpy as np
import onnxruntime

import p2pnode
from p2pnode.client import patch_onnxruntime


def scores() -> np.ndarray:
    """What any package does that knows nothing of p2pnode."""
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((2, 4), np.float32)})[0]


here = scores()
with p2pnode.connect() as network, patch_onnxruntime(network, max_price="0.01"):
    there = scores()

print(f"here:  {here[0]}\nthere: {there[0]}")
print("the same" if np.allclose(here, there, atol=1e-6) else "different!")

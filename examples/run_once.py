"""One inference on another machine, with everything that is known about it. Run `make_model.py` first."""

import numpy as np

import p2pnode

with p2pnode.connect() as network:
    result = network.run("model.onnx", {"x": np.ones((2, 4), np.float32)}, max_price="0.01", deadline_seconds="60s")

print(result.outputs["scores"])
print(f"by {result.provider} in {result.seconds * 1000:.1f} ms for {result.amount} micro-credits")
for receipt in result.receipts:
    print(f"receipt {receipt}")

"""Make a small model and data for it, here: model.onnx, rows.npz, rows.csv and the folder `rows`.

The model takes rows of four numbers, `x`, and gives three scores a row, `scores`, that add up to 1.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

generator = np.random.default_rng(7)
weights = numpy_helper.from_array(generator.normal(size=(4, 3)).astype(np.float32), "weights")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "weights"], ["sums"]), helper.make_node("Softmax", ["sums"], ["scores"], axis=1)],
    "classifier",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
    [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
    [weights],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "model.onnx")

rows = generator.random((1000, 4), np.float32)
np.savez("rows.npz", x=rows[:5])
np.savetxt("rows.csv", rows, delimiter=",", header="a,b,c,d", comments="", fmt="%.6f")
Path("rows").mkdir(exist_ok=True)
for number, part in enumerate(np.split(rows, 10)):
    np.save(f"rows/{number}.npy", part)
print("wrote model.onnx, rows.npz (5 rows), rows.csv (1000 rows) and the folder rows (10 files of 100 rows)")

"""A model over a folder of files, at most half a credit in all. Run `make_model.py` first.

Killed at any point and started again, it goes on where it was and pays nothing twice.
"""

from pathlib import Path

import p2pnode

with p2pnode.connect() as network:
    for progress in network.map("model.onnx", Path("rows").absolute(), Path("scores").absolute(), max_total="0.5"):
        print(f"{progress.get('done', '?')} of {progress.get('total', progress.get('items', '?'))}")

print(f"{len(list(Path('scores').glob('*.np?')))} files of scores")

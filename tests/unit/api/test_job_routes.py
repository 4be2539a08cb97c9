"""What programs are told of jobs and calls."""

import json
from collections import deque
from types import SimpleNamespace

import trio

from p2pnode.api.routes_jobs import recent_calls
from p2pnode.ids import MODEL, id_text, node_text
from p2pnode.jobs.suppliers import RecentCall

MODEL_ID, ALICE = b"m" * 32, b"a" * 32


def test_the_last_calls_say_who_answered_and_what_it_cost():
    calls = deque([RecentCall(MODEL_ID, ALICE, 7, 0.25, 4096, 12)])
    control = SimpleNamespace(node=SimpleNamespace(jobs=SimpleNamespace(suppliers=SimpleNamespace(recent=calls))))
    answer = trio.run(recent_calls, control, None)
    (row,) = json.loads(answer.body)["calls"]
    assert row == {
        "model_id": id_text(MODEL, MODEL_ID), "provider": node_text(ALICE), "amount": 7, "seconds": 0.25,
        "bytes_sent": 4096, "bytes_received": 12,
    }  # fmt: skip

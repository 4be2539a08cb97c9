"""Facts about machines, from texts of several kinds of machine and from this one."""

import os

import pytest
import trio

from p2pnode.errors import WorkError
from p2pnode.work import hardware, hardware_paths
from p2pnode.work.hardware import GraphicsProcessor
from p2pnode.work.runtime import SandboxRuntime

INTEL = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) CPU\nflags\t\t: fpu aes avx2\n\nprocessor\t: 1\nmodel name\t: other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd aes pmull\nCPU implementer\t: 0x41\n"
OLD = "processor\t: 0\nmodel name\t: Old Chip\nflags\t\t: fpu aesthetic\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(INTEL, ("Intel(R) Xeon(R) CPU", True)), (ARM, ("", True)), (OLD, ("Old Chip", False)), ("", ("", False))],
)
def test_processors(text, expected):
    assert hardware.parse_processor(text) == expected


def test_memory():
    assert hardware.parse_memory("MemTotal:   2048 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\nOdd: x\n") == (2 << 20, 1 << 20)
    assert hardware.parse_memory("") == (0, 0)


CARD = GraphicsProcessor("NVIDIA T4", 16 << 30)


@pytest.mark.parametrize(
    ("found", "nodes", "providers", "words"),
    [
        ((), (), ("CPUExecutionProvider",), ()),
        ((CARD,), ("/dev/nvidia0",), ("CUDAExecutionProvider", "CPUExecutionProvider"), ()),
        ((CARD,), ("/dev/nvidia0",), ("CPUExecutionProvider",), ("NVIDIA T4", "unused", "pip install onnxruntime-gpu")),
        ((), ("/dev/nvidia0",), ("CPUExecutionProvider",), ("/dev/nvidia0", "driver", "pip install onnxruntime-gpu")),
    ],
)
def test_an_unused_graphics_processor_is_explained(found, nodes, providers, words):
    note = hardware.gpu_note(found, nodes, providers)
    assert bool(note) == bool(words)
    assert all(word in note for word in words)


@pytest.mark.parametrize("result", [{}, {"operations_per_second": "fast"}, {"operations_per_second": float("inf")}])
def test_absurd_speeds_are_refused(result):
    with pytest.raises(WorkError):
        hardware.checked_speed(result)


def test_device_worker_sees_libraries_and_no_home():
    home = os.path.expanduser("~")
    assert "/usr/lib" in hardware_paths.readable()
    assert home not in hardware_paths.readable()
    assert "/" not in hardware_paths.readable()
    assert "/dev/null" in hardware_paths.devices()


@pytest.mark.slow
async def test_this_machine():
    async with trio.open_nursery() as nursery:
        runtime = SandboxRuntime()
        await nursery.start(runtime.run)
        facts = await hardware.discover(runtime)
        nursery.cancel_scope.cancel()
    assert facts.processor.cores >= 1
    assert 0 < facts.memory_available_bytes <= facts.memory_bytes
    assert "CPUExecutionProvider" in facts.execution_providers
    assert facts.operations_per_second > 1e7
    assert facts.as_dict()["processor"]["architecture"] == os.uname().machine

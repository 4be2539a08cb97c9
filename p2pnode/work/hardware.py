"""What this machine is and can do: processor, memory, execution providers, graphics processors, measured speed.

The daemon never imports onnxruntime for it: providers and speed come from confined children. Graphics processors are seen
through nvidia-ml-py, which is only asked, never required; one that is present but unused is reported with the command that
changes that.
"""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import trio

from p2pnode.environment import ModelRuntime
from p2pnode.errors import WorkError
from p2pnode.reasons import Reason

_MEASURE_SIZE: Final = 512
_MEASURE_SECONDS: Final = 0.15
_GPU_PROVIDERS: Final = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "ROCMExecutionProvider",
    "MIGraphXExecutionProvider",
)


@dataclass(frozen=True, slots=True)
class Processor:
    """model: as the system names it. cores: usable by this process. has_aes: AES instructions, which choose the cipher."""

    model: str
    architecture: str
    cores: int
    has_aes: bool


@dataclass(frozen=True, slots=True)
class GraphicsProcessor:
    """One graphics processor as its driver describes it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """The facts that `status` prints and an offer is made from.

    operations_per_second: float32 multiplications and additions of one thread. gpu_note: why a present graphics processor
    is unused and what to do, empty otherwise.
    """

    processor: Processor
    memory_bytes: int
    memory_available_bytes: int
    engine_version: str
    execution_providers: tuple[str, ...]
    graphics_processors: tuple[GraphicsProcessor, ...]
    gpu_note: str
    operations_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)


async def discover(runtime: ModelRuntime) -> Hardware:
    """Ask the system, the driver and two confined children. Takes about half a second. Raises WorkError if they fail."""
    engine, _ = await runtime.confined("engine-facts", {}, b"", 0, 30.0)
    speed, _ = await runtime.confined("measure", {"size": _MEASURE_SIZE, "seconds": _MEASURE_SECONDS}, b"", 0, 30.0)
    # The driver's library may take long to answer, so it is asked in a thread.
    found = await trio.to_thread.run_sync(graphics_processors)
    total, available = parse_memory(_read("/proc/meminfo"))
    providers = tuple(str(provider) for provider in engine["providers"])
    return Hardware(
        processor=processor(),
        memory_bytes=total,
        memory_available_bytes=available,
        engine_version=str(engine["version"]),
        execution_providers=providers,
        graphics_processors=found,
        gpu_note=gpu_note(found, _device_nodes(), providers),
        operations_per_second=checked_speed(speed),
    )


def processor() -> Processor:
    """Give the processor's facts; works where /proc tells nothing."""
    model, has_aes = parse_processor(_read("/proc/cpuinfo"))
    return Processor(
        model or platform.processor() or platform.machine(), platform.machine(), len(os.sched_getaffinity(0)), has_aes
    )


def parse_processor(text: str) -> tuple[str, bool]:
    """Give (model name, whether it has AES instructions) from the text of /proc/cpuinfo, of x86-64 or aarch64."""
    model, has_aes = "", False
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key in ("model name", "hardware") and not model:
            model = value.strip()
        elif key in ("flags", "features"):
            has_aes = has_aes or "aes" in value.split()
    return model, has_aes


def parse_memory(text: str) -> tuple[int, int]:
    """Give (total, available) bytes from the text of /proc/meminfo, 0 for what is not there."""
    sizes = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            sizes[key] = int(number[0]) * 1024
    return sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)


def graphics_processors() -> tuple[GraphicsProcessor, ...]:
    """Give the graphics processors that NVIDIA's driver knows; none where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            GraphicsProcessor(_text(pynvml.nvmlDeviceGetName(handle)), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
            for handle in handles
        )
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def gpu_note(found: Sequence[GraphicsProcessor], device_nodes: Sequence[str], providers: Sequence[str]) -> str:
    """Say why a graphics processor is unused and what to do, or nothing when there is none or it is used."""
    if any(provider in _GPU_PROVIDERS for provider in providers):
        return ""
    if not found and not device_nodes:
        return ""
    name = found[0].name if found else "a graphics processor"
    replace = f"{sys.executable} -m pip uninstall -y onnxruntime && {sys.executable} -m pip install onnxruntime-gpu"
    if not found:
        return f"{name} is present ({device_nodes[0]}) but its driver does not answer; install the driver, then run: {replace}"
    return f"{name} is present but unused: this onnxruntime was built without CUDA; run: {replace}"


def checked_speed(result: dict[str, Any]) -> float:
    """Give a measured speed if it is a plausible number. Raises WorkError otherwise."""
    speed = result.get("operations_per_second")
    if not isinstance(speed, float) or not 1e6 < speed < 1e15:
        raise WorkError(Reason.RUN_FAILED, "the processor's speed could not be measured")
    return speed


def _device_nodes() -> tuple[str, ...]:
    try:
        names = os.listdir("/dev")
    except OSError:
        return ()
    return tuple(sorted(f"/dev/{name}" for name in names if name.startswith("nvidia") and name[6:].isdigit()))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

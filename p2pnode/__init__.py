"""p2pnode: a peer-to-peer market for ONNX compute.

`import p2pnode` is cheap: the public names below are imported when they are first used (PEP 562).
"""

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "InferenceSession": "p2pnode.client",
    "connect": "p2pnode.client",
    "connect_async": "p2pnode.client",
    "P2PNodeError": "p2pnode.errors",
}
__all__ = ["InferenceSession", "P2PNodeError", "__version__", "connect", "connect_async"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'p2pnode' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""The files that a device's worker may still see: libraries to read, device nodes to use. Everything else stays closed."""

import glob
import os
import sys

_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/local/nvidia", "/etc/ld.so.cache", "/opt/rocm")
_INFORMATION = (
    "/proc/driver/nvidia",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices",
    "/sys/bus/pci",
    "/sys/module",
)
_DEVICES = (
    "/dev/nvidia[0-9]*",
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/nvidia-uvm-tools",
    "/dev/nvidia-caps",
    "/dev/kfd",
    "/dev/dri",
)


def readable() -> tuple[str, ...]:
    """Give the folders of libraries and of facts about devices that exist here."""
    places = {*_LIBRARIES, *_INFORMATION, *glob.glob("/usr/local/cuda*"), sys.prefix, sys.base_prefix}
    return tuple(sorted(place for place in places if os.path.exists(place)))


def devices() -> tuple[str, ...]:
    """Give the device nodes of graphics processors that exist here, and /dev/null and /dev/zero."""
    found = {place for name in _DEVICES for place in glob.glob(name)}
    return tuple(sorted(found | {"/dev/null", "/dev/zero"}))

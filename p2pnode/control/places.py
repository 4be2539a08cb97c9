"""Where the control socket lies, for the server and its clients.

A Unix socket's path may have 107 bytes on Linux and 103 on macOS; a data folder can be deeper than that. Then the socket
lies in a short folder of the same user, and the data folder records where.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from p2pnode.errors import ConfigError

SOCKET_NAME: Final = "api.sock"
RECORD_NAME: Final = "api.path"
PATH_BYTES_MAX: Final = 100


def find_socket(data_folder: Path) -> Path:
    """Give where a client should look; the file need not exist."""
    record = data_folder / RECORD_NAME
    try:
        recorded = Path(record.read_text().strip())
    except (OSError, ValueError):
        return data_folder / SOCKET_NAME
    return recorded if recorded.is_absolute() else data_folder / SOCKET_NAME


def choose_socket(data_folder: Path, wanted: Path | None = None) -> Path:
    """Choose where the server should bind and record it when it is not the usual place. Raises ConfigError.

    wanted: the owner's choice of path, if any.
    """
    usual = data_folder.resolve() / SOCKET_NAME
    chosen = wanted.absolute() if wanted is not None else usual
    record = data_folder / RECORD_NAME
    if len(os.fsencode(chosen)) > PATH_BYTES_MAX:
        name = hashlib.blake2b(os.fsencode(chosen), digest_size=8).hexdigest()
        chosen = _private_folder() / f"{name}.sock"
    if chosen == usual:
        record.unlink(missing_ok=True)
        return usual
    record.write_text(f"{chosen}\n")
    return chosen


def _private_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    parent = Path(runtime) if runtime and len(runtime) < 60 and Path(runtime).is_dir() else Path(tempfile.gettempdir())
    folder = parent / f"p2pnode-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    # In a shared folder anybody could have made it first and would then own our socket's place.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(f"{folder} is not a folder that only you can open; remove it or set XDG_RUNTIME_DIR")
    return folder

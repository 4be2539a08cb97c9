"""The identity's file: made on first use, readable by its owner only, backed up and restored.

Losing the file loses the node's name, its credit and what others owe it; two machines that run on one copy get each other
disconnected and may sign contradicting documents. So nothing here overwrites a key unless told to.
"""

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from p2pnode.crypto.keys import Identity, check_puzzle, decode_key_file, encode_key_file, generate_identity, is_key_file_sealed
from p2pnode.environment import Entropy
from p2pnode.errors import ConfigError
from p2pnode.ids import node_text
from p2pnode.node.config import NodeConfig
from p2pnode.node.config_file import sync_folder, unwritable, write_atomically, write_part

PASSPHRASE_VARIABLE: Final = "P2PNODE_PASSPHRASE"
DUPLICATE_WARNING: Final = (
    "one identity may run on one machine only: stop the node that this key came from and never start it there again"
)
_KEY_FILE_SIZE_MAX: Final = 4096

Prompt = Callable[[], str]


def load_or_create(
    config: NodeConfig, entropy: Entropy, *, prompt: Prompt | None = None, environment: Mapping[str, str] | None = None
) -> Identity:
    """Give this node's identity; make one, which solves the network's key puzzle, when there is none.

    A new key file is sealed when P2PNODE_PASSPHRASE is set. prompt: asks a person for a sealed file's passphrase where the
    variable is not set. Blocks: up to seconds for a puzzle or a passphrase. Raises ConfigError.
    """
    path = config.key_file
    if not path.exists():
        identity = generate_identity(entropy, config.network.puzzle_bits)
        data = encode_key_file(identity, _variable(environment), entropy)
        try:
            _write_new(path, data)
        except ConfigError:
            if not path.exists():
                raise
            # Another process was faster: there is one identity now, and both use it.
    return load(config, prompt=prompt, environment=environment)


def load(config: NodeConfig, *, prompt: Prompt | None = None, environment: Mapping[str, str] | None = None) -> Identity:
    """Give the identity in the config folder. Raises ConfigError when it is missing, exposed, sealed or unfit for the network."""
    path = config.key_file
    identity = _decode(read_private(path), path, prompt, environment)
    bits = config.network.puzzle_bits
    if not check_puzzle(identity.node_id, bits):
        raise ConfigError(
            f"the identity in {path} does not solve this network's key puzzle of {bits} bits; "
            "move the file away to make a new one, or choose another network.profile"
        )
    return identity


def backup(config: NodeConfig, target: Path, *, force: bool = False) -> None:
    """Copy the key file, sealed or not as it is, to a file of mode 0600. Raises ConfigError when the target exists."""
    data = read_private(config.key_file)
    is_key_file_sealed(data)  # a damaged key must not replace a good backup
    if target.exists() and target.samefile(config.key_file):
        raise ConfigError(f"{target} is the identity itself; choose another place for its backup")
    if force:
        write_atomically(target, data)
    else:
        _write_new(target, data, "use --force to overwrite it or choose another name")


def restore(
    config: NodeConfig,
    source: Path,
    *,
    force: bool = False,
    prompt: Prompt | None = None,
    environment: Mapping[str, str] | None = None,
) -> Identity:
    """Make a backup this node's identity and give it; show people DUPLICATE_WARNING.

    With force, an identity that was here is kept beside the new one as `identity.json.replaced-…`. Raises ConfigError when
    the backup is no key file, its passphrase is wrong, or another identity is here already.
    """
    data = _read(source)
    identity = _decode(data, source, prompt, environment)
    path = config.key_file
    if not path.exists():
        _write_new(path, data)
        return identity
    present = _read(path)
    if present == data:
        return identity
    if not force:
        raise ConfigError(f"{path} holds an identity already; back it up first, then use --force to replace it")
    kept = path.with_name(f"{path.name}.replaced-{len(list(path.parent.glob(path.name + '.replaced-*'))) + 1}")
    _write_new(kept, present)
    write_atomically(path, data)
    return identity


def read_private(path: Path) -> bytes:
    """Give a key file's bytes. Raises ConfigError, with the command that corrects it, when others could read or change it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"there is no identity at {path}; start the node once or restore a backup") from None
    except OSError as error:
        raise ConfigError(f"the identity {path} cannot be read: {error.strerror}") from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others can read the identity {path}; run: chmod 600 {path}")
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        raise ConfigError(f"the identity {path} belongs to another user; run the node as its owner")
    return _read(path)


def describe(identity: Identity) -> str:
    """Give the identity's checksummed public name."""
    return node_text(identity.node_id)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_FILE_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _decode(data: bytes, path: Path, prompt: Prompt | None, environment: Mapping[str, str] | None) -> Identity:
    try:
        if not is_key_file_sealed(data):
            return decode_key_file(data, None)
        passphrase = _variable(environment)
        if passphrase is None and prompt is not None:
            passphrase = prompt()
        if passphrase is None:
            raise ConfigError(f"it is protected by a passphrase; give it in {PASSPHRASE_VARIABLE}")
        return decode_key_file(data, passphrase)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _variable(environment: Mapping[str, str] | None) -> str | None:
    return (os.environ if environment is None else environment).get(PASSPHRASE_VARIABLE) or None


def _write_new(path: Path, data: bytes, advice: str = "look at it before anything else") -> None:
    """Write a file of mode 0600 that must not exist yet; two processes cannot both succeed."""
    part = write_part(path, data)
    try:
        os.link(part, path)
        sync_folder(path.parent)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; {advice}") from None
    except OSError:
        # A file system without hard links, such as a USB stick's: a crash here may leave a part, which loading refuses.
        _write_exclusively(path, data, advice)
    finally:
        part.unlink(missing_ok=True)


def _write_exclusively(path: Path, data: bytes, advice: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path} exists already; {advice}") from None
    except OSError as error:
        raise unwritable(path, error) from error

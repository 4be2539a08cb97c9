"""The key file: private, never overwritten by accident, backed up and restored."""

import os
import stat
import threading

import pytest

from p2pnode.crypto.keys import check_puzzle
from p2pnode.errors import ConfigError
from p2pnode.node import identity as identity_module
from p2pnode.node.config import NodeConfig, with_settings
from p2pnode.node.identity import backup, load, load_or_create, restore


class Counting:
    """Entropy that never repeats."""

    def __init__(self, start=0):
        self.count = start

    def token(self, size):
        self.count += 1
        return self.count.to_bytes(size, "big")

    def uniform(self):
        return 0.5


@pytest.fixture
def config(tmp_path):
    return NodeConfig(tmp_path / "config", tmp_path / "data")


def make(config, **options):
    return load_or_create(config, Counting(), environment={}, **options)


def test_the_first_use_makes_a_private_file_and_later_ones_read_it(config):
    first = make(config)
    assert stat.S_IMODE(config.key_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.config_folder.stat().st_mode) == 0o700
    assert load_or_create(config, Counting(99), environment={}) == first
    assert [path.name for path in config.config_folder.iterdir()] == ["identity.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_an_exposed_file_is_refused_with_the_command_that_corrects_it(config, mode):
    make(config)
    config.key_file.chmod(mode)
    with pytest.raises(ConfigError, match=f"run: chmod 600 {config.key_file}"):
        make(config)
    config.key_file.chmod(0o600)
    make(config)


def test_a_passphrase_seals_the_file(config):
    sealed = {"P2PNODE_PASSPHRASE": "correct horse"}
    first = load_or_create(config, Counting(), environment=sealed)
    assert first.seed.hex().encode() not in config.key_file.read_bytes()
    assert load(config, environment=sealed) == first
    assert load(config, environment={}, prompt=lambda: "correct horse") == first
    with pytest.raises(ConfigError, match="P2PNODE_PASSPHRASE"):
        load(config, environment={})
    with pytest.raises(ConfigError, match="wrong passphrase"):
        load(config, environment={}, prompt=lambda: "battery staple")


def test_a_new_identity_solves_the_networks_puzzle(config):
    hard = with_settings(config, {"network.puzzle_bits": "6"})
    identity = make(hard)
    assert check_puzzle(identity.node_id, 6)
    for bits in range(7, 33):
        harder = with_settings(config, {"network.puzzle_bits": str(bits)})
        if not check_puzzle(identity.node_id, bits):
            with pytest.raises(ConfigError, match=f"puzzle of {bits} bits"):
                make(harder)
            return
    pytest.fail("no identity solves every puzzle")


def test_backup_and_restore_keep_the_node_id(config, tmp_path):
    first = make(config)
    target = tmp_path / "key.backup"
    backup(config, target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="exists already; use --force"):
        backup(config, target)
    backup(config, target, force=True)
    elsewhere = NodeConfig(tmp_path / "other", tmp_path / "data")
    assert restore(elsewhere, target, environment={}) == first
    assert restore(elsewhere, target, environment={}) == first
    assert load(elsewhere, environment={}) == first


def test_restore_replaces_only_by_force_and_keeps_the_old_one(config, tmp_path):
    old = make(config)
    other = NodeConfig(tmp_path / "other", tmp_path / "data")
    new = load_or_create(other, Counting(50), environment={})
    with pytest.raises(ConfigError, match="holds an identity already"):
        restore(config, other.key_file, environment={})
    assert load(config, environment={}) == old
    assert restore(config, other.key_file, force=True, environment={}) == new
    assert load(config, environment={}) == new
    kept = config.key_file.with_name("identity.json.replaced-1")
    assert restore(NodeConfig(tmp_path / "third", tmp_path), kept, environment={}) == old


def test_damaged_and_missing_files_are_named(config, tmp_path):
    with pytest.raises(ConfigError, match="there is no identity"):
        load(config, environment={})
    with pytest.raises(ConfigError, match="there is no identity"):
        backup(config, tmp_path / "b")
    (tmp_path / "junk").write_bytes(os.urandom(100))
    with pytest.raises(ConfigError, match="junk"):
        restore(config, tmp_path / "junk", environment={})
    assert not config.key_file.exists()
    make(config)
    config.key_file.write_text(config.key_file.read_text()[:40])
    with pytest.raises(ConfigError, match="damaged"):
        backup(config, tmp_path / "b")
    other = NodeConfig(tmp_path / "n", tmp_path)
    make(other)
    with pytest.raises(ConfigError, match="the identity itself"):
        backup(other, other.key_file, force=True)


def test_many_first_starts_at_once_agree_on_one_identity(config):
    barrier = threading.Barrier(6)
    found = []

    def start(number):
        barrier.wait()
        found.append(load_or_create(config, Counting(number * 1000), environment={}).node_id)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 6


def test_a_file_system_without_hard_links_works_too(config, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(identity_module.os, "link", unsupported)
    first = make(config)
    backup(config, tmp_path / "b")
    with pytest.raises(ConfigError, match="exists already"):
        backup(config, tmp_path / "b")
    assert load(config, environment={}) == first

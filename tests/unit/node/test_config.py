"""Settings: one table, four sources, errors that name the setting."""

import stat

import pytest

from p2pnode.errors import ConfigError
from p2pnode.ids import MODEL, NODE, id_text
from p2pnode.node import config as config_module
from p2pnode.node.config import (
    PROFILES,
    SETTINGS,
    NodeConfig,
    find_setting,
    folders,
    live_changes,
    load_config,
    set_setting,
    unset_setting,
    with_settings,
)


@pytest.fixture
def home(tmp_path):
    return {"P2PNODE_HOME": str(tmp_path)}


@pytest.fixture
def file(home, tmp_path):
    path = tmp_path / "config" / "config.toml"
    path.parent.mkdir()
    return path


def test_the_table_is_complete_and_documented():
    assert len({row.name for row in SETTINGS}) == len(SETTINGS) > 60
    for row in SETTINGS:
        assert row.doc.endswith("."), row.name
        assert row.environment == "P2PNODE_" + row.name.upper().replace(".", "_")
        assert row.kind.parse(row.default_text) == row.default, row.name


def test_defaults_and_their_text_agree(home):
    config = load_config(home)
    assert with_settings(config, config.as_text()) == config
    for profile, preset in PROFILES.items():
        assert set(preset) <= {row.name for row in SETTINGS}, profile


def test_folders_follow_the_home_variable_and_the_system(home, tmp_path):
    assert folders(home) == (tmp_path / "config", tmp_path / "data")
    config_folder, data_folder = folders({})
    assert config_folder != data_folder
    config = load_config(home)
    assert config.key_file.parent == config.config_file.parent == tmp_path / "config"
    assert {config.database_file.parent, config.socket_file.parent, config.models_folder.parent} == {tmp_path / "data"}


def test_the_environment_beats_the_file_beats_the_profile_beats_the_default(home, file):
    assert load_config(home).limits.connections_max == 128
    file.write_text('[network]\nprofile = "public"\n')
    config = load_config(home)
    assert (config.limits.connections_max, config.network.mdns, config.network.puzzle_bits) == (96, False, 16)
    file.write_text('[network]\nprofile = "public"\nmdns = true\n[limits]\nconnections_max = 50\n')
    config = load_config(home)
    assert (config.limits.connections_max, config.network.mdns, config.network.puzzle_bits) == (50, True, 16)
    config = load_config({**home, "P2PNODE_LIMITS_CONNECTIONS_MAX": "60", "P2PNODE_NETWORK_PROFILE": "local"})
    assert (config.limits.connections_max, config.network.puzzle_bits, config.network.listen) == (60, 0, "127.0.0.1:0")


def test_human_units_become_plain_numbers(home, file):
    client = id_text(NODE, b"c" * 32)
    file.write_text(
        f"""[provide]
price = "0.25"
memory = "1.5GiB"
call_time_max = "1m30s"
cpus = "50%"
region = ["eu", "fr"]
clients_deny = ["{client}"]
models_allow = "{id_text(MODEL, b"m" * 32)}"
[credit]
growth = "10%"
[client]
max_price = 2
"""
    )
    config = load_config(home)
    provide = config.provide
    assert (provide.price, provide.memory, provide.call_time_max) == (250_000, 3 << 29, 90.0)
    assert (provide.region, provide.clients_deny, provide.models_allow) == (("eu", "fr"), (b"c" * 32,), (b"m" * 32,))
    assert (config.credit.growth, config.client.max_price) == (0.1, 2_000_000)
    assert provide.cpu_fraction(8) == 0.5
    assert config.as_text()["provide.memory"] == "1536MiB"
    assert config.as_text()["provide.clients_deny"] == client


def test_the_one_price_gives_the_operations_price(home):
    config = load_config(home)
    assert config.provide.operations_price_micro == 1000
    assert with_settings(config, {"provide.price": "0.0001"}).provide.operations_price_micro == 1
    assert with_settings(config, {"provide.operations_price": "0.000007"}).provide.operations_price_micro == 7
    assert with_settings(config, {"provide.cpus": "3"}).provide.cpu_fraction(4) == 0.75
    assert with_settings(config, {"provide.cpus": "9"}).provide.cpu_fraction(4) == 1.0


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("provide.pirce", "1", "did you mean provide.price"),
        ("price", "1", "did you mean"),
        ("provide.price", "cheap", "provide.price is wrong: 'cheap' is not an amount"),
        ("provide.price", "-1", "at least 0"),
        ("provide.memory", "lots", "not a size"),
        ("provide.queue_max", "0", "between 1 and"),
        ("provide.enabled", "maybe", "neither true nor false"),
        ("provide.cpus", "0", "between 1"),
        ("provide.cpus", "0%", "more than 0%"),
        ("provide.clients_deny", "node-xyz", "should have 56 characters"),
        ("provide.sandbox_level_min", "none", "none of full, gpu, reduced"),
        ("network.listen", "7470", "not an address"),
        ("network.listen", "::1:7470", "brackets"),
        ("network.static_peers", "a:1,b", "'b' is not an address"),
        ("network.static_peers", "node-abc@a:1", "should have 56"),
        ("network.profile", "world", "none of local, lan, public"),
        ("network.id", "", "printable"),
        ("client.deadline", "soon", "not a duration"),
        ("credit.growth", "150%", "between 0 and 100%"),
    ],
)
def test_wrong_settings_are_refused_and_leave_the_file_alone(home, file, name, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        set_setting(name, text, home)
    assert not file.exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[provide]\npirce = 1\n", "no setting is called 'provide.pirce'; did you mean provide.price"),
        ("[provide\n", "not valid TOML"),
        ("price = 1\n", "must stand in a section"),
        ("[provide]\nprice = 1979-05-27\n", "must be a text, a number"),
        ("[provide]\nprice = [[1]]\n", "must be a text, a number"),
        ("[provide]\nqueue_max = 'x'\n", r"provide.queue_max in .*config.toml is wrong: 'x' is not a whole number"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(home, file, text, complaint):
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_config(home)


def test_a_wrong_or_misspelt_variable_is_refused(home):
    with pytest.raises(ConfigError, match="P2PNODE_PROVIDE_PRICE is wrong"):
        load_config({**home, "P2PNODE_PROVIDE_PRICE": "x"})
    with pytest.raises(ConfigError, match="did you mean P2PNODE_PROVIDE_PRICE"):
        load_config({**home, "P2PNODE_PROVIDE_PIRCE": "1"})
    load_config({**home, "P2PNODE_JSON": "1", "P2PNODE_PASSPHRASE": "x"})


def test_set_keeps_comments_and_other_settings(home, file):
    file.write_text(
        '# mine\n[network]\nid = "home"  # ours\nstatic_peers = [\n  "a:1",\n  "b:2",\n]\n\n[provide]\n# cheap\nprice = "2"\n'
    )
    assert set_setting("provide.price", "0.5", home).live
    set_setting("network.static_peers", "c:3,d:4", home)
    set_setting("network.mdns", "off", home)
    set_setting("limits.peers_max", "99", home)
    set_setting("provide.memory", "2GiB", home)
    assert file.read_text() == (
        '# mine\n[network]\nid = "home"  # ours\nstatic_peers = ["c:3", "d:4"]\nmdns = false\n\n'
        '[provide]\n# cheap\nprice = 0.5\nmemory = "2GiB"\n\n[limits]\npeers_max = 99\n'
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    unset_setting("network.static_peers", home)
    unset_setting("provide.call_price", home)
    config = load_config(home)
    assert (config.network.static_peers, config.network.id, config.provide.price) == ((), "home", 500_000)
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_every_setting_survives_being_written(home, row):
    samples = {"region": "eu,fr", "static_peers": "a:1", "operations_price": "0.5", "socket": '/tmp/a "b" \\c'}
    text = samples.get(row.name.partition(".")[2], row.default_text)
    set_setting(row.name, text, home)
    assert load_config(home).value(row.name) == row.kind.parse(text)


def test_a_write_that_fails_leaves_the_old_file(home, file, monkeypatch):
    set_setting("provide.price", "2", home)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(config_module.write_atomically.__globals__["os"], "fsync", broken)
    with pytest.raises(ConfigError, match="No space left"):
        set_setting("provide.price", "3", home)
    assert load_config(home).provide.price == 2_000_000


def test_what_applies_live_is_told_from_what_needs_a_restart(home):
    old = load_config(home)
    new = with_settings(old, {"provide.price": "9", "network.listen": "0.0.0.0:1"})
    assert live_changes(old, new) == (["provide.price"], ["network.listen"])


def test_networks_have_different_ids(home):
    config = load_config(home)
    other = with_settings(config, {"network.id": "other"})
    assert len(config.network.network_id) == 32
    assert config.network.network_id != other.network.network_id


def test_a_config_can_be_made_without_files(tmp_path):
    config = NodeConfig(tmp_path / "c", tmp_path / "d")
    assert with_settings(config, {"network.profile": "local"}).network.listen == "127.0.0.1:0"
    assert find_setting("Provide.Price").name == "provide.price"
    with pytest.raises(ConfigError):
        with_settings(config, {"network.profile": "world"})


def test_bootstrap_entries_come_from_the_setting_and_from_files(tmp_path):
    from p2pnode.node.layer_settings import bootstrap_entries

    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("# friends\n10.0.0.1:7470\n\n10.0.0.2:7470  # bob\n")
    second.write_text("10.0.0.2:7470\n10.0.0.3:7470\n")
    config = with_settings(NodeConfig(tmp_path, tmp_path), {"network.bootstrap": f"10.0.0.9:7470,file:{first},file:{second}"})
    assert bootstrap_entries(config) == ("10.0.0.9:7470", "10.0.0.1:7470", "10.0.0.2:7470", "10.0.0.3:7470")


@pytest.mark.parametrize(
    ("text", "words"), [("10.0.0.1:7470\nnonsense\n", "line 2"), ("x" * 300_000, "too large"), (None, "cannot be read")]
)
def test_a_bad_list_of_bootstrap_entries_is_named(tmp_path, text, words):
    from p2pnode.node.layer_settings import bootstrap_entries

    path = tmp_path / "entries"
    if text is not None:
        path.write_text(text)
    config = with_settings(NodeConfig(tmp_path, tmp_path), {"network.bootstrap": f"file:{path}"})
    with pytest.raises(ConfigError, match=words):
        bootstrap_entries(config)

"""Where the socket lies, however deep the data folder."""

import stat

import pytest

from p2pnode.control import places
from p2pnode.control.places import choose_socket, find_socket
from p2pnode.errors import ConfigError


def test_a_short_folder_holds_its_socket(tmp_path):
    assert choose_socket(tmp_path) == tmp_path.resolve() / "api.sock"
    assert find_socket(tmp_path) == tmp_path / "api.sock"


def test_a_deep_folder_records_a_short_place(tmp_path, monkeypatch):
    runtime = tmp_path / "r"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(runtime))
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    chosen = choose_socket(deep)
    assert chosen.parent.parent == runtime
    assert stat.S_IMODE(chosen.parent.stat().st_mode) == 0o700
    assert find_socket(deep) == chosen
    assert choose_socket(deep) == chosen, "the same folder has the same place"


def test_a_place_that_somebody_else_prepared_is_refused(tmp_path, monkeypatch):
    runtime = tmp_path / "r"
    (runtime / f"p2pnode-{places.os.getuid()}").mkdir(parents=True, mode=0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(runtime))
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="only you"):
        choose_socket(deep)


def test_the_owners_choice_is_recorded_and_forgotten(tmp_path):
    wanted = tmp_path / "elsewhere.sock"
    assert choose_socket(tmp_path, wanted) == wanted
    assert find_socket(tmp_path) == wanted
    choose_socket(tmp_path, tmp_path / "api.sock")
    assert find_socket(tmp_path) == tmp_path / "api.sock"

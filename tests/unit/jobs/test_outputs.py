"""A map's parts: whose they are, and that half of them is never all there is."""

import shutil

import numpy as np
import pytest

from p2pnode.jobs.outputs import claim_parts, owns_parts, part_path, parts_folder, release_parts, remove_parts, write_part

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture
def output(tmp_path):
    """A place with ten parts of one map."""
    place = tmp_path / "out.npy"
    claim_parts(place, KEY)
    for position in range(10):
        write_part(part_path(place, position), {"y": np.zeros(2, np.float32)})
    return place


def parts(output):
    folder = parts_folder(output)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_parts_of_the_same_work_stay_and_those_of_other_work_go(output):
    claim_parts(output, KEY)
    assert len(parts(output)) == 11
    assert owns_parts(output, KEY)
    claim_parts(output, OTHER)
    assert parts(output) == ["work"]
    assert not owns_parts(output, KEY)


def test_parts_are_removed_all_at_once(output, monkeypatch):
    """Killed while it removes them, a map must not look as if half of it were still to be done."""
    rmtree, calls = shutil.rmtree, []

    def killed(folder, **options):
        calls.append(folder)
        if len(calls) == 2:
            for path in sorted(folder.iterdir())[::2]:
                path.unlink()
            raise SystemExit
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        remove_parts(output)
    assert parts(output) == []
    monkeypatch.undo()
    release_parts(output, KEY)
    assert list(output.parent.iterdir()) == [], "what the kill left behind goes with the next command"


def test_only_the_owner_releases_the_parts(output):
    release_parts(output, OTHER)
    assert len(parts(output)) == 11
    release_parts(output, KEY)
    assert parts(output) == []
    release_parts(output, KEY)

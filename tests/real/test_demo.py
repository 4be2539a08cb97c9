"""`make demo`, as a person sees it first: three daemons, a client, real models, every receipt verified from files alone."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_agrees_and_verifies(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": "", "XDG_DATA_HOME": "", "XDG_RUNTIME_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-m", "p2pnode.cli.main", "demo"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("3 jobs agree with the packages' own answers, 6 receipts verify")

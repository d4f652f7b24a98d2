"""A short soak; `python tests/soak.py --minutes 30` is a long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def soak(tmp_path, *words):
    """The last line that the soak printed."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "soak.py"), *words], capture_output=True, text=True,
        timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the soak forks its attempts")


def test_a_round_of_trouble_ends_in_the_same_files(tmp_path):
    assert " 1 rounds the same after " in soak(tmp_path, "--minutes", "0", "--length", "1")


@pytest.mark.slow
def test_half_a_minute_of_trouble_ends_in_the_same_files(tmp_path):
    last = soak(tmp_path, "--minutes", "0.5", "--length", "2", "--seed", "1")
    assert " kill" in last
    assert not list(tmp_path.glob("soak-*"))  # folders are kept only where an error ends it

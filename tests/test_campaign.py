"""A small share of the reliability campaign (`make campaign` runs all of it)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_share_of_the_campaign(tmp_path):
    """Crashes, failing writes, signals, little memory, damaged files, NaN: see `results/RELIABILITY.md`."""
    parts = "mutations", "crashes", "writes", "processes", "numerics", "memory"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    out = str(tmp_path / "campaign")
    command = [sys.executable, "-m", "campaign", "--out", out, "--share", "0.01", "--only", *parts]
    ended = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]

"""The checks on a second device, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
def test_everything_runs_on_any_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(FOLDER / "second_device_checks.py")]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "failed" not in done.stdout

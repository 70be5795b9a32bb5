"""Trainings killed at random times end with the bits of the uninterrupted ones: the short version of the campaign."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "campaigns" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks a child for each attempt; there is no os.fork")
@pytest.mark.parametrize(("workers", "kills"), [(0, 40), (2, 8)])
def test_killed_trainings_end_with_the_same_bits(workers, kills):
    """SIGKILL at any time, soon after the start and while a checkpoint is written; no broken file is ever chosen."""
    command = [sys.executable, str(CAMPAIGN), "--kills", str(kills), "--workers", str(workers)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kills: {kills} " in done.stdout
    assert "faults: 0" in done.stdout

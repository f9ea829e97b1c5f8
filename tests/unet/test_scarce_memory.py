"""Memory that really runs out, by a limit on a process's addresses: strips are halved, and the result is the same."""

import json
import os
import subprocess
import sys

import pytest

# Each block is a mapping of its own, so that what is freed no longer counts.
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MIB = 90  # by reckoning tall strips take 116, those of 32 rows 75


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and heaps are Linux's")
def test_a_forward_goes_on_in_smaller_strips_where_memory_runs_out():
    command = [sys.executable, "-m", "tests.unet.scarce", str(MIB)]
    done = subprocess.run(command, env=os.environ | NO_HEAP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"][:2] == [128, 64] and found["error"] <= 1e-5

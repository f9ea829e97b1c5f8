"""Real exhaustion of memory, with a limited address space: strips are halved, and the result is the same."""

import json
import os
import subprocess
import sys

import pytest

# Each block is a separate mapping, so freed blocks do not count towards the limit.
NO_HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MIB = 90  # the estimate is 116 for tall strips and 75 for strips of 32 rows


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="requires Linux limits and heaps")
def test_a_forward_falls_back_to_smaller_strips_when_memory_runs_out():
    command = [sys.executable, "-m", "tests.unet.scarce", str(MIB)]
    done = subprocess.run(command, env=os.environ | NO_HEAP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"][:2] == [128, 64] and result["error"] <= 1e-5

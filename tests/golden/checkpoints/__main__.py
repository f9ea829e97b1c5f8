"""`python -m tests.golden.checkpoints`: record the checkpoints again, and check that they give the same bits here."""

import contextlib
import sys
import tempfile

from tests.golden.checkpoints.cases import CASES, execute, find_difference, place, record

for name in CASES:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        record(name)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        place(name)
        resumed, _ = execute(name, "a.png"), execute(name, "b.png")
        difference = find_difference("a.png", "b.png")
        sys.stdout.write(f"{name}: {resumed.resumed_from}, difference {difference}\n")
        assert difference == 0, "a resumed run must give the same bits on the same machine"

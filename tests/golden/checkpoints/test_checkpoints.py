"""Stored checkpoints of this SCHEMA and NUMERICS resume, and give the image of an uninterrupted run."""

from pathlib import Path

import pytest

from linfusion_cli.checkpoint.versions import NUMERICS, SCHEMA
from tests.golden.checkpoints.cases import CASES, RULE, execute, find_difference, place

# The steps before the checkpoint were computed on another machine, whose CPU may round differently: see
# LATENTS_TOLERANCE in tests/golden/cases.py. The decoder multiplies that by up to 3. On one machine it is 0.
TOLERANCE = 1e-3
CHANGELOG = Path(__file__).parents[3] / "CHANGELOG.md"


@pytest.mark.parametrize("name", CASES)
def test_a_stored_checkpoint_gives_the_image_of_an_uninterrupted_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(name)
    try:
        resumed_from = execute(name, "a.png").resumed_from
    except Exception as error:
        raise AssertionError(RULE.format(name)) from error
    assert resumed_from == CASES[name].resumed_from, RULE.format(name)
    execute(name, "b.png")
    difference = find_difference("a.png", "b.png")
    assert difference <= TOLERANCE, f"{RULE.format(name)} The difference is {difference:.1e}."


def test_the_changelog_names_both_numbers():
    rule = "mention the numbers of linfusion_cli/checkpoint/versions.py in CHANGELOG.md"
    assert f"schema {SCHEMA} and NUMERICS {NUMERICS}" in " ".join(CHANGELOG.read_text("utf-8").split()), rule

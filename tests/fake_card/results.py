"""The results of runs on a fake card, which have a process of their own: it replaces functions of torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.fake_card.cases import CASES, Case, VaeCase

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
# Copies that wait, by what they are for: once in a stage, never in a step.
MAY_WAIT = {
    "pageable upload vae/decode.py:source_of": 1,  # the latents, before their image is decoded
    "pageable upload strips/storage.py:pixels": 1,  # where the attention of the VAE looks
    "pageable upload strips/windows.py:places": 8,  # what an enlarged map repeats: kept for all forwards
}
NOISE = "pageable upload sampling/schedulers/schedule.py:<lambda>"  # that some schedulers add: latents, in each step
# torch.cat widens: diffusers joins SDXL's pooled text with sizes in fp32, and narrows the result.
MAY_MIX = {"cat in torch.float16, torch.float32", "cat in torch.bfloat16, torch.float32"}


@cache
def results(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Of the runs with these names, all in one process."""
    shared = Path(tempfile.gettempdir()) / f"linfusion-fake-card-{torch.__version__}"
    shared.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shared) as folder:  # several run at a time, and share the guard alone
        command = [sys.executable, "-m", "tests.fake_card.pipeline", folder, str(shared), *names]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def result(name: str, group: tuple[str, ...]) -> dict[str, Any]:
    """Of the run `name`, which runs with its group."""
    found = results(group)[name]
    assert "error" not in found, found["error"]
    return found


def check(case: Case | VaeCase, found: dict[str, Any]) -> None:
    """Everything that holds for every run, whatever it is made of."""
    planned = [stage for stage in found["stages"] if "plan" in stage]
    assert planned
    for stage in planned:
        check_memory(case, stage)
        check_waiting(stage)
        assert not stage["large"], stage["large"]
        assert {what.rsplit(" ", 1)[0] for what in stage["mixed"]} <= MAY_MIX, stage["mixed"]
    assert found["left_pinned"] == 0


def check_memory(case: Case | VaeCase, stage: dict[str, Any]) -> None:
    """The plan predicts what the allocator in use reserves, and pinned memory."""
    plan = stage["plan"]
    if case.segments == "expandable":
        assert 0.85 * plan["device_bytes"] <= stage["reserved"] <= plan["device_bytes"], sizes(stage)
    else:
        assert stage["native"] <= plan["device_bytes"], sizes(stage)
    assert 0.85 * plan["pinned_bytes"] <= stage["pinned"] <= plan["pinned_bytes"], sizes(stage)


def check_waiting(stage: dict[str, Any]) -> None:
    """The host waits for the card once in a step at most, and for no copy but that of noise."""
    noises = stage["blocking"].get(NOISE, 0)
    assert noises <= len(steps_of(stage))
    for before, after in steps_of(stage)[1:]:
        assert after["syncs"] - before["syncs"] <= 1, stage["syncs"]
        assert after["blocking"] - before["blocking"] <= min(1, noises), stage["blocking"]
    others = {what: count for what, count in stage["blocking"].items() if what != NOISE}
    assert all(count <= MAY_WAIT.get(what, 0) for what, count in others.items()), others


def check_work(stage: dict[str, Any], share: float = 1.0) -> None:
    """FLOPs and copied bytes are as planned, of the `share` of the steps that this run does."""
    plan = stage["plan"]
    assert abs(stage["flops"] / (share * plan["flops"]) - 1) <= 0.02, (stage["flops"], plan["flops"])
    assert abs(stage["copied_bytes"] - share * plan["copied_bytes"]) <= 0.02 * share * plan["copied_bytes"]


def steps_of(stage: dict[str, Any]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """The counts before and after each step."""
    return list(zip(stage["steps"], stage["steps"][1:], strict=False))


def sizes(stage: dict[str, Any]) -> str:
    """What is shown where memory is not as planned."""
    names = ("allocated", "reserved", "native", "pinned")
    counted = ", ".join(f"{name} {stage[name] / MIB:.0f}" for name in names)
    plan = stage["plan"]
    return (
        f"{stage['name']}: {counted}; planned {plan['device_bytes'] / MIB:.0f} and {plan['pinned_bytes'] / MIB:.0f} MiB"
    )


def group_of(cases: list[Any]) -> tuple[str, ...]:
    """The names of the cases that run in one process."""
    return tuple(case.name for case in cases if case.name in CASES)

"""Results of runs on a fake card, in a separate process because it replaces functions of torch."""

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
# Blocking copies that are allowed, and how often per stage; none of them within a step.
ALLOWED_BLOCKING = {
    "pageable upload vae/decode.py:open_source": 1,  # the latents, before decoding
    "pageable upload strips/feature_map.py:read_pixels": 1,  # the keys of the VAE's attention
    "pageable upload strips/windows.py:cached_nearest_indices": 8,  # of upsampled maps, cached for all forward passes
}
NOISE = "pageable upload sampling/schedulers/schedule.py:<lambda>"  # added by some schedulers in each step
# diffusers concatenates SDXL's pooled text with sizes in fp32, then converts the result.
ALLOWED_MIXING = {"cat in torch.float16, torch.float32", "cat in torch.bfloat16, torch.float32"}


@cache
def run_group(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Run the named cases in one process and return {name: result}."""
    shared = Path(tempfile.gettempdir()) / f"linfusion-fake-card-{torch.__version__}"
    shared.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=shared) as folder:  # parallel processes share only the guard
        command = [sys.executable, "-m", "tests.fake_card.pipeline", folder, str(shared), *names]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_case(name: str, group: tuple[str, ...]) -> dict[str, Any]:
    """Return the result of the case `name`, which runs in a process with its group."""
    result = run_group(group)[name]
    assert "error" not in result, result["error"]
    return result


def check_result(case: Case | VaeCase, result: dict[str, Any]) -> None:
    """Check the properties that all runs have."""
    planned = [stage for stage in result["stages"] if "plan" in stage]
    assert planned
    for stage in planned:
        check_memory(case, stage)
        check_blocking(stage)
        assert not stage["large"], stage["large"]
        assert {event.rsplit(" ", 1)[0] for event in stage["mixed"]} <= ALLOWED_MIXING, stage["mixed"]
    assert result["left_pinned"] == 0


def check_memory(case: Case | VaeCase, stage: dict[str, Any]) -> None:
    """Check that the plan predicts the memory that the allocator reserves, and the pinned memory."""
    plan = stage["plan"]
    if case.segments == "expandable":
        assert 0.85 * plan["device_bytes"] <= stage["reserved"] <= plan["device_bytes"], describe_memory(stage)
    else:
        assert stage["native"] <= plan["device_bytes"], describe_memory(stage)
    assert 0.85 * plan["pinned_bytes"] <= stage["pinned"] <= plan["pinned_bytes"], describe_memory(stage)


def check_blocking(stage: dict[str, Any]) -> None:
    """Check that the host waits for the card at most once per step, and for no copies except of noise."""
    noises = stage["blocking"].get(NOISE, 0)
    assert noises <= len(list_steps(stage))
    for before, after in list_steps(stage)[1:]:
        assert after["syncs"] - before["syncs"] <= 1, stage["syncs"]
        assert after["blocking"] - before["blocking"] <= min(1, noises), stage["blocking"]
    others = {event: count for event, count in stage["blocking"].items() if event != NOISE}
    assert all(count <= ALLOWED_BLOCKING.get(event, 0) for event, count in others.items()), others


def check_work(stage: dict[str, Any], share: float = 1.0) -> None:
    """Check FLOPs and copied bytes against the plan, for a run of a `share` of the steps."""
    plan = stage["plan"]
    assert abs(stage["flops"] / (share * plan["flops"]) - 1) <= 0.02, (stage["flops"], plan["flops"])
    assert abs(stage["copied_bytes"] - share * plan["copied_bytes"]) <= 0.02 * share * plan["copied_bytes"]


def list_steps(stage: dict[str, Any]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Return the counts before and after each step."""
    return list(zip(stage["steps"], stage["steps"][1:], strict=False))


def describe_memory(stage: dict[str, Any]) -> str:
    """Return counted and planned memory, for the message of a failed check."""
    names = ("allocated", "reserved", "native", "pinned")
    counted = ", ".join(f"{name} {stage[name] / MIB:.0f}" for name in names)
    plan = stage["plan"]
    return (
        f"{stage['kind']}: {counted}; planned {plan['device_bytes'] / MIB:.0f} and {plan['pinned_bytes'] / MIB:.0f} MiB"
    )


def build_group(cases: list[Any]) -> tuple[str, ...]:
    """Return the names of cases that run in one process."""
    return tuple(case.name for case in cases if case.name in CASES)

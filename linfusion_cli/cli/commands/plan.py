"""`linfusion plan`: show how generate or upscale would run, its memory and time, and whether it fits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from linfusion_cli.cli.output.progress import echo_notice
from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.cli.output.tables import build_table, format_table
from linfusion_cli.cli.parsing.build_request import configure_hub, read_command_options, read_request
from linfusion_cli.cli.parsing.options import add_settings
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.events import Notice, format_stage
from linfusion_cli.core.units import format_bytes, format_seconds
from linfusion_cli.planning.gpus import UNKNOWN_GPU, Gpu, find_gpu
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import execution_to_json, request_to_json, to_json_value
from linfusion_cli.settings.table import flatten_request

if TYPE_CHECKING:
    from rich.table import Table

    from linfusion_cli.planning.estimate import ResourceEstimate
    from linfusion_cli.planning.plan import Plan, PlannedStage
    from linfusion_cli.planning.strategies import DenoiseStrategy
    from linfusion_cli.vae.statistics import VaeStrategy

SCHEMA = 1  # of the JSON
HEADINGS = ("stage", "size", "steps", "attention", "strips", "maps", "guidance", "GPU", "host", "time")

EXAMPLES = """
linfusion plan --preset sdxl --size 16384
linfusion plan --preset sdxl --size 16384 --device cuda --vram 24GiB
linfusion plan --preset sdxl --size 16384 --gpu rtx4090
linfusion plan --image photo.jpg --size 8192 --json
"""


@add_settings("plan")
def command(given: dict[str, Any]) -> None:
    """Show how generate or upscale would run, its memory and time. Needs no weights, and with --gpu no GPU."""
    options = read_command_options(given)
    configure_hub(bool(given["download"]), quiet=False)
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    implied = {} if gpu is None else imply_settings(gpu, given)
    origins, request = read_request(given | implied, echo_notice)
    origins |= dict.fromkeys(implied, "--gpu")
    from linfusion_cli.planning.assumed_gpu import choose_machine
    from linfusion_cli.planning.machine import build_cpu_notice
    from linfusion_cli.run.inputs.disk import estimate_disk_bytes
    from linfusion_cli.run.inputs.resolve_plan import resolve_plan
    from linfusion_cli.run.inputs.source_image import resolve_source_image
    from linfusion_cli.run.stages.plan import plan_on_machine  # torch and diffusers: not needed for --help

    request, image = resolve_source_image(request)
    machine = choose_machine(request, gpu)
    resolved = resolve_plan(request, image, lambda text: echo_notice(Notice(text)))
    for warning in resolved.facts.warnings:
        echo_notice(Notice(warning))
    plan, disk = plan_on_machine(resolved, machine), estimate_disk_bytes(resolved)
    if notice := build_cpu_notice(plan.machine, plan.estimate.seconds):
        echo_notice(Notice(notice))
    if options.json:
        emit_result(json.dumps(plan_to_json(plan, request, origins, disk), indent=2))
    else:
        budgets = format_budgets(plan, disk, is_host_default=request.execution.ram is None)
        parts = [format_table(build_plan_table(plan)), budgets, format_settings(origins, request)]
        emit_result("\n\n".join(parts))


def imply_settings(gpu: Gpu, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that --gpu implies, as text: the device, and a budget unless --vram is `given`.

    They precede other sources, whose values are for the GPU of this machine. Raise UsageError for --device cpu.
    """
    device = given["device"]
    if device == "cpu":
        raise UsageError("--gpu cannot be combined with --device cpu.", "Omit one of them.", "device")
    implied = {"device": "cuda"} if device in (None, "auto") else {}
    return implied if given["vram"] is not None else implied | {"vram": f"{gpu.default_budget_bytes}B"}


def plan_to_json(plan: Plan, request: Request, origins: Mapping[str, str], disk_bytes: int) -> dict[str, Any]:
    """Return the JSON values of a plan with its request, the origins of its settings, and the required disk space."""
    described = {"request": request_to_json(request), "execution": execution_to_json(request), "settings": origins}
    values = {"schema": SCHEMA} | described | {"disk_bytes": disk_bytes} | describe_gpu(plan)
    return values | {"plan": plan.to_json()}


def describe_gpu(plan: Plan) -> dict[str, Any]:
    """Return the JSON values that say whether the plan is for a GPU that was not measured, and for which."""
    gpu = plan.machine.assumed_gpu
    return {"estimated": gpu is not None, "gpu": None if gpu is None else gpu.to_json()}


def build_plan_table(plan: Plan) -> Table:
    """Return a table with a row per stage, and a row with the peak memory and total time."""
    table = build_table(*HEADINGS)
    for stage in plan.stages:
        table.add_row(*_format_stage(stage, plan))
    table.add_row("total", *[""] * 6, *_format_estimate(plan.estimate, plan))
    return table


def _format_stage(stage: PlannedStage, plan: Plan) -> list[str]:
    from linfusion_cli.planning.strategies import DenoiseStrategy

    strategy = stage.strategy
    columns = format_denoise(strategy) if isinstance(strategy, DenoiseStrategy) else format_vae(strategy)
    name = format_stage(stage.kind, stage.phase_name)
    return [name, str(stage.size), format_steps(stage), *columns, *_format_estimate(stage.estimate, plan)]


def format_steps(stage: PlannedStage) -> str:
    """Return the number of steps, and the number of those with a dilated pass."""
    return f"{stage.steps}, {stage.dilated} dilated" if stage.dilated else str(stage.steps or "")


def format_denoise(strategy: DenoiseStrategy) -> list[str]:
    """Return attention, strips, place of the feature maps, and guidance of a phase's UNet."""
    strips = f"{strategy.strips.rows} rows, {strategy.strips.tokens} tokens" if strategy.strips else "whole"
    maps = {"device": "device", "skips": "device, skips on host", "host": "host"}[strategy.place]
    return [strategy.attention, strips, maps, "batched" if strategy.batched else "sequential"]


def format_vae(strategy: VaeStrategy) -> list[str]:
    """Return the same columns for a VAE: its strips, and the source of its normalization statistics."""
    whole = {"exact": "whole", "partly exact": "partly whole"}[strategy.statistics] if strategy.start else ""
    maps = f"{whole}, {strategy.place}" if whole else f"{strategy.patches} patches" if strategy.patches else ""
    return ["", f"{strategy.height} rows", maps, ""]


def _format_estimate(estimate: ResourceEstimate | None, plan: Plan) -> list[str]:
    if estimate is None:
        return ["unknown"] * 3
    device = "" if plan.machine.device_bytes is None else format_bytes(estimate.device_bytes)
    seconds = "" if math.isnan(estimate.seconds) else format_seconds(estimate.seconds)
    return [device, format_bytes(estimate.host_bytes), seconds]


def format_budgets(plan: Plan, disk_bytes: int, is_host_default: bool) -> str:
    """Return the memory budgets and the required disk space as one line, after a line about an assumed GPU."""
    machine, disk = plan.machine, f"Required disk space: up to {format_bytes(disk_bytes)}."
    if machine.assumed_gpu is not None:
        free = ", 90 % of what is free on this machine (--ram sets another)" if is_host_default else ""
        memory = f"{format_bytes(machine.device_bytes or 0)} of GPU memory, {format_bytes(machine.host_bytes)}"
        return f"{describe_assumed_gpu(machine.assumed_gpu)}\nBudget: {memory} of host memory{free}. {disk}"
    device = "" if machine.device_bytes is None else f", {format_bytes(machine.device_bytes)} of GPU memory"
    memory = f"Budget on {machine.device}: {format_bytes(machine.host_bytes)} of host memory{device}."
    return f"{memory} {disk}"


def describe_assumed_gpu(gpu: Gpu) -> str:
    """Return a sentence that says which GPU the plan is an estimate for."""
    if gpu is UNKNOWN_GPU:
        return "Estimate for a GPU that this machine does not have. The time is unknown: name the GPU with --gpu."
    memory = format_bytes(gpu.memory_bytes)
    return f"Estimate for one {gpu.name} ({memory}) from its data sheet. Nothing was measured: runs can take longer."


def format_settings(origins: Mapping[str, str], request: Request) -> str:
    """Return a table of all settings with their origins."""
    table = build_table("setting", "value", "from")
    values = to_json_value(flatten_request(request))
    for name, origin in origins.items():
        table.add_row(name, json.dumps(values[name], ensure_ascii=False), origin)
    return format_table(table)

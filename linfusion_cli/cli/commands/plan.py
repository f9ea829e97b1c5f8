"""`linfusion plan`: show how generate or upscale would run, its memory and time, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linfusion_cli.cli.output.progress import echo_notice
from linfusion_cli.cli.output.streams import emit_result
from linfusion_cli.cli.output.tables import build_table, format_table
from linfusion_cli.cli.parsing import option_groups
from linfusion_cli.cli.parsing.build_request import configure_hub, read_request
from linfusion_cli.core.events import Notice
from linfusion_cli.core.units import format_bytes, format_seconds
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest

if TYPE_CHECKING:
    from rich.table import Table

    from linfusion_cli.planning.estimate import ResourceEstimate
    from linfusion_cli.planning.plan import Plan, PlannedStage
    from linfusion_cli.planning.strategies import DenoiseStrategy
    from linfusion_cli.vae.statistics import VaeStrategy

HEADINGS = ("stage", "size", "steps", "attention", "strips", "maps", "guidance", "GPU", "host", "time")

PlanJson = Annotated[bool, typer.Option("--json", help="Print request, origins of its settings, and plan as JSON.")]


@option_groups.collect_options(option_groups.plan_options, *option_groups.REQUEST_GROUPS)
def command(given: dict[str, Any], as_json: PlanJson = False) -> None:
    """Show how generate or upscale would run, its memory and time. Loads no weights."""
    configure_hub(bool(given["download"]), quiet=False)
    kind = GenerateRequest if given["image"] is None else UpscaleRequest
    origins, request = read_request(given, echo_notice, kind)
    from linfusion_cli.planning.machine import build_cpu_notice
    from linfusion_cli.run.inputs.disk import estimate_disk_bytes
    from linfusion_cli.run.inputs.resolve import resolve_request
    from linfusion_cli.run.inputs.source_image import resolve_source_image
    from linfusion_cli.run.stages.plan import plan_run  # torch and diffusers: not needed for --help

    request, image = resolve_source_image(request) if isinstance(request, UpscaleRequest) else (request, None)
    resolved = resolve_request(request, image)
    for warning in resolved.facts.warnings:
        echo_notice(Notice(warning))
    plan, disk = plan_run(resolved), estimate_disk_bytes(resolved)
    if notice := build_cpu_notice(plan.machine, plan.estimate.seconds):
        echo_notice(Notice(notice))
    if as_json:
        values = {"request": request.to_json(), "settings": origins, "disk_bytes": disk}
        emit_result(json.dumps(values | {"plan": plan.to_json()}, indent=2))
    else:
        parts = [format_table(build_plan_table(plan)), format_budgets(plan, disk), format_settings(origins, request)]
        emit_result("\n\n".join(parts))


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
    return [stage.name, str(stage.size), format_steps(stage), *columns, *_format_estimate(stage.estimate, plan)]


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
    return [device, format_bytes(estimate.host_bytes), format_seconds(estimate.seconds)]


def format_budgets(plan: Plan, disk_bytes: int) -> str:
    """Return the memory budgets and the required disk space as one line."""
    machine = plan.machine
    device = "" if machine.device_bytes is None else f", {format_bytes(machine.device_bytes)} of GPU memory"
    memory = f"Budget on {machine.device}: {format_bytes(machine.host_bytes)} of host memory{device}."
    return f"{memory} Required disk space: up to {format_bytes(disk_bytes)}."


def format_settings(origins: Mapping[str, str], request: ImageRequest) -> str:
    """Return a table of all settings with their origins."""
    table = build_table("setting", "value", "from")
    values = request.to_json()
    for name, origin in origins.items():
        table.add_row(name, json.dumps(values[name], ensure_ascii=False), origin)
    return format_table(table)

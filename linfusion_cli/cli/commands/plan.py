"""`linfusion plan`: what generate or upscale would do with these options, what it takes, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from linfusion_cli.cli.output import render
from linfusion_cli.cli.parsing import options
from linfusion_cli.cli.parsing.build_request import quieten_hub, read_request
from linfusion_cli.core.events import Notice
from linfusion_cli.core.units import format_bytes, format_seconds
from linfusion_cli.settings.request import GenerateRequest, ImageRequest, UpscaleRequest

if TYPE_CHECKING:
    from linfusion_cli.planning.estimate import DenoiseStrategy, ResourceEstimate
    from linfusion_cli.planning.plan import Plan, PlannedStage
    from linfusion_cli.vae.statistics import VaeStrategy


@options.takes_a_request(options.of_plan)
def command(given: dict[str, Any], as_json: options.Json = False) -> None:
    """Say how generate, or upscale, would run with these options, and what it would take; loads no weights."""
    quieten_hub(bool(given["download"]), quiet=False)
    kind = GenerateRequest if given["image"] is None else UpscaleRequest
    origins, request = read_request(given, render.notices_only, kind)
    from linfusion_cli.planning.machine import cpu_notice
    from linfusion_cli.run.inputs.resolve import disk_bytes, resolve_request
    from linfusion_cli.run.inputs.source_image import open_source
    from linfusion_cli.run.stages.plan import plan_run  # torch and diffusers: not for --help to wait for

    request, image = (request, None) if kind is GenerateRequest else open_source(request)
    resolved = resolve_request(request, image)
    for warning in resolved.facts.warnings:
        render.notices_only(Notice(warning))
    plan, disk = plan_run(resolved), disk_bytes(resolved)
    if notice := cpu_notice(plan.machine, plan.need.seconds):
        render.notices_only(Notice(notice))
    if as_json:
        values = {"request": request.to_json(), "settings": origins, "disk_bytes": disk}
        render.answer(json.dumps(values | {"plan": plan.to_json()}, indent=2))
    else:
        render.answer("\n\n".join([render.plain(plan_table(plan)), budgets(plan, disk), sources(origins, request)]))


def plan_table(plan: Plan) -> Table:
    """One row per stage, and their peaks and total."""
    heads = ("stage", "size", "steps", "attention", "strips", "maps", "guidance", "GPU", "host", "time")
    table = Table(*heads, box=None, pad_edge=False)
    for stage in plan.stages:
        table.add_row(*_cells(stage, plan))
    table.add_row("total", *[""] * 6, *_needs(plan.need, plan))
    return table


def _cells(stage: PlannedStage, plan: Plan) -> list[str]:
    how = denoising(stage.mode) if stage.kind == "denoise" else conversion(stage.mode)
    return [stage.name, str(stage.size), steps(stage), *how, *_needs(stage.need, plan)]


def steps(stage: PlannedStage) -> str:
    """How many it has, and how many of them run the dilated pass too."""
    return f"{stage.steps}, {stage.dilated} dilated" if stage.dilated else str(stage.steps or "")


def denoising(mode: DenoiseStrategy) -> list[str]:
    """Attention, strips, maps and guidance of a phase's UNet."""
    strips = f"{mode.strips.rows} rows, {mode.strips.tokens} tokens" if mode.strips else "whole"
    maps = {"device": "device", "skips": "device, skips on host", "host": "host"}[mode.place]
    return [mode.attention, strips, maps, "together" if mode.together else "in turn"]


def conversion(method: VaeStrategy) -> list[str]:
    """The same of a VAE: its strips, and what its statistics come from."""
    whole = {"exact": "whole", "partly exact": "partly whole"}[method.statistics] if method.start else ""
    maps = f"{whole}, {method.place}" if whole else f"{method.patches} patches" if method.patches else ""
    return ["", f"{method.height} rows", maps, ""]


def _needs(need: ResourceEstimate | None, plan: Plan) -> list[str]:
    if need is None:
        return ["unknown"] * 3
    card = "" if plan.machine.device_bytes is None else format_bytes(need.device_bytes)
    return [card, format_bytes(need.host_bytes), format_seconds(need.seconds)]


def budgets(plan: Plan, disk: int) -> str:
    """What may be used, and what the disk must have free."""
    machine = plan.machine
    card = "" if machine.device_bytes is None else f" and {format_bytes(machine.device_bytes)} of the GPU's memory"
    memory = f"It may use {format_bytes(machine.host_bytes)} of memory{card}, on {machine.device}."
    return f"{memory} On disk it needs up to {format_bytes(disk)}."


def sources(origins: Mapping[str, str], request: ImageRequest) -> str:
    """Each setting, and where it came from."""
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    values = request.to_json()
    for name, origin in origins.items():
        table.add_row(name, json.dumps(values[name], ensure_ascii=False), origin)
    return render.plain(table)

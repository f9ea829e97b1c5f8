"""Format a plan: a table of its stages, its budgets, and its settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.cells import cell_len

from linfusion_cli.cli.output.tables import (
    GAP,
    Cell,
    Column,
    ShortenedCell,
    Table,
    build_table,
    format_table,
    wrap_cells,
)
from linfusion_cli.core.events import format_stage
from linfusion_cli.core.units import format_bytes, format_seconds
from linfusion_cli.planning.gpus import UNKNOWN_GPU, Gpu
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import to_json_value
from linfusion_cli.settings.table import flatten_request

if TYPE_CHECKING:
    from linfusion_cli.planning.estimate import ResourceEstimate
    from linfusion_cli.planning.plan import Plan, PlannedStage
    from linfusion_cli.planning.strategies import DenoiseStrategy
    from linfusion_cli.vae.statistics import VaeStrategy

COLUMNS = (
    Column("stage", min_width=11),
    Column("size", drop_order=3, is_right_aligned=True),
    Column("steps", drop_order=4),
    Column("attention", drop_order=6),
    Column("strips", drop_order=5),
    Column("maps", drop_order=7),
    Column("guidance", drop_order=8),
    Column("GPU", drop_order=1, is_right_aligned=True),
    Column("host", drop_order=2, is_right_aligned=True),
    Column("time", is_right_aligned=True),
)
MIN_VALUE_WIDTH = 12  # of the values of settings; the column of origins is dropped where less is left


def format_plan(plan: Plan, disk_bytes: int, request: Request, origins: Mapping[str, str], width: int | None) -> str:
    """Return the table of stages, the budgets and the settings, in lines of at most `width` terminal columns."""
    budgets = format_budgets(plan, disk_bytes, is_host_default=request.execution.ram is None)
    if width is not None:
        budgets = "\n".join(line for text in budgets.splitlines() for (line,) in wrap_cells([text], [width]))
    return "\n\n".join([format_table(build_plan_table(plan), width), budgets, format_settings(origins, request, width)])


def build_plan_table(plan: Plan) -> Table:
    """Return a table with a row per stage, and a row with the peak memory and total time."""
    table = Table(COLUMNS)
    for stage in plan.stages:
        table.add_row(*_format_stage(stage, plan))
    table.add_row("total", *[""] * 6, *_format_estimate(plan.estimate, plan))
    return table


def _format_stage(stage: PlannedStage, plan: Plan) -> list[Cell]:
    from linfusion_cli.planning.strategies import DenoiseStrategy

    strategy = stage.strategy
    columns = format_denoise(strategy) if isinstance(strategy, DenoiseStrategy) else format_vae(strategy)
    name = format_stage(stage.kind, stage.phase_name)
    return [name, str(stage.size), format_steps(stage), *columns, *_format_estimate(stage.estimate, plan)]


def format_steps(stage: PlannedStage) -> Cell:
    """Return the number of steps, and the number of those with a dilated pass."""
    steps = str(stage.steps or "")
    return ShortenedCell(f"{steps}, {stage.dilated} dilated", steps) if stage.dilated else steps


def format_denoise(strategy: DenoiseStrategy) -> list[Cell]:
    """Return attention, strips, place of the feature maps, and guidance of a phase's UNet."""
    strips: Cell = "whole"
    if strategy.strips:
        rows = f"{strategy.strips.rows} rows"
        strips = ShortenedCell(f"{rows}, {strategy.strips.tokens} tokens", rows)
    maps: Cell = ShortenedCell("device, skips on host", "skips on host")
    if strategy.place != "skips":
        maps = strategy.place
    return [strategy.attention, strips, maps, "batched" if strategy.batched else "sequential"]


def format_vae(strategy: VaeStrategy) -> list[Cell]:
    """Return the same columns for a VAE: its strips, and the source of its normalization statistics."""
    maps: Cell = f"{strategy.patches} patches" if strategy.patches else ""
    if strategy.start:
        whole = {"exact": "whole", "partly exact": "partly whole"}[strategy.statistics]
        maps = ShortenedCell(f"{whole}, {strategy.place}", whole)
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


def format_settings(origins: Mapping[str, str], request: Request, width: int | None) -> str:
    """Return a table of all settings with their origins, with the values wrapped at a terminal's `width`."""
    values = to_json_value(flatten_request(request))
    rows = [[name, json.dumps(values[name], ensure_ascii=False), origin] for name, origin in origins.items()]
    table = build_table("setting", "value", "from")
    for row in rows if width is None else wrap_settings(rows, width):
        table.add_row(*row)
    return format_table(table, width)


def wrap_settings(rows: list[list[str]], width: int) -> list[list[str]]:
    """Return the rows with values and origins wrapped, so that the table has at most `width` columns."""
    name_width, origin_width = (max(map(cell_len, column)) for column in list(zip(*rows, strict=True))[::2])
    origin_width = min(origin_width, max(len("default"), width // 4))
    value_width = width - name_width - origin_width - 2 * len(GAP)
    if value_width >= MIN_VALUE_WIDTH:
        widths = [name_width, value_width, origin_width]
    else:
        widths = [name_width, max(1, width - name_width - len(GAP))]
    return [line for row in rows for line in wrap_cells(row[: len(widths)], widths)]

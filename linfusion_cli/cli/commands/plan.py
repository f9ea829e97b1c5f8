"""`linfusion plan`: show how generate or upscale would run, its memory and time, and whether it fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from linfusion_cli.cli.output.plan_table import format_plan
from linfusion_cli.cli.output.progress import echo_notice
from linfusion_cli.cli.output.streams import emit_result, measure_width
from linfusion_cli.cli.parsing.build_request import configure_hub, read_command_options, read_request
from linfusion_cli.cli.parsing.options import add_settings
from linfusion_cli.core.errors import UsageError
from linfusion_cli.core.events import Notice
from linfusion_cli.planning.gpus import Gpu, find_gpu
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.request_json import execution_to_json, request_to_json

if TYPE_CHECKING:
    from linfusion_cli.planning.plan import Plan

SCHEMA = 1  # of the JSON
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
        emit_result(format_plan(plan, disk, request, origins, measure_width(sys.stdout)))


def imply_settings(gpu: Gpu, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that --gpu implies, as text: the device, and a budget unless --vram is `given`.

    They precede other sources, which describe the GPU of this machine. Raise UsageError for --device cpu.
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

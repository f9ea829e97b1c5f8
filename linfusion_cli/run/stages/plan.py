"""How a request will run on this machine, and what it will take: the story of `linfusion plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from linfusion_cli.hardware.cuda import has_bfloat16, is_cuda
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.planning.machine import Machine, survey
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import Plan, PlanInputs, make_plan, recorded_strategies
from linfusion_cli.planning.speed import measured
from linfusion_cli.run.checkpoint.dtype_history import WIDTHS
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.stages.cache_keys import OUTLINE, outline_key
from linfusion_cli.run.stages.linear_attention import check_base
from linfusion_cli.sampling.upscalers.pass_count import count_passes
from linfusion_cli.unet.check import check_control, check_supported


def plan_run(
    resolved: ResolvedRequest,
    executed: Sequence[Mapping[str, Any]] = (),
    kept_bytes: int = 0,
    model_cache: ModelCache | None = None,
    least_dtype: str | None = None,
) -> Plan:
    """The plan for a request, from the model's config files, or what a job before has made of them, on the `shelf`.

    Stages run as they were `executed` before, if they were. `kept_bytes` of models lie loaded on the host. The dtype
    is the request's, or a wider one that is no narrower than `least_dtype`.

    Raises DoesNotFit, UsageError for steps that the scheduler cannot take, DataError for a UNet or
    ControlNet that cannot run in strips and should, or what those files are guilty of.
    """
    request, facts, phases = resolved.request, resolved.facts, resolved.phases
    passes = [count_passes(request, facts.scheduler_config, phase) for phase in phases]
    held_bytes = resolved.image.held_bytes if resolved.image else 0
    controlnets = resolved.controlnets
    controlled = (controlnets.phases, controlnets.held_bytes)
    machine = widen_dtype(survey(request, kept_bytes), least_dtype)
    before = recorded_strategies(executed, machine)
    wanted = PlanInputs(request, facts, phases, passes, resolved.image_size, held_bytes, *controlled, before)
    folders = [control.folder for control in controlnets.found]
    parts = (resolved.model, resolved.linfusion, resolved.vae, resolved.adapters, folders)
    outline = (model_cache or ModelCache(keeps=False)).get(
        OUTLINE, partial(outline_key, resolved), partial(MetaModel.read, *parts)
    )
    if resolved.base is not None:
        check_base(resolved.base, outline.unet)
    if "linear" in wanted.attentions:
        with outline.with_attention("linear"):
            check_supported(outline.unet)
            if any(phases[index].attention == "linear" for index in controlnets.phases):
                for control in outline.controlnets:
                    check_control(control.net)
    return make_plan(wanted, outline, machine)


def widen_dtype(machine: Machine, least: str | None) -> Machine:
    """`machine` with a dtype of the UNet and the text encoders that is no narrower than `least`, as far as it has one.

    The VAE keeps its own: it has another fallback.
    """
    if least is None or WIDTHS.index(least) <= WIDTHS.index(dtype_name(machine.dtype)):
        return machine
    dtype = getattr(torch, least)
    if dtype == torch.bfloat16 and is_cuda(machine.device) and not has_bfloat16(machine.device):
        dtype = torch.float32
    return replace(machine, dtype=dtype, speed=measured(machine.device, dtype))

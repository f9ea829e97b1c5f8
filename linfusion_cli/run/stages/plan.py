"""Plan how a request runs on this machine, and estimate its time and memory (`linfusion plan`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from linfusion_cli.core.events import StageKey
from linfusion_cli.hardware.cuda import has_bfloat16, is_cuda
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.planning.machine import Machine, inspect_machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import Plan, PlanInputs, make_plan
from linfusion_cli.planning.speed import measure_speed
from linfusion_cli.planning.strategies import Strategy, recorded_from_json
from linfusion_cli.run.checkpoint.dtype_history import DTYPES_BY_WIDTH
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.stages.cache_keys import META_MODEL, build_meta_model_key
from linfusion_cli.run.stages.linear_attention import check_base
from linfusion_cli.sampling.upscalers.pass_count import count_passes
from linfusion_cli.unet.check import check_controlnet, check_supported


def plan_run(
    resolved: ResolvedRequest,
    executed: Sequence[Mapping[str, Any]] = (),
    kept_bytes: int = 0,
    model_cache: ModelCache | None = None,
    least_dtype: str | None = None,
) -> Plan:
    """Return the plan for a request. Only config files and headers are read, or taken from `model_cache`.

    Stages use the strategies that an earlier run has `executed`, if they fit. `kept_bytes` is the size of the models
    that are already loaded on the host. The dtype is that of the request, or `least_dtype` if that is wider.

    Raise OutOfMemoryBudget if no plan fits, UsageError for steps that the scheduler does not support, DataError for
    invalid files and for a UNet or ControlNet that cannot run in strips but has to.
    """
    machine = widen_dtype(inspect_machine(resolved.request, kept_bytes), least_dtype)
    return plan_on_machine(resolved, machine, executed, model_cache)


def plan_on_machine(
    resolved: ResolvedRequest,
    machine: Machine,
    executed: Sequence[Mapping[str, Any]] = (),
    model_cache: ModelCache | None = None,
) -> Plan:
    """Return the plan for a request on `machine`, like `plan_run`."""
    request, facts, phases = resolved.request, resolved.facts, resolved.phases
    passes = [count_passes(request, facts.scheduler_config, phase) for phase in phases]
    held_bytes = resolved.source_image.held_bytes if resolved.source_image else 0
    control = resolved.controlnets.phases, resolved.controlnets.held_bytes
    recorded = find_recorded(executed, machine)
    inputs = PlanInputs(request, facts, phases, passes, resolved.source_size, held_bytes, *control, recorded)
    meta_model = read_meta_model(resolved, model_cache or ModelCache(enabled=False))
    if resolved.linfusion_base is not None:
        check_base(resolved.linfusion_base, meta_model.unet)
    if "linear" in inputs.attentions:
        check_strip_support(resolved, meta_model)
    return make_plan(inputs, meta_model, machine)


def find_recorded(stages: Sequence[Mapping[str, Any]], machine: Machine) -> dict[StageKey, Strategy]:
    """Return the known strategies of an earlier run, of stages that ran on the same type of device."""
    recorded = recorded_from_json(stages).items()
    return {key: strategy for key, (device, strategy) in recorded if strategy and device == machine.device.type}


def read_meta_model(resolved: ResolvedRequest, model_cache: ModelCache) -> MetaModel:
    """Return the networks of the request without weights, from the cache or from their config files and headers."""
    folders = [control.folder for control in resolved.controlnets.specs]
    parts = (resolved.model, resolved.linfusion_folder, resolved.vae, resolved.ip_adapters, folders)
    return model_cache.get(META_MODEL, partial(build_meta_model_key, resolved), partial(MetaModel.read, *parts))


def check_strip_support(resolved: ResolvedRequest, meta_model: MetaModel) -> None:
    """Raise DataError if the UNet, or a ControlNet of a phase in strips, has a part that cannot run in strips."""
    with meta_model.with_attention("linear"):
        check_supported(meta_model.unet)
        if any(resolved.phases[index].attention == "linear" for index in resolved.controlnets.phases):
            for control in meta_model.controlnets:
                check_controlnet(control.net)


def widen_dtype(machine: Machine, least: str | None) -> Machine:
    """Return `machine` with a dtype that is at least as wide as `least`; fp32 if the device does not support that one.

    The dtype of the VAE is unchanged: it has its own fallback.
    """
    if least is None or DTYPES_BY_WIDTH.index(least) <= DTYPES_BY_WIDTH.index(dtype_name(machine.dtype)):
        return machine
    dtype = getattr(torch, least)
    if dtype == torch.bfloat16 and is_cuda(machine.device) and not has_bfloat16(machine.device):
        dtype = torch.float32
    return replace(machine, dtype=dtype, speed=measure_speed(machine.device, dtype))

"""How a request will run on this machine, and what it will take: the story of `linfusion plan`."""

from __future__ import annotations

from linfusion_cli.attention.mount import mounted
from linfusion_cli.jobs.prepare import Prepared
from linfusion_cli.planning.machine import survey
from linfusion_cli.planning.outline import ModelOutline
from linfusion_cli.planning.plan import Plan, Wanted, make_plan
from linfusion_cli.sampling.schedule import phase_strengths, steps_run
from linfusion_cli.unet.check import check_supported


def plan_run(prepared: Prepared) -> Plan:
    """The plan for a request, from the model's config files.

    Raises DoesNotFit, DataError for a UNet that cannot run in strips and should, or what those files are guilty of.
    """
    wanted = Wanted(prepared.request, prepared.facts, prepared.sizes, phase_steps(prepared), prepared.attentions)
    outline = ModelOutline.read(prepared.model, prepared.linfusion, prepared.vae)
    if "linear" in prepared.attentions:
        with mounted(outline.unet, outline.linear):
            check_supported(outline.unet)
    return make_plan(wanted, outline, survey(prepared.request))


def phase_steps(prepared: Prepared) -> list[int]:
    """How many steps each phase runs."""
    request = prepared.request
    strengths = phase_strengths(request.strength, len(prepared.sizes) - 1)
    return [request.steps, *(steps_run(strength, request.steps) for strength in strengths)]

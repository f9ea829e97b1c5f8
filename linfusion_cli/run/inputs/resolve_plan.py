"""Resolve a request for `linfusion plan`, which needs no weights: published configs replace what is not installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from linfusion_cli.core.errors import NotInstalled, Unavailable
from linfusion_cli.images.read.source import SourceImage
from linfusion_cli.models.families.facts import FAMILY_NAMES, read_facts
from linfusion_cli.models.locate.files import find_inversion, find_lora
from linfusion_cli.models.locate.model import find_linfusion, find_model
from linfusion_cli.models.locate.published import (
    CONFIGS_FOLDER,
    find_base_family,
    find_linfusion_family,
    get_configs,
    get_linfusion_config,
)
from linfusion_cli.run.inputs.resolve import ResolvedRequest, resolve_request
from linfusion_cli.settings.groups import Lora, TextualInversion
from linfusion_cli.settings.request import Request

Notify = Callable[[str], None]
Adapter = TypeVar("Adapter", Lora, TextualInversion)


def resolve_plan(request: Request, image: SourceImage | None, notify: Notify) -> ResolvedRequest:
    """Return `request` resolved for a plan; raise the errors of `resolve_request`.

    Base models, their LinFusion weights, LoRAs and textual inversions can be missing; `notify` gets notices.
    """
    installed = drop_missing_adapters(replace_missing_model(request), notify)
    # The device of a plan is checked by its machine, and need not exist here.
    resolved = resolve_request(
        replace(installed, dtype="auto", execution=replace(installed.execution, device="cpu")), image
    )
    notify_published(resolved, notify)
    return replace(resolved, request=request)


def replace_missing_model(request: Request) -> Request:
    """Return `request` with the folders of published configs instead of a base model or LinFusion weights that miss."""
    if request.execution.download:
        return request
    family = find_base_family(request.model)
    try:
        model = find_model(request.model)
        facts = read_facts(model)
    except Unavailable:
        if family is None:
            return request  # resolve_request raises the error
        named = find_linfusion_family(request.linfusion)
        linfusion = request.linfusion if named is None else str(get_linfusion_config(named))
        # There are no weights to merge, and the memory of a plan does not depend on them.
        return replace(request, model=str(get_configs(family)), linfusion=linfusion, linfusion_merge="published")
    try:
        find_linfusion(request.linfusion, model, facts.family)
    except NotInstalled:
        published = facts.family if request.linfusion == "auto" else find_linfusion_family(request.linfusion)
        if published is not None:
            return replace(request, linfusion=str(get_linfusion_config(published)))
    return request


def notify_published(resolved: ResolvedRequest, notify: Notify) -> None:
    """Say which published configs `resolved` uses, in one sentence."""
    folder, linfusion = resolved.model.folder, resolved.linfusion_folder
    if folder.parent == CONFIGS_FOLDER:
        notify(f"{FAMILY_NAMES[folder.name]} is not installed: planned from its published configs.")
    elif linfusion is not None and CONFIGS_FOLDER in linfusion.parents:
        family = FAMILY_NAMES[linfusion.parent.name]
        notify(f"LinFusion's weights for {family} are not installed: planned from their published config.")


def drop_missing_adapters(request: Request, notify: Notify) -> Request:
    """Return `request` without LoRAs and textual inversions that are not installed: a plan does not depend on them."""
    if request.execution.download:
        return request

    loras = drop_missing("--lora", request.lora, find_lora, notify)
    inversions = drop_missing("--textual-inversion", request.textual_inversion, find_inversion, notify)
    return replace(request, lora=loras, textual_inversion=inversions)


def drop_missing(
    flag: str, adapters: tuple[Adapter, ...], find: Callable[[str], Path], notify: Notify
) -> tuple[Adapter, ...]:
    """Return the adapters that `find` finds on this machine, and notify about the others."""
    missing = [adapter for adapter in adapters if is_missing(adapter.model, find)]
    for adapter in missing:
        notify(f"{flag} {adapter.model} is not installed, and does not change the plan.")
    return tuple(adapter for adapter in adapters if adapter not in missing)


def is_missing(name: str, find: Callable[[str], Path]) -> bool:
    """Return whether `find` does not find the file `name` of the hub on this machine."""
    try:
        find(name)
    except NotInstalled:
        return True
    return False

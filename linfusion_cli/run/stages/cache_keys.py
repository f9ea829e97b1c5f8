"""The models that a batch keeps from one job to the next, and what tells whether they are the next one's, too."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from torch import nn

from linfusion_cli.core.units import is_file
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import identity
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.load.parts import Vae
from linfusion_cli.models.text.encode import ENCODERS, TextEncoder
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.run.inputs.provenance import WHOLE, list_weights
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.stages.context import RunContext

# What is kept under which name; text encoders have those of their parts.
VAE, NETWORKS, OUTLINE = "vae", "networks", "outline"
NETWORK_USES = (WHOLE, "unet", "linfusion", "linfusion_base", "lora", "ip_adapter", "controlnet")
TEXT_USES = (WHOLE, "text_encoder", "text_encoder_2", "lora", "textual_inversion")


@dataclass(frozen=True)
class Networks:
    """The UNet, the linear attention that phases may mount in it, and ControlNets."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    controlnets: list[LoadedControlNet]


def networks_key(run: RunContext) -> Hashable:
    """All that decides the UNet with its linear attention, LoRAs, IP-Adapters and ControlNets."""
    resolved, request = run.resolved, run.resolved.request
    return (
        files_key(resolved, NETWORK_USES),
        (resolved.linfusion, resolved.base, resolved.model_is_base, request.linfusion, request.linfusion_merge),
        tuple(resolved.loras),
        tuple((adapter.weights.file, adapter.scale) for adapter in resolved.adapters),
        tuple(control.folder for control in resolved.controlnets.found),
        (run.dtype, run.device),
    )


def outline_key(resolved: ResolvedRequest) -> Hashable:
    """All that decides the shapes of UNet, VAE and ControlNets: their files, of which configs and headers are read."""
    adapters, controlnets = resolved.adapters, resolved.controlnets.found
    parts = (
        resolved.linfusion,
        *(adapter.weights.file for adapter in adapters),
        *(found.folder for found in controlnets),
    )
    return files_key(resolved, (*NETWORK_USES, "vae")), parts


def vae_key(run: RunContext) -> Hashable:
    """All that decides the VAE."""
    return files_key(run.resolved, ("vae",)), run.plan.machine.vae_dtype, run.device


def text_key(run: RunContext) -> Hashable:
    """All that decides the text encoders."""
    resolved = run.resolved
    return files_key(resolved, TEXT_USES), tuple(resolved.loras), tuple(resolved.inversions), run.dtype


def files_key(resolved: ResolvedRequest, uses: tuple[str, ...]) -> Hashable:
    """Files of these uses, the configs beside them, and those of the model: as they are now."""
    files = [(use, path) for use, path in list_weights(resolved) if use in uses]
    configs = [path.parent / "config.json" for _, path in files]
    configs += [resolved.vae.config, *(resolved.model.part(use).config for use in ("unet", *uses))]
    found = [identity(path) for path in dict.fromkeys(configs) if is_file(path)]
    weights = tuple((use, identity(path)) for use, path in files if is_file(path))  # loading names one that is not
    return resolved.model, weights, tuple(found)


def offload_all(model_cache: ModelCache, *others: nn.Module) -> int:
    """Move all that is kept, and `others`, off the card, as between jobs -> the bytes it takes of the host's memory."""
    kept = [*others, *(network for thing in model_cache.values() for network in list_networks(thing))]
    for network in kept:
        network.to("cpu")
    return count_weight_bytes(kept)


def offload_networks(model_cache: ModelCache) -> None:
    """Move the networks that are kept off the card: what is left of the run is decoding, which wants the room."""
    for thing in model_cache.values():
        for network in list_networks(thing) if isinstance(thing, Networks) else ():
            network.to("cpu")


def offload_text_encoders(run: RunContext) -> None:
    """Keep the text encoders, on the host, if the run has room for them beside all that it was planned with."""
    encoders = [thing.network for thing in run.model_cache.values() if isinstance(thing, TextEncoder)]
    for encoder in encoders:
        encoder.to("cpu")
    if run.plan.need.host_bytes + count_weight_bytes(encoders) > run.plan.machine.host_bytes:
        run.model_cache.drop(*ENCODERS)


def list_networks(thing: Vae | Networks | TextEncoder | MetaModel) -> list[nn.Module]:
    """The networks that are kept as one thing, none for their outline, which has no weights."""
    match thing:
        case Networks(unet, linear, controlnets):
            of_controls = (network for control in controlnets for network in (control.net, *control.linear.values()))
            return [unet, *linear.values(), *of_controls]
        case TextEncoder(network=network):
            return [network]
        case MetaModel():
            return []
    return [thing]


def count_weight_bytes(networks: Iterable[nn.Module]) -> int:
    """What their weights take, those that several share once."""
    weights = {id(parameter): parameter for network in networks for parameter in network.parameters()}
    return sum(parameter.numel() * parameter.itemsize for parameter in weights.values())

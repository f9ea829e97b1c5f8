"""The models that a batch caches between jobs: their cache keys, and how they are moved off the device."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from linfusion_cli.core.fs import is_file
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.models.cache import ModelCache
from linfusion_cli.models.files.digest import read_file_identity
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.load.networks import Vae
from linfusion_cli.models.text.encode import ENCODERS, TextEncoder
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.run.inputs.provenance import MODEL_USE, list_weights
from linfusion_cli.run.inputs.resolve import ResolvedRequest
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.settings.request import Request
from linfusion_cli.settings.setting import Network
from linfusion_cli.settings.table import flatten_request, list_reloading_settings

# Names of cache entries. Text encoders use the names of their parts.
VAE, NETWORKS, META_MODEL = "vae", "networks", "meta_model"
NETWORK_USES = (MODEL_USE, "unet", "linfusion", "linfusion_base", "lora", "ip_adapter", "controlnet")
TEXT_USES = (MODEL_USE, "text_encoder", "text_encoder_2", "lora", "textual_inversion")


@dataclass(frozen=True)
class Networks:
    """The UNet, the linear attention that phases can mount in it, and the ControlNets."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    controlnets: list[LoadedControlNet]


def build_networks_key(run: RunContext) -> Hashable:
    """Return the key of the UNet with its linear attention, LoRAs, IP-Adapters and ControlNets."""
    resolved = run.resolved
    return (
        build_files_key(resolved, NETWORK_USES),
        build_settings_key(resolved.request, "unet"),
        (resolved.linfusion_folder, resolved.linfusion_base, resolved.is_base_model),
        tuple(resolved.loras),
        tuple(adapter.weights.file for adapter in resolved.ip_adapters),
        tuple(control.folder for control in resolved.controlnets.specs),
        (run.dtype, run.device),
    )


def build_meta_model_key(resolved: ResolvedRequest) -> Hashable:
    """Return the key of the meta model: the files that decide the shapes of the UNet, VAE and ControlNets."""
    adapters, controlnets = resolved.ip_adapters, resolved.controlnets.specs
    parts = (
        resolved.linfusion_folder,
        *(adapter.weights.file for adapter in adapters),
        *(spec.folder for spec in controlnets),
    )
    return build_files_key(resolved, (*NETWORK_USES, "vae")), parts


def build_vae_key(run: RunContext) -> Hashable:
    """Return the key of the VAE."""
    settings = build_settings_key(run.resolved.request, "vae")
    return build_files_key(run.resolved, ("vae",)), settings, run.plan.machine.vae_dtype, run.device


def build_text_key(run: RunContext) -> Hashable:
    """Return the key of the text encoders."""
    resolved = run.resolved
    settings = build_settings_key(resolved.request, "text_encoders")
    adapters = tuple(resolved.loras), tuple(resolved.textual_inversions)
    return build_files_key(resolved, TEXT_USES), settings, adapters, run.dtype


def build_settings_key(request: Request, network: Network) -> Hashable:
    """Return the values of the settings that reload this network."""
    flat = flatten_request(request)
    return tuple(flat[name] for name in list_reloading_settings(network))


def build_files_key(resolved: ResolvedRequest, uses: tuple[str, ...]) -> Hashable:
    """Return the identities of the weights for these uses, and of the configs of the files and the model."""
    files = [(use, path) for use, path in list_weights(resolved) if use in uses]
    configs = [path.parent / "config.json" for _, path in files]
    configs += [resolved.vae.config_path, *(resolved.model.get_part(use).config_path for use in ("unet", *uses))]
    config_ids = [read_file_identity(path) for path in dict.fromkeys(configs) if is_file(path)]
    # Missing files are reported when they are loaded.
    weight_ids = tuple((use, read_file_identity(path)) for use, path in files if is_file(path))
    return resolved.model, weight_ids, tuple(config_ids)


def offload_all(model_cache: ModelCache, *others: nn.Module) -> int:
    """Move all cached networks and `others` to the host, as between jobs. Return the bytes they use there."""
    networks = [*others, *(network for entry in model_cache.values() for network in list_networks(entry))]
    for network in networks:
        network.to("cpu")
    return count_weight_bytes(networks)


def offload_networks(model_cache: ModelCache) -> None:
    """Move the cached networks to the host, to free the device for decoding."""
    for entry in model_cache.values():
        for network in list_networks(entry) if isinstance(entry, Networks) else ():
            network.to("cpu")


def offload_text_encoders(run: RunContext) -> None:
    """Move the text encoders to the host. Drop them if the plan leaves no room for them there."""
    encoders = [entry.network for entry in run.model_cache.values() if isinstance(entry, TextEncoder)]
    for encoder in encoders:
        move_network(encoder, "cpu")
    if run.plan.estimate.host_bytes + count_weight_bytes(encoders) > run.plan.machine.host_bytes:
        run.model_cache.evict(*ENCODERS)


def move_network(network: nn.Module, device: torch.device | str) -> None:
    """Move a network to `device`, in place."""
    network.to(device)


def list_networks(entry: Vae | Networks | TextEncoder | MetaModel) -> list[nn.Module]:
    """Return the networks of a cache entry; none for a meta model, which has no weights."""
    match entry:
        case Networks(unet, linear, controlnets):
            of_controlnets = (network for control in controlnets for network in (control.net, *control.linear.values()))
            return [unet, *linear.values(), *of_controlnets]
        case TextEncoder(network=network):
            return [network]
        case MetaModel():
            return []
    return [entry]


def count_weight_bytes(networks: Iterable[nn.Module]) -> int:
    """Return the bytes of all weights; shared weights count once."""
    weights = {id(parameter): parameter for network in networks for parameter in network.parameters()}
    return sum(parameter.numel() * parameter.itemsize for parameter in weights.values())

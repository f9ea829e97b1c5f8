"""Networks on the meta device, built from config files, as the basis of estimates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import nn

from linfusion_cli.mixers.linear import weights
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.models.adapters.ip_adapter import load_adapters
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.load.networks import Vae, load_meta, read_vae_class
from linfusion_cli.models.locate.ip_adapter import Adapter


@dataclass(frozen=True)
class MetaModel:
    """The UNet with its IP-Adapters, its linear attention, the VAE and the ControlNets, all on the meta device."""

    unet: UNet2DConditionModel
    linear: dict[str, LinearAttention]
    vae: Vae
    controlnets: tuple[LoadedControlNet, ...] = ()

    @staticmethod
    def read(
        model: Model,
        linfusion: Path | None,
        vae: Part | None = None,
        adapters: Sequence[Adapter] = (),
        controlnets: Sequence[Path] = (),
    ) -> MetaModel:
        """Read the config files of all networks. Raise Unavailable, DataError or InputNotFound with the file name."""
        unet = load_meta(UNet2DConditionModel, model.get_part("unet"))
        linear = weights.build_meta_modules(linfusion, unet) if linfusion else {}
        load_adapters(unet, adapters)
        vae = vae or model.get_part("vae")
        nets = {folder: LoadedControlNet.load_meta(folder, linear) for folder in controlnets}  # each is built once
        meta_vae = load_meta(read_vae_class(vae), vae)
        return MetaModel(unet, linear, meta_vae, tuple(nets[folder] for folder in controlnets))

    # Parameters are counted once: every candidate for every stage needs the numbers.
    def count_unet_parameters(self, attention: str) -> int:
        """Return the number of parameters of the UNet with this attention."""
        if attention == "original":
            return self._original_unet_parameters
        return self._original_unet_parameters - self._self_attention_parameters + self._linear_parameters

    @property
    def total_unet_parameters(self) -> int:
        """The number of parameters of the UNet with both kinds of attention."""
        return self._original_unet_parameters + self._linear_parameters

    @cached_property
    def controlnet_parameters(self) -> int:
        """The number of parameters of the ControlNets. Their linear attention adds none."""
        return sum(count_parameters(net) for net in {control.net for control in self.controlnets})

    @cached_property
    def vae_parameters(self) -> int:
        """The number of parameters of the VAE."""
        return count_parameters(self.vae)

    @cached_property
    def _original_unet_parameters(self) -> int:
        return count_parameters(self.unet)

    @cached_property
    def _self_attention_parameters(self) -> int:
        return sum(count_parameters(module) for module in find_self_attentions(self.unet).values())

    @cached_property
    def _linear_parameters(self) -> int:
        return sum(count_parameters(module) for module in self.linear.values())

    @contextmanager
    def with_attention(self, attention: str) -> Iterator[None]:
        """Mount this attention in the UNet and the ControlNets within the context."""
        with ExitStack() as stack:
            if attention == "linear":
                stack.enter_context(mount_modules(self.unet, self.linear))
                for control in self.controlnets:
                    stack.enter_context(mount_modules(control.net, control.linear))
            yield


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of `module`."""
    return sum(parameter.numel() for parameter in module.parameters())

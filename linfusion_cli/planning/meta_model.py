"""A model's shapes, from its config files alone: what a plan reckons with."""

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
from linfusion_cli.mixers.linear.mount import mounted, self_attentions
from linfusion_cli.models.adapters.ip_adapter import load_adapters
from linfusion_cli.models.files.parts import Model, Part
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.models.load.parts import Vae, outline, vae_kind
from linfusion_cli.models.locate.ip_adapter import Adapter


@dataclass(frozen=True)
class MetaModel:
    """UNet with its IP-Adapters, linear attention to mount in it, VAE, and ControlNets, all on the meta device."""

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
        """Raises Unavailable, DataError or InputMissing naming the file."""
        unet = outline(UNet2DConditionModel, model.part("unet"))
        linear = weights.outline(linfusion, unet) if linfusion else {}
        load_adapters(unet, adapters)
        vae = vae or model.part("vae")
        nets = {folder: LoadedControlNet.outline(folder, linear) for folder in controlnets}  # each is loaded once
        return MetaModel(unet, linear, outline(vae_kind(vae), vae), tuple(nets[folder] for folder in controlnets))

    # Counted once each: a plan asks again for every way to run every stage.
    def numbers(self, attention: str) -> int:
        """How many weights the UNet has with this attention."""
        if attention == "original":
            return self._unet_numbers
        return self._unet_numbers - self._replaced_numbers + self._linear_numbers

    @property
    def all_numbers(self) -> int:
        """How many weights the UNet has with both kinds of attention."""
        return self._unet_numbers + self._linear_numbers

    @cached_property
    def control_numbers(self) -> int:
        """How many weights the ControlNets have; their linear attention adds none."""
        return sum(count(net) for net in {control.net for control in self.controlnets})

    @cached_property
    def vae_numbers(self) -> int:
        """How many weights the VAE has."""
        return count(self.vae)

    @cached_property
    def _unet_numbers(self) -> int:
        return count(self.unet)

    @cached_property
    def _replaced_numbers(self) -> int:
        return sum(count(module) for module in self_attentions(self.unet).values())

    @cached_property
    def _linear_numbers(self) -> int:
        return sum(count(module) for module in self.linear.values())

    @contextmanager
    def with_attention(self, attention: str) -> Iterator[None]:
        """Within the context UNet and ControlNets have this attention."""
        with ExitStack() as stack:
            if attention == "linear":
                for network, linear in ((self.unet, self.linear), *((of.net, of.linear) for of in self.controlnets)):
                    stack.enter_context(mounted(network, linear))
            yield


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

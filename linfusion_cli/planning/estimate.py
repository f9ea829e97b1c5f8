"""Estimate the peak memory and the time of denoising, decoding and encoding on a machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from linfusion_cli.core.geometry import Size
from linfusion_cli.models.families.facts import ModelFacts
from linfusion_cli.planning.machine import Machine
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.strategies import DenoiseStrategy
from linfusion_cli.strips.cost import MemoryLedger
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.stream import StreamStage
from linfusion_cli.unet.check import find_unsupported_parts
from linfusion_cli.unet.estimate import ForwardSettings, embedding_cost, estimate_unet, whole_controlnet_bytes
from linfusion_cli.vae.estimate import estimate_vae
from linfusion_cli.vae.stages import build_decoder_stages, build_encoder_stages
from linfusion_cli.vae.statistics import VaeStrategy

UNSPLIT = StripSize(1 << 20, 1 << 40)  # for forwards without strips: one strip per map
LATENT_COPIES = 10  # fp32 copies: latents, noise, predictions and temporary data of a scheduler step
DEMOFUSION_COPIES = 15  # in addition: the encoded image, its noise, their sum, the blurred latents and two predictions
# Overhead of torch's allocator, as a factor and a constant for partly used segments and cuBLAS's workspace. Native
# segments of different sizes leave gaps. Measured on the fake card of the tests, from 1024 to 16384 px.
EXPANDABLE, NATIVE = (1.02, 80 << 20), (1.15, 512 << 20)
PATCH_FRAGMENTATION, MAP_FRAGMENTATION = 1.1, 1.02  # additional factors for a VAE's patches, and for its complete maps
LIBRARY_HEAP_BYTES = 24 << 20  # heap memory of libraries that the estimate does not cover
PIXEL_CHANNELS = 3
READ_ROWS, WRITE_ROWS = 512, 256  # fp32 rows of the image in memory, while they are resized or written
UNSPLIT_FRAGMENTATION_BYTES = 128 << 20  # limit of the gaps that the maps of a forward without strips leave


@dataclass(frozen=True)
class ResourceEstimate:
    """Peak memory of the process and of the GPU, and the time.

    `pinned_bytes` is the pinned part of the host memory. `copied_bytes` are transferred between host and device.
    `flops` counts matrix products and convolutions. `seconds` is nan if the speed of the device is unknown.
    """

    host_bytes: int
    device_bytes: int
    seconds: float
    pinned_bytes: int = 0
    copied_bytes: int = 0
    flops: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values, null for an unknown time: JSON has no nan."""
        return asdict(self) | {"seconds": None if math.isnan(self.seconds) else self.seconds}

    def scale_work(self, factor: float) -> ResourceEstimate:
        """Multiply the work and the time by `factor`; peaks do not change."""
        return replace(
            self,
            seconds=self.seconds * factor,
            copied_bytes=round(self.copied_bytes * factor),
            flops=round(self.flops * factor),
        )


@dataclass(frozen=True)
class CostEstimator:
    """Estimates resources from the shapes of a model."""

    facts: ModelFacts
    meta_model: MetaModel
    machine: Machine

    def estimate_forward(
        self, strategy: DenoiseStrategy, size: Size, dilation: int = 1, controlled: bool = False
    ) -> ResourceEstimate | None:
        """Estimate one prediction at `size` px, of both halves of guidance if they are batched.

        Return None if a network has its original attention and unsupported parts.
        """
        nets = [control.net for control in self.meta_model.controlnets] if controlled else []
        networks = (self.meta_model.unet, *nets)
        if strategy.attention == "original" and any(any(find_unsupported_parts(network)) for network in networks):
            return None
        size_lat = size.divide(self.facts.vae_factor)
        shape = (2 if strategy.batched else 1, size_lat.height, size_lat.width)
        itemsize = self.machine.dtype.itemsize
        settings = ForwardSettings(strategy.strips or UNSPLIT, strategy.place, *shape, itemsize, dilation=dilation)
        with self.meta_model.with_attention(strategy.attention):
            ledger = estimate_unet(self.meta_model.unet, settings, nets)
            unsplit_controlnets = 0 if strategy.strips else whole_controlnet_bytes(nets, settings)
        compute_sec = self.machine.speed.estimate_seconds(ledger.flops, ledger.passes)
        copies = LATENT_COPIES if dilation == 1 else DEMOFUSION_COPIES
        latents = copies * 4 * self.facts.latent_channels * size_lat.area
        gaps = 0 if strategy.strips else min(UNSPLIT_FRAGMENTATION_BYTES, ledger.peak["device"])
        device = ledger.peak["device"] + latents + gaps + unsplit_controlnets
        host = latents if self.machine.device.type == "cuda" else 0  # noise is drawn and added on the host
        weights = self._count_weight_bytes(strategy.attention, controlled)
        return self._build_estimate(ledger, host, device, weights, compute_sec)

    def estimate_embedding_seconds(self, size: Size) -> float:
        """Estimate the time to embed the control images."""
        size_lat, itemsize = size.divide(self.facts.vae_factor), self.machine.dtype.itemsize
        pair = size_lat.height, size_lat.width
        costs = [embedding_cost(control.net, *pair, itemsize) for control in self.meta_model.controlnets]
        flops, passes = sum(cost.flops for cost in costs), sum(cost.passes for cost in costs)
        return self.machine.speed.estimate_seconds(flops, passes)

    def estimate_conversion(
        self, size: Size, encode: bool, attention: str | None, strategy: VaeStrategy
    ) -> ResourceEstimate:
        """Estimate decoding or encoding an image of `size` px.

        Meanwhile the UNet is loaded with this attention; None if it is not on the device.
        """
        machine, facts = self.machine, self.facts
        ledger = self.build_vae_ledger(size, encode, strategy)
        latents = 2 * 4 * facts.latent_channels * size.divide(facts.vae_factor).area
        rows = 4 * PIXEL_CHANNELS * size.width * (READ_ROWS if encode else WRITE_ROWS)
        compute_sec = machine.vae_speed.estimate_seconds(ledger.flops, ledger.passes)
        device = ledger.peak["device"] + (latents if machine.device.type == "cuda" else 0)
        fragmentation = PATCH_FRAGMENTATION if strategy.patches else MAP_FRAGMENTATION
        device = int((1.0 if machine.device.type == "cpu" else fragmentation) * device)
        return self._build_estimate(ledger, rows + latents, device, self._count_weight_bytes(attention), compute_sec)

    def build_vae_ledger(self, size: Size, encode: bool, strategy: VaeStrategy) -> MemoryLedger:
        """Return the cost of decoding or encoding, without the VAE's weights."""
        factor, itemsize = self.facts.vae_factor, self.machine.vae_dtype.itemsize
        source = (size, factor, PIXEL_CHANNELS) if encode else (size.divide(factor), 1, self.facts.latent_channels)
        on_cpu = self.machine.device.type == "cpu"
        return estimate_vae(self.build_vae_stages(encode), *source, strategy, itemsize, on_cpu)

    def build_vae_stages(self, encode: bool) -> list[StreamStage]:
        """Return the stages of the VAE's encoder or decoder."""
        return build_encoder_stages(self.meta_model.vae) if encode else build_decoder_stages(self.meta_model.vae)

    def _count_weight_bytes(self, attention: str | None, controlled: bool = False) -> int:
        """Return the bytes of the weights on the device. `attention` is that of the UNet, None if it is not loaded.

        On a CPU these are the weights of all models.
        """
        model, on_gpu = self.meta_model, self.machine.device.type == "cuda"
        unet = 0 if attention is None else model.count_unet_parameters(attention)
        parameters = unet if on_gpu else model.total_unet_parameters
        parameters += model.controlnet_parameters if controlled or not on_gpu else 0
        return parameters * self.machine.dtype.itemsize + model.vae_parameters * self.machine.vae_dtype.itemsize

    def _build_estimate(
        self, ledger: MemoryLedger, host: int, device: int, weights: int, compute_sec: float
    ) -> ResourceEstimate:
        """Return the estimate of the process. On a CPU, device memory is host memory.

        With a GPU, modules that are not in use are kept on the host.
        """
        machine, model = self.machine, self.meta_model
        host += machine.resident_bytes + LIBRARY_HEAP_BYTES
        if machine.device.type == "cpu":
            return ResourceEstimate(host + device + weights, 0, compute_sec, flops=ledger.flops)
        unused = model.total_unet_parameters - model.count_unet_parameters("linear") + model.controlnet_parameters
        pinned, copied = ledger.peak["host"], ledger.copied_bytes
        host += unused * machine.dtype.itemsize + pinned
        seconds = max(compute_sec, copied / machine.copy_bytes_per_sec)  # both are nan on an unknown GPU
        return ResourceEstimate(
            host, weights + self._estimate_reserved_bytes(device), seconds, pinned, copied, ledger.flops
        )

    def _estimate_reserved_bytes(self, allocated: int) -> int:
        """Return the bytes that torch's allocator reserves for `allocated` bytes of temporary data, with workspaces."""
        factor, constant = EXPANDABLE if self.machine.segments == "expandable" else NATIVE
        return int(factor * allocated) + constant

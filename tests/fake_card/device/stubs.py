"""Stubs for the files of a run on a FakeCard: weights, the output image and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from linfusion_cli.checkpoint.store import Checkpoint, CheckpointStore
from linfusion_cli.mixers.linear import weights
from linfusion_cli.models.adapters import ip_adapter
from linfusion_cli.models.files.layout import Part
from linfusion_cli.models.load import controlnet
from linfusion_cli.models.load import networks as load_parts
from linfusion_cli.models.text import encode
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.run import pipeline
from linfusion_cli.run.stages import linear_attention, load
from tests.fake_card.device.tensor import CPU, FakeTensor


class CountingSink:
    """A sink that counts the rows of an image."""

    def __init__(self) -> None:
        self.rows = 0
        self.is_complete = False

    def write(self, rows: np.ndarray) -> None:
        self.rows += len(rows)

    def close(self) -> None:
        self.is_complete = True

    def abort(self) -> None:
        pass


class Checkpoints:
    """A checkpoint store in memory."""

    def __init__(self) -> None:
        self.checkpoint: Checkpoint | None = None
        self.saved = 0

    def save(self, store: CheckpointStore, metadata: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        self.checkpoint = Checkpoint(dict(metadata), {name: copy_to_cpu(section) for name, section in state.items()})
        self.saved += 1

    def read(self, store: CheckpointStore) -> Checkpoint | None:
        return self.checkpoint

    def remove(self, store: CheckpointStore) -> None:
        self.checkpoint = None


def copy_to_cpu(value: Any) -> Any:
    """Return a state with copies of its tensors on the CPU, as if read from a file."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {name: copy_to_cpu(each) for name, each in value.items()}
    return [copy_to_cpu(each) for each in value] if isinstance(value, list) else value


def fake_load_part(kind: type[nn.Module], part: Part, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Replace `load_part`: build the network from its config, with fake parameters."""
    return make_fake(copy.deepcopy(build_outline(kind, part)), dtype).to(device)


@cache
def build_outline(kind: type[nn.Module], part: Part) -> nn.Module:
    """Return a network on the meta device; it is copied later, because building it is slower."""
    return load_parts.load_meta(kind, part)


read_outline = cache(MetaModel.read)


def read_cached_outline(model, linfusion, vae, adapters, controlnets) -> MetaModel:
    """Replace `MetaModel.read`: cache it for runs with the same networks."""
    return read_outline(model, linfusion, vae, AdapterKey(adapters), tuple(controlnets))


class Config(dict):
    """A hashable config; there is only one UNet."""

    def __hash__(self) -> int:
        return len(self)


class AdapterKey(tuple):
    """Hashable adapters, compared by their number."""

    def __hash__(self) -> int:
        return len(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterKey) and len(self) == len(other)


def make_fake(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the parameters of `module` by fake ones on the CPU, in channels-last layout for convolutions."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = make_fake_parameter(parameter, dtype)
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                each._buffers[name] = torch.arange(buffer.numel()).reshape(buffer.shape)  # positions of tokens
    return module.eval()


def make_fake_parameter(parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
    layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
    meta = torch.empty(parameter.shape, dtype=dtype, device="meta", memory_format=layout)
    return nn.Parameter(FakeTensor(meta, CPU), requires_grad=False)


def fake_load_weights(folder, unet: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Replace `load_weights` of the linear attention."""
    return {path: make_fake(module, dtype) for path, module in weights.build_meta_modules(folder, unet).items()}


load_adapters = ip_adapter.load_adapters


def fake_load_adapters(unet: UNet2DConditionModel, adapters) -> None:
    """Replace `load_adapters`: load them for a UNet on the meta device, and transfer them to this one."""
    if not adapters:
        return
    dtype, source = unet.dtype, copy.deepcopy(build_with_adapters(Config(unet.config), AdapterKey(adapters)))
    unet.encoder_hid_proj = source.encoder_hid_proj
    unet.config.encoder_hid_dim_type = source.config.encoder_hid_dim_type
    unet.set_attn_processor(source.attn_processors)
    make_fake(unet.encoder_hid_proj, dtype)
    for processor in unet.attn_processors.values():
        if isinstance(processor, nn.Module):
            make_fake(processor, dtype)


@cache
def build_with_adapters(config: Config, adapters: AdapterKey) -> UNet2DConditionModel:
    """Return a UNet on the meta device with these adapters."""
    with torch.device("meta"):
        source = UNet2DConditionModel.from_config(config)
    load_adapters(source, adapters)
    return source


@contextmanager
def stub_files(checkpoints: Checkpoints, sink: CountingSink) -> Iterator[None]:
    """Read no weights, and write no image and no checkpoint."""

    @contextmanager
    def open_sink(*_: Any) -> Iterator[CountingSink]:
        yield sink

    with ExitStack() as stack:
        for module in (load_parts, encode, ip_adapter, controlnet):
            stack.enter_context(patch.object(module, "load_part", fake_load_part))
        stack.enter_context(patch.object(MetaModel, "read", read_cached_outline))
        stack.enter_context(patch.object(linear_attention, "load_weights", fake_load_weights))
        stack.enter_context(patch.object(load, "load_adapters", fake_load_adapters))
        stack.enter_context(patch.object(pipeline, "open_outputs", open_sink))
        for name in ("save", "read", "remove"):
            method = getattr(checkpoints, name)
            stack.enter_context(patch.object(CheckpointStore, name, lambda *args, method=method: method(*args)))
        yield

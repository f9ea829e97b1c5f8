"""What takes the place of files in a run on a FakeCard: the reader of weights, the image's file and the checkpoints."""

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
from linfusion_cli.models.files.parts import Part
from linfusion_cli.models.load import controlnet
from linfusion_cli.models.load import parts as load_parts
from linfusion_cli.models.text import encode
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.run import pipeline
from linfusion_cli.run.stages import linear_attention, load
from tests.fake_card.device.tensor import CPU, FakeTensor


class CountingSink:
    """Takes the rows of an image, and counts them."""

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
    """What a journal has saved, in memory."""

    def __init__(self) -> None:
        self.entry: Checkpoint | None = None
        self.saved = 0

    def save(self, store: CheckpointStore, head: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        self.entry = Checkpoint(dict(head), {name: on_cpu(part) for name, part in parts.items()})
        self.saved += 1

    def read(self, store: CheckpointStore) -> Checkpoint | None:
        return self.entry

    def remove(self, store: CheckpointStore) -> None:
        self.entry = None


def on_cpu(value: Any) -> Any:
    """A state with its tensors on the CPU, as a file gives them back."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {name: on_cpu(each) for name, each in value.items()}
    return [on_cpu(each) for each in value] if isinstance(value, list) else value


def fake_part(kind: type[nn.Module], part: Part, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """As `models.load.load_part`, from the config alone."""
    return as_fake(copy.deepcopy(made_once(kind, part)), dtype).to(device)


@cache
def made_once(kind: type[nn.Module], part: Part) -> nn.Module:
    """The outline of a network, which takes longer to make than to copy."""
    return load_parts.outline(kind, part)


read_outline = cache(MetaModel.read)


def known_outline(model, linfusion, vae, adapters, controlnets) -> MetaModel:
    """As `ModelOutline.read`, once for all runs with the same networks."""
    return read_outline(model, linfusion, vae, Known(adapters), tuple(controlnets))


class Config(dict):
    """The config of the one UNet that there is."""

    def __hash__(self) -> int:
        return len(self)


class Known(tuple):
    """Adapters that are told from others by how many they are."""

    def __hash__(self) -> int:
        return len(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known) and len(self) == len(other)


def as_fake(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` with fake parameters on the CPU, those of convolutions in channels-last."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = fake_parameter(parameter, dtype)
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                each._buffers[name] = torch.arange(buffer.numel()).reshape(buffer.shape)  # positions of tokens
    return module.eval()


def fake_parameter(parameter: Tensor, dtype: torch.dtype) -> nn.Parameter:
    layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
    meta = torch.empty(parameter.shape, dtype=dtype, device="meta", memory_format=layout)
    return nn.Parameter(FakeTensor(meta, CPU), requires_grad=False)


def fake_linear(folder, unet: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """As `attention.weights.load_weights`."""
    return {path: as_fake(module, dtype) for path, module in weights.outline(folder, unet).items()}


load_adapters = ip_adapter.load_adapters


def fake_adapters(unet: UNet2DConditionModel, adapters) -> None:
    """As `models.ip_adapter.load_adapters`: made for a UNet on the meta device, and given to this one."""
    if not adapters:
        return
    dtype, source = unet.dtype, copy.deepcopy(with_adapters(Config(unet.config), Known(adapters)))
    unet.encoder_hid_proj = source.encoder_hid_proj
    unet.config.encoder_hid_dim_type = source.config.encoder_hid_dim_type
    unet.set_attn_processor(source.attn_processors)
    as_fake(unet.encoder_hid_proj, dtype)
    for processor in unet.attn_processors.values():
        if isinstance(processor, nn.Module):
            as_fake(processor, dtype)


@cache
def with_adapters(config: Config, adapters: Known) -> UNet2DConditionModel:
    """A UNet on the meta device with these adapters."""
    with torch.device("meta"):
        source = UNet2DConditionModel.from_config(config)
    load_adapters(source, adapters)
    return source


@contextmanager
def stubbed(checkpoints: Checkpoints, sink: CountingSink) -> Iterator[None]:
    """Within the context no weights are read, and no image or checkpoint is written."""

    @contextmanager
    def opened(*_: Any) -> Iterator[CountingSink]:
        yield sink

    with ExitStack() as stack:
        for module in (load_parts, encode, ip_adapter, controlnet):
            stack.enter_context(patch.object(module, "load_part", fake_part))
        stack.enter_context(patch.object(MetaModel, "read", known_outline))
        stack.enter_context(patch.object(linear_attention, "load_weights", fake_linear))
        stack.enter_context(patch.object(load, "load_adapters", fake_adapters))
        stack.enter_context(patch.object(pipeline, "open_outputs", opened))
        for name in ("save", "read", "remove"):
            method = getattr(checkpoints, name)
            stack.enter_context(patch.object(CheckpointStore, name, lambda *args, method=method: method(*args)))
        yield

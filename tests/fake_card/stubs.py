"""What takes the place of files in a run on a FakeCard: the reader of weights, the image's file and the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from linfusion_cli.attention import weights
from linfusion_cli.jobs import attention, loading, story
from linfusion_cli.journal import Entry, Journal
from linfusion_cli.models import ip_adapter, load, load_controlnet, text
from linfusion_cli.models.parts import Part
from tests.fake_card.tensor import CPU, FakeTensor


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
        self.entry: Entry | None = None
        self.saved = 0

    def save(self, journal: Journal, head: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        self.entry = Entry(dict(head), {name: on_cpu(part) for name, part in parts.items()})
        self.saved += 1

    def read(self, journal: Journal) -> Entry | None:
        return self.entry

    def remove(self, journal: Journal) -> None:
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
    return as_fake(load.outline(kind, part), dtype).to(device)


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
    with torch.device("meta"):
        source = UNet2DConditionModel.from_config(unet.config)
    load_adapters(source, adapters)
    unet.encoder_hid_proj = as_fake(source.encoder_hid_proj, unet.dtype)
    unet.config.encoder_hid_dim_type = source.config.encoder_hid_dim_type
    processors = source.attn_processors
    for processor in processors.values():
        if isinstance(processor, nn.Module):
            as_fake(processor, unet.dtype)
    unet.set_attn_processor(processors)


@contextmanager
def stubbed(checkpoints: Checkpoints, sink: CountingSink) -> Iterator[None]:
    """Within the context no weights are read, and no image or checkpoint is written."""

    @contextmanager
    def opened(*_: Any) -> Iterator[CountingSink]:
        yield sink

    with ExitStack() as stack:
        for module in (load, text, ip_adapter, load_controlnet):
            stack.enter_context(patch.object(module, "load_part", fake_part))
        stack.enter_context(patch.object(attention, "load_weights", fake_linear))
        stack.enter_context(patch.object(loading, "load_adapters", fake_adapters))
        stack.enter_context(patch.object(story, "opened_outputs", opened))
        for name in ("save", "read", "remove"):
            method = getattr(checkpoints, name)
            stack.enter_context(patch.object(Journal, name, lambda *args, method=method: method(*args)))
        yield

"""Replace the parts of torch that call a CUDA driver by a FakeCard, for the rest of the process.

Replaced are driver calls, streams, events, and functions of torch that need values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fake_card.device.card import FakeCard
from tests.fake_card.device.tensor import FakeTensor

NAME = "Fake card"


def count_sync(operation: str) -> None:
    """Count a synchronization; ignore those of leftover objects after the card is closed."""
    if FakeCard.active is not None:
        FakeCard.active.count_sync(operation)


class Event:
    """An event that is always complete."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        count_sync("event.synchronize")


class Stream:
    """A stream on which all work is complete immediately."""

    def __init__(self, device: Any = None, name: str | None = None, **_: Any):
        self.name = name or f"stream {id(self)}"

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        count_sync("stream.synchronize")


MAIN = Stream(name="main")


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """Replace torch.cuda.stream: allocations inside belong to the pool of this stream."""
    card = FakeCard.active
    before, card.stream = card.stream, stream.name
    try:
        yield
    finally:
        card.stream = before


def install(total_bytes: int, has_bf16: bool = True) -> None:
    """Make torch in this process see one card with `total_bytes` of memory."""
    properties = SimpleNamespace(
        total_memory=total_bytes, major=9 if has_bf16 else 7, minor=0, name=NAME, multi_processor_count=132, uuid=None
    )
    torch.version.cuda = torch.version.cuda or "12.8"
    replacements = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "is_bf16_supported": lambda including_emulation=True: has_bf16,
        "mem_get_info": lambda device=None: (total_bytes - FakeCard.active.expandable.reserved, total_bytes),
        "memory_reserved": lambda device=None: FakeCard.active.expandable.reserved,
        "memory_allocated": lambda device=None: FakeCard.active.expandable.allocated,
        "max_memory_reserved": lambda device=None: FakeCard.active.expandable.peak_reserved,
        "reset_peak_memory_stats": lambda device=None: FakeCard.active.reset(),
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "empty_cache": empty_cache,
        "synchronize": lambda device=None: count_sync("synchronize"),
        "current_stream": lambda device=None: MAIN,
        "default_stream": lambda device=None: MAIN,
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
        "device": on_device,
        "cudart": lambda: CUDART,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    F.scaled_dot_product_attention = attention
    # Without inference mode, composite operations are dispatched as the kernels that a card would run.
    torch.inference_mode = lambda *args, **kwargs: torch.no_grad()
    torch.tensor = tensor
    skip_initialisation()


original_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """Replace torch.tensor, whose copy to the device bypasses dispatch modes."""
    result = original_tensor(data, **options)
    return result if device is None else result.to(device)


@contextmanager
def on_device(_: Any) -> Iterator[None]:
    yield


def empty_cache() -> None:
    for allocator in (FakeCard.active.expandable, FakeCard.active.native):
        allocator.empty_cache()


def register(address: int, size: int, flags: int) -> int:
    FakeCard.active.pin(address, size)
    return 0


def unregister(address: int) -> int:
    if FakeCard.active is not None:
        FakeCard.active.unpin(address)
    return 0


CUDART = SimpleNamespace(
    cudaHostRegister=register, cudaHostUnregister=unregister, cudaGetErrorString=str, cudaError=SimpleNamespace
)


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Replace the fused attention kernel, with its auxiliary outputs; on the CPU, call torch's."""
    if type(query) is not FakeTensor:
        return torch._C._nn.scaled_dot_product_attention(query, key, value, *_, **__)
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out[0]


def skip_initialisation() -> None:
    """Skip random initialization, which takes seconds and is overwritten by the weights."""
    names = ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_")
    for name in names:
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)

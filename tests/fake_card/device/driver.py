"""What torch asks of a CUDA driver beside kernels, answered for a FakeCard in a process of its own: nothing is undone.

Replaced are the calls that reach the driver, the streams and events, and what torch cannot do without numbers.
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


def synced(what: str) -> None:
    """The host waits; what a run has left may do so after its card is gone."""
    if FakeCard.present is not None:
        FakeCard.present.synced(what)


class Event:
    """A point on a stream, which is reached at once."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synced("event.synchronize")


class Stream:
    """Work in order: here, all of it is done when it is asked for."""

    def __init__(self, device: Any = None, name: str | None = None, **_: Any):
        self.name = name or f"stream {id(self)}"

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        synced("stream.synchronize")


MAIN = Stream(name="main")


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """As torch.cuda.stream: memory that is allocated within belongs to this stream's pool."""
    card = FakeCard.present
    before, card.stream = card.stream, stream.name
    try:
        yield
    finally:
        card.stream = before


def install(total_bytes: int, has_bf16: bool = True) -> None:
    """Make torch in this process see one card with so much memory."""
    properties = SimpleNamespace(
        total_memory=total_bytes, major=9 if has_bf16 else 7, minor=0, name=NAME, multi_processor_count=132, uuid=None
    )
    torch.version.cuda = torch.version.cuda or "12.8"
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "is_bf16_supported": lambda including_emulation=True: has_bf16,
        "mem_get_info": lambda device=None: (total_bytes - FakeCard.present.expandable.reserved, total_bytes),
        "memory_reserved": lambda device=None: FakeCard.present.expandable.reserved,
        "memory_allocated": lambda device=None: FakeCard.present.expandable.allocated,
        "max_memory_reserved": lambda device=None: FakeCard.present.expandable.peak_reserved,
        "reset_peak_memory_stats": lambda device=None: FakeCard.present.reset(),
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "empty_cache": empty_cache,
        "synchronize": lambda device=None: synced("synchronize"),
        "current_stream": lambda device=None: MAIN,
        "default_stream": lambda device=None: MAIN,
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
        "device": on_device,
        "cudart": lambda: CUDART,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    F.scaled_dot_product_attention = attention
    # So that composite operations arrive as the kernels that a card would run.
    torch.inference_mode = lambda *args, **kwargs: torch.no_grad()
    torch.tensor = tensor
    skip_initialisation()


make_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """torch.tensor, which makes its tensor on the CPU, and copies it past all dispatch modes."""
    made = make_tensor(data, **options)
    return made if device is None else made.to(device)


@contextmanager
def on_device(_: Any) -> Iterator[None]:
    yield


def empty_cache() -> None:
    for allocator in (FakeCard.present.expandable, FakeCard.present.native):
        allocator.empty_cache()


def register(address: int, size: int, flags: int) -> int:
    FakeCard.present.pin(address, size)
    return 0


def unregister(address: int) -> int:
    if FakeCard.present is not None:
        FakeCard.present.unpin(address)
    return 0


CUDART = SimpleNamespace(
    cudaHostRegister=register, cudaHostUnregister=unregister, cudaGetErrorString=str, cudaError=SimpleNamespace
)


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a fused kernel gives, with the sums that it keeps; on the CPU, torch's own."""
    if type(query) is not FakeTensor:
        return torch._C._nn.scaled_dot_product_attention(query, key, value, *_, **__)
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out[0]


def skip_initialisation() -> None:
    """Random numbers that are overwritten at once take seconds; on meta tensors they are nothing."""
    names = ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_")
    for name in names:
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)

"""A simulated GPU that delays every copy until it is waited for, which exposes missing synchronisation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.storage import Place, Storage

CPU = torch.device("cpu")


class LateCard(TorchDispatchMode):
    """Runs the compute stream at once, and copies on other streams only when they are waited for.

    `freed_early` counts copies with device memory that was freed before the compute stream waited for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.freed_early = 0
        self._copying: LateStream | None = None  # the stream of the enclosing `with torch.cuda.stream`
        self._on_host: set[int] = set()

    def wait_event(self, event: Event) -> None:
        """Make the compute stream wait."""
        event.stream.advance(event.place)

    @contextmanager
    def copying_on(self, stream: LateStream) -> Iterator[None]:
        """Replace torch.cuda.stream."""
        self._copying = stream
        with self:
            yield
        self._copying = None

    def storage(self, place: Place, dtype: torch.dtype) -> Storage:
        """Return a Storage with this GPU as its device, in CPU memory."""
        storage = Storage(place, CPU, dtype)
        storage.copies._uploads, storage.copies._downloads = LateStream(), LateStream()
        new_on_host = storage._on_host

        def on_host(shape: tuple[int, ...]) -> FeatureMap:
            host_map = new_on_host(shape)
            self._on_host.add(host_map.tensor.untyped_storage().data_ptr())
            return host_map

        storage._on_host = on_host
        return storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))  # views of copied tensors
        target, source = args[:2]
        self._copying.waiting.append(self._copy(target, source))
        return target

    def _copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Return the delayed copy. Like torch, it keeps only host tensors alive."""
        get_target, get_source = (self._reference(tensor) for tensor in (target, source))

        def run() -> None:
            late_target, late_source = get_target(), get_source()
            if late_target is None or late_source is None:
                self.freed_early += 1
            else:
                late_target.copy_(late_source)

        return run

    def _reference(self, tensor: Tensor) -> Callable[[], Tensor | None]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._on_host:
            return lambda: tensor
        dtype = tensor.dtype
        layout, reference = (tensor.storage_offset(), tensor.shape, tensor.stride()), weakref.ref(storage)
        return lambda: None if reference() is None else build_tensor(reference(), dtype, layout)


def build_tensor(storage: torch.UntypedStorage, dtype: torch.dtype, layout: tuple) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, *layout)


@dataclass(frozen=True)
class Event:
    """The point in a stream after its first `place` copies and waits."""

    stream: LateStream
    place: int

    def synchronize(self) -> None:
        self.stream.advance(self.place)


class LateStream:
    """Copies, and waits for other streams, executed in order when they are waited for, and no sooner."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._done = 0

    def wait_stream(self, _: LateCard) -> None:
        """Do nothing: work of the compute stream is complete."""

    def record_event(self) -> Event:
        return Event(self, self._done + len(self.waiting))

    def wait_event(self, event: Event) -> None:
        self.waiting.append(lambda: event.stream.advance(event.place))

    def advance(self, place: int) -> None:
        while self._done < place:
            self.waiting.pop(0)()
            self._done += 1


@contextmanager
def late_card(monkeypatch) -> Iterator[LateCard]:
    """Replace torch's CUDA streams by those of a LateCard, and fill new memory with NaN."""
    card = LateCard()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: card)
    monkeypatch.setattr(torch.cuda, "stream", card.copying_on)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # makes torch.empty fill new tensors with NaN
    try:
        yield card
    finally:
        torch.use_deterministic_algorithms(was_deterministic)

"""A card that copies as late as it may: what its streams let happen too late, or too early, happens."""

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
    """Its computing stream runs at once; a copy on another stream only when somebody waits for it.

    `freed_early` counts copies whose memory on the device was given back before the computing stream waited for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.freed_early = 0
        self._copying: LateStream | None = None  # the stream of the `with torch.cuda.stream` around
        self._on_host: set[int] = set()

    def wait_event(self, event: Event) -> None:
        """The computing stream waits."""
        event.stream.advance(event.place)

    @contextmanager
    def copying_on(self, stream: LateStream) -> Iterator[None]:
        """As torch.cuda.stream."""
        self._copying = stream
        with self:
            yield
        self._copying = None

    def storage(self, place: Place, dtype: torch.dtype) -> Storage:
        """A Storage whose device is this card, in the memory of the CPU."""
        made = Storage(place, CPU, dtype)
        made.copies._uploads, made.copies._downloads = LateStream(), LateStream()
        new_on_host = made._on_host

        def on_host(shape: tuple[int, ...]) -> FeatureMap:
            found = new_on_host(shape)
            self._on_host.add(found.tensor.untyped_storage().data_ptr())
            return found

        made._on_host = on_host
        return made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))  # views of what is copied
        target, source = args[:2]
        self._copying.waiting.append(self._copy(target, source))
        return target

    def _copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """The copy for later, which holds on to what is on the host alone, as torch does."""
        target_of, source_of = (self._held(tensor) for tensor in (target, source))

        def run() -> None:
            late_target, late_source = target_of(), source_of()
            if late_target is None or late_source is None:
                self.freed_early += 1
            else:
                late_target.copy_(late_source)

        return run

    def _held(self, tensor: Tensor) -> Callable[[], Tensor | None]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._on_host:
            return lambda: tensor
        dtype = tensor.dtype
        shape, held = (tensor.storage_offset(), tensor.shape, tensor.stride()), weakref.ref(storage)
        return lambda: None if held() is None else tensor_of(held(), dtype, shape)


def tensor_of(storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, *shape)


@dataclass(frozen=True)
class Event:
    """After so many of a stream's copies and waits."""

    stream: LateStream
    place: int

    def synchronize(self) -> None:
        self.stream.advance(self.place)


class LateStream:
    """Copies, and waits for other streams, in order: done when somebody waits for them, and no sooner."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._done = 0

    def wait_stream(self, _: LateCard) -> None:
        """What the computing stream was given is done already."""

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
    """Within the context torch's CUDA streams are those of a LateCard, and fresh memory is full of NaN."""
    card = LateCard()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: card)
    monkeypatch.setattr(torch.cuda, "stream", card.copying_on)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with which torch.empty fills what it makes
    try:
        yield card
    finally:
        torch.use_deterministic_algorithms(before)

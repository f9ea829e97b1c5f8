"""A card that copies as late as it may: what its streams let happen too late, or too early, happens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linfusion_cli.strips.storage import Map, Place, Storage

CPU = torch.device("cpu")


class LateCard(TorchDispatchMode):
    """Its computing stream runs at once; a copy on its other stream only when somebody waits for it.

    It is both streams, as neither needs to be told from the other but in `with torch.cuda.stream`. `freed_early` counts
    copies whose memory on the device was given back before the computing stream waited for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.freed_early = 0
        self._waiting: list[Callable[[], None]] = []
        self._done = 0
        self._on_host: set[int] = set()

    def storage(self, place: Place, dtype: torch.dtype) -> Storage:
        """A Storage whose device is this card, in the memory of the CPU."""
        made = Storage(place, CPU, dtype)
        made._copies._stream = self
        new_on_host = made._on_host

        def on_host(shape: tuple[int, ...]) -> Map:
            found = new_on_host(shape)
            self._on_host.add(found.tensor.untyped_storage().data_ptr())
            return found

        made._on_host = on_host
        return made

    def wait_stream(self, _: object) -> None:
        """What the computing stream was given is done already."""

    def record_event(self) -> int:
        return self._done + len(self._waiting)

    def wait_event(self, event: int) -> None:
        while self._done < event:
            self._waiting.pop(0)()
            self._done += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.copy_.default, function
        target, source = args[:2]
        self._waiting.append(self._copy(target, source))
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
        on_host = tensor.untyped_storage().data_ptr() in self._on_host
        return (lambda: tensor) if on_host else weakref.ref(tensor)


@contextmanager
def late_card(monkeypatch) -> Iterator[LateCard]:
    """Within the context torch's CUDA streams are those of a LateCard, and fresh memory is full of NaN."""
    card = LateCard()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: card)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: card)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with which torch.empty fills what it makes
    try:
        yield card
    finally:
        torch.use_deterministic_algorithms(before)
    card.wait_event(card.record_event())

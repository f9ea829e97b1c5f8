"""A picture on its way through a VAE, which goes on from the row it has reached when memory or precision give out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from linfusion_cli.core.errors import NonFinite
from linfusion_cli.hardware.device import dtype_name, free_memory, is_out_of_memory
from linfusion_cli.strips.copies import Download
from linfusion_cli.strips.pinned import PinnedMemory
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.stream import StreamStage, reach, stream
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import Vae
from linfusion_cli.vae.statistics import VaeStrategy, freeze_statistics, max_output_rows, output_length

Notify = Callable[[str], None]
IN_FP32 = "The VAE gave NaN in {}: from row {} on, it runs in float32."
SMALLER = "Memory ran out: from row {} on, the VAE runs with {} rows at a time{}."
OTHER_WEIGHTS = "The weights are damaged, or the latents are: try `linfusion decode` with another --vae."


def nobody(_: str) -> None:
    """Takes a notice that no one wants."""


def one_behind(downloads: Iterator[Download]) -> Iterator[Download]:
    """Each of them once the next is under way: so the device computes while the CPU writes."""
    last = None
    for download in downloads:
        if last is not None:
            yield last
        last = download
    if last is not None:
        yield last


class Conversion:
    """Streams what `source_of` gives through `stages`, by `method`; `notify` hears when the way has to change.

    `step` is how many rows are read at a time, where they are not those that are computed. `finish` is what is done to
    rows before they leave the device, and `pinned` how many bytes of pinned memory all this is planned to take.
    """

    def __init__(
        self,
        vae: Vae,
        stages: Sequence[StreamStage],
        source_of: Callable[[Storage], Source],
        method: VaeStrategy,
        notify: Notify = nobody,
        step: int | None = None,
        finish: Callable[[Tensor], Tensor] = lambda rows: rows,
        pinned: int = 0,
    ):
        self._finish, self._pinned = finish, pinned
        self._vae, self._stages, self._source_of = vae, stages, source_of
        self._method, self._notify, self._step = method, notify, step
        self._top = 0  # of the rows that come out: those above are done
        self._settled = self._done = False

    @torch.inference_mode()
    def rows(self) -> Iterator[Tensor]:
        """Rows [n, W, C] in fp32 on the CPU, top to bottom, each once; raises NonFinite where they stay NaN."""
        while not self._done:
            error = None
            try:
                yield from self._attempt()
            except (RuntimeError, MemoryError) as caught:
                if not is_out_of_memory(caught):
                    raise
                error = caught.with_traceback(None)  # which holds on to all that the attempt had
            if error is not None:
                self._use_less(error)

    def _attempt(self) -> Iterator[Tensor]:
        """Rows from where the last attempt ended, until the end or the first that is no number."""
        device = self._vae.device
        storage = Storage(self._method.place, device, self._vae.dtype, PinnedMemory(device, self._pinned))
        stages, source = self._stages, self._source_of(storage)
        if not self._settled:
            stages, source = freeze_statistics(stages, source, self._method, storage)
            self._settled = True
        first, above = self._begin(stages, source)

        def read(top: int, bottom: int) -> Tensor:
            return source.rows(first + top, first + bottom)

        parts = stream(stages, read, source.size.height - first, self._method.height, self._step)
        downloads = self._downloads(parts, above, storage)
        for download in one_behind(downloads) if device.type == "cuda" else downloads:
            rows = download.wait()
            if rows is None:
                self._use_fp32()
                return
            del download  # or three would be there at a time
            self._top += len(rows)
            yield rows
        self._done = True

    def _downloads(self, parts: Iterator[Tensor], above: int, storage: Storage) -> Iterator[Download]:
        """The rows on their way to the CPU, without the first `above`; checked and finished on the device."""
        capacity = max_output_rows(self._stages, self._method.height)
        for part in parts:
            rows, above = part[0, above:].float(), max(0, above - part.shape[1])
            if len(rows):
                finite = rows.isfinite().all()  # before infinity becomes white
                yield Download.of(self._finish(rows), finite, storage.copies, capacity)

    def _begin(self, stages: Sequence[StreamStage], source: Source) -> tuple[int, int]:
        """The row of `source` to stream from, and how many of the rows that come out then have been before."""
        out_scale = output_length(stages, source.scale)
        first_lat = max(0, self._top // out_scale - -(-reach(stages) // source.scale))
        return first_lat * source.scale, self._top - first_lat * out_scale

    def _use_fp32(self) -> None:
        if self._vae.dtype == torch.float32:
            raise NonFinite("The VAE gives NaN, even in float32.", OTHER_WEIGHTS)
        self._notify(IN_FP32.format(dtype_name(self._vae.dtype), self._top))
        self._vae.float()
        self._settled = False

    def _use_less(self, error: BaseException) -> None:
        """A smaller way, with the statistics there are; raises `error` where there is none."""
        smaller = self._method.smaller(self._settled)
        if smaller is None:
            raise error
        self._method = smaller
        free_memory(self._vae.device)
        sample = "" if self._settled or smaller.start else f" and statistics of {smaller.patches} patches"
        self._notify(SMALLER.format(self._top, smaller.height, sample))

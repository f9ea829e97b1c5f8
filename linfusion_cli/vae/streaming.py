"""Stream an image through a VAE. After NaN or lack of memory, continue from the first row that is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from linfusion_cli.core.errors import NonFinite
from linfusion_cli.hardware.device import dtype_name
from linfusion_cli.hardware.peak import release_memory
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.strips.copies import Download
from linfusion_cli.strips.pinned import PinnedMemory
from linfusion_cli.strips.storage import Storage
from linfusion_cli.strips.stream import StreamStage, receptive_radius, stream
from linfusion_cli.vae.patches import Source
from linfusion_cli.vae.stages import Vae
from linfusion_cli.vae.statistics import VaeStrategy, compute_max_output_rows, compute_output_length, freeze_statistics

Notify = Callable[[str], None]
FP32_NOTICE = "The VAE returned NaN in {}. It continues in float32 from row {} on."
LOW_MEMORY_NOTICE = "Out of memory in the VAE. It continues from row {} on with {} rows at a time{}."
NAN_HINT = "The weights or the latents are damaged. Try `linfusion decode` with another --vae."


def ignore_notice(_: str) -> None:
    """Discard a notice."""


def delay_by_one(downloads: Iterator[Download]) -> Iterator[Download]:
    """Yield each download after the next one has started: the device computes while the CPU writes."""
    last = None
    for download in downloads:
        if last is not None:
            yield last
        last = download
    if last is not None:
        yield last


class Conversion:
    """Streams the source that `open_source` returns through `stages`, as `strategy` says.

    `step` is the number of rows read at a time, by default the number of rows computed at a time. `finish` is applied
    to rows before they leave the device. `pinned_bytes` is the planned amount of pinned memory. `notify` reports
    changes of dtype or strategy.
    """

    def __init__(
        self,
        vae: Vae,
        stages: Sequence[StreamStage],
        open_source: Callable[[Storage], Source],
        strategy: VaeStrategy,
        notify: Notify = ignore_notice,
        step: int | None = None,
        finish: Callable[[Tensor], Tensor] = lambda rows: rows,
        pinned_bytes: int = 0,
    ):
        self._finish, self._pinned_bytes = finish, pinned_bytes
        self._vae, self._stages, self._open_source = vae, stages, open_source
        self._strategy, self._notify, self._step = strategy, notify, step
        self._top = 0  # first output row that is missing
        self._are_statistics_frozen = self._is_complete = False

    @torch.inference_mode()
    def stream_rows(self) -> Iterator[Tensor]:
        """Yield rows [n, W, C] in fp32 on the CPU, from top to bottom. Raise NonFinite if fp32 gives NaN too."""
        while not self._is_complete:
            error = None
            try:
                yield from self._run_attempt()
            except (RuntimeError, MemoryError) as caught:
                if not is_out_of_memory(caught):
                    raise
                error = caught.with_traceback(None)  # the traceback keeps the tensors of the attempt alive
            if error is not None:
                self._reduce_memory(error)

    def _run_attempt(self) -> Iterator[Tensor]:
        """Yield the missing rows, up to the last row or the first NaN."""
        device = self._vae.device
        storage = Storage(self._strategy.place, device, self._vae.dtype, PinnedMemory(device, self._pinned_bytes))
        stages, source = self._stages, self._open_source(storage)
        if not self._are_statistics_frozen:
            stages, source = freeze_statistics(stages, source, self._strategy, storage)
            self._are_statistics_frozen = True
        first, above = self._find_start(stages, source)

        def read(top: int, bottom: int) -> Tensor:
            return source.read_rows(first + top, first + bottom)

        parts = stream(stages, read, source.size.height - first, self._strategy.height, self._step)
        downloads = self._start_downloads(parts, above, storage)
        for download in delay_by_one(downloads) if device.type == "cuda" else downloads:
            rows = download.wait()
            if rows is None:
                self._use_fp32()
                return
            del download  # otherwise three downloads would be in memory at a time
            self._top += len(rows)
            yield rows
        self._is_complete = True

    def _start_downloads(self, parts: Iterator[Tensor], above: int, storage: Storage) -> Iterator[Download]:
        """Yield downloads of rows, without the first `above` rows. Rows are checked and finished on the device."""
        capacity = compute_max_output_rows(self._stages, self._strategy.height)
        for part in parts:
            rows, above = part[0, above:].float(), max(0, above - part.shape[1])
            if len(rows):
                finite = rows.isfinite().all()  # before `finish` clamps Inf to 1
                yield Download.start(self._finish(rows), finite, storage.copies, capacity)

    def _find_start(self, stages: Sequence[StreamStage], source: Source) -> tuple[int, int]:
        """Return the first row of `source` to read, and how many of the resulting rows are not missing."""
        out_scale = compute_output_length(stages, source.scale)
        first_lat = max(0, self._top // out_scale - -(-receptive_radius(stages) // source.scale))
        return first_lat * source.scale, self._top - first_lat * out_scale

    def _use_fp32(self) -> None:
        if self._vae.dtype == torch.float32:
            raise NonFinite("The VAE returns NaN, even in float32.", NAN_HINT)
        self._notify(FP32_NOTICE.format(dtype_name(self._vae.dtype), self._top))
        self._vae.float()
        self._are_statistics_frozen = False

    def _reduce_memory(self, error: BaseException) -> None:
        """Switch to a strategy that needs less memory, or raise `error` if the strategy is already the smallest."""
        smaller = self._strategy.reduce_memory(self._are_statistics_frozen)
        if smaller is None:
            raise error
        self._strategy = smaller
        release_memory(self._vae.device)
        is_sampled_again = not self._are_statistics_frozen and not smaller.start
        sample = f" and statistics of {smaller.patches} patches" if is_sampled_again else ""
        self._notify(LOW_MEMORY_NOTICE.format(self._top, smaller.height, sample))

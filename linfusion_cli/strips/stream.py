"""Stream a convolutional network: rows go in from top to bottom, and each row of each map is computed once.

A 3x3 convolution carries over its last two input rows, which the next rows need. There is no overlap and no blending.
This requires operations with a small receptive field and known statistics for normalisation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion_cli.core.geometry import split_rows
from linfusion_cli.strips.dilation import skip_row_padding, unwrap_convolution
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import as_nchw, as_nhwc
from linfusion_cli.strips.stats import Moments, group_affine

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [B, bottom - top, W, C]


class StreamStage:
    """One operation of a stream. At most `height` rows, divided by `upscale_factor`, are passed at a time.

    `norm` is the normalisation of its input, if any. `residual` stores its input for a shortcut. A stage that
    `is_pointwise` depends neither on other pixels nor on statistics.
    """

    upscale_factor = 1
    downscale_factor = 1
    is_pointwise = True
    norm: FrozenNorm | None = None
    residual: ResidualBuffer | None = None

    def reset(self, workspace: Workspace) -> None:
        """Prepare for the first rows of a map: discard carried rows."""

    def input_radius(self, rows: int) -> int:
        """Return the receptive field's radius in input rows, given its radius `rows` in output rows."""
        return rows

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        """Process the next rows [B, n > 0, W, C] and return the rows [B, m, W', C'] that are ready; all if `last`."""
        raise NotImplementedError


def stream(
    stages: Sequence[StreamStage],
    read: ReadRows,
    length: int,
    height: int,
    step: int | None = None,
    workspace: Workspace | None = None,
) -> Iterator[Tensor]:
    """Pass the `length` rows of `read` through all `stages`, at most `height` at a time; read `step` rows at a time."""
    workspace = workspace or Workspace()
    for stage in stages:
        stage.reset(workspace)
    for top, bottom in split_rows(length, step or height):
        yield from _run_stages(stages, read(top, bottom), bottom == length, height)


def _run_stages(stages: Sequence[StreamStage], rows: Tensor, last: bool, height: int) -> Iterator[Tensor]:
    """Pass `rows` through all `stages`, splitting them wherever they become more than `height` rows."""
    for i, stage in enumerate(stages):
        parts = rows.split(max(1, height // stage.upscale_factor), dim=1)
        if len(parts) > 1:
            for part in parts:
                yield from _run_stages(stages[i:], part, last and part is parts[-1], height)
            return
        rows = stage(rows, last)
        if not rows.shape[1]:
            return
    yield rows


class Workspace:
    """A memory buffer that consecutive operations reuse for their temporary data."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def new_empty(self, rows: Tensor, *shape: int) -> Tensor:
        """Return an uninitialised tensor of `shape`, with the dtype and device of `rows`."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # free the old block before allocating the new one
            self._memory = torch.empty(size, dtype=rows.dtype, device=rows.device)
        return self._memory[:size].view(shape)


class FrozenNorm:
    """GroupNorm with fixed statistics of a complete map, applied to parts of it, then an activation."""

    def __init__(self, norm: nn.GroupNorm, activation: nn.Module | None = None):
        self.norm, self._activation = norm, activation
        self._affine: tuple[Tensor, Tensor] | None = None

    def freeze(self, moments: Moments) -> None:
        """Fix the moments of the map, [1, C]."""
        self._affine = group_affine(self.norm, moments)

    def write(self, target: Tensor, rows: Tensor) -> None:
        """Write the normalised and activated rows [B, n, W, C] into `target`; computed in the statistics' dtype."""
        assert self._affine is not None  # set by freeze()
        scale, shift = self._affine
        if target.dtype == scale.dtype:
            activate_(self._activation, torch.addcmul(shift, rows, scale, out=target))
        else:
            target.copy_(activate_(self._activation, torch.addcmul(shift, rows, scale)))


def activate_(activation: nn.Module | None, x: Tensor) -> Tensor:
    """Apply `activation` to `x`, in place if the activation is known to support it."""
    if isinstance(activation, nn.SiLU):
        return F.silu(x, inplace=True)
    return x if activation is None else x.copy_(activation(x))


@dataclass(frozen=True)
class Edges:
    """Zero rows and columns that the stream adds around a map; the layer pads the remaining columns itself."""

    top: int
    bottom: int
    right: int = 0


class Convolution(StreamStage):
    """Applies `layer` to normalised, or 2x upscaled, rows, and carries over the rows that the next call needs."""

    is_pointwise = False

    def __init__(
        self,
        layer: nn.Module,
        norm: FrozenNorm | None = None,
        residual: ResidualBuffer | None = None,
        upscale: bool = False,
        edges: Edges | None = None,
    ):
        convolution = unwrap_convolution(layer)
        self.layer, self.norm, self.residual = layer, norm, residual
        self.upscale_factor, self.downscale_factor = (2 if upscale else 1), convolution.stride[0]
        padding = cast(int, convolution.padding[0])
        self.kernel, self._edges = convolution.kernel_size[0], edges or Edges(padding, padding)

    def reset(self, workspace: Workspace) -> None:
        """Discard carried rows and use `workspace` for windows."""
        self._workspace = workspace
        self._carried: Tensor | None = None  # buffer for carried rows; the first `_carried_count` are valid
        self._carried_count = 0

    def input_radius(self, rows: int) -> int:
        # With a stride, the kernel reaches further on one side; the larger bound covers both.
        """Return the receptive field's radius in input rows, given its radius `rows` in output rows."""
        around = self.kernel // 2 if self.downscale_factor == 1 else self.kernel - 1
        return -(-(rows * self.downscale_factor + around) // self.upscale_factor)

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        """Process the next rows and return the rows that are ready, possibly none."""
        if self.residual is not None:
            self.residual.put(rows)
        window = self._window(rows, last)
        count = max(0, (window.shape[1] - self.kernel) // self.downscale_factor + 1)
        self._carry(window[:, count * self.downscale_factor :])
        if not count:
            return window[:, :0]
        with skip_row_padding(self.layer):
            return as_nhwc(self.layer(as_nchw(window)))

    def _carry(self, rows: Tensor) -> None:
        if self._carried is None:
            self._carried = rows.new_empty(rows.shape[0], self.kernel - 1, *rows.shape[2:])
        self._carried_count = rows.shape[1]
        self._carried[:, : self._carried_count] = rows

    def _window(self, rows: Tensor, last: bool) -> Tensor:
        """Return the carried rows or zeros at the top edge, the transformed rows, and zeros at the bottom edge."""
        batch, count, width, channels = rows.shape
        above = self._edges.top if self._carried is None else self._carried_count
        below, right = self._edges.bottom if last else 0, self._edges.right
        shape = (above + count * self.upscale_factor + below, width * self.upscale_factor + right)
        window = self._workspace.new_empty(rows, batch, *shape, channels)
        window[:, :above] = 0 if self._carried is None else self._carried[:, :above]
        window[:, shape[0] - below :] = 0
        window[:, :, shape[1] - right :] = 0
        self._fill(window[:, above : shape[0] - below, : shape[1] - right], rows)
        return window

    def _fill(self, target: Tensor, rows: Tensor) -> None:
        if self.norm is not None:
            self.norm.write(target, rows)
        elif self.upscale_factor == 1:
            target.copy_(rows)
        else:
            squares = target.unflatten(1, (-1, self.upscale_factor)).unflatten(3, (-1, self.upscale_factor))
            squares.copy_(rows[:, :, None, :, None])


class ResidualBuffer:
    """Rows that a shortcut takes past some stages: stored where it branches off, taken where it is added.

    If the complete map is available as `source`, rows are read from it instead.
    """

    def __init__(self) -> None:
        self.source: FeatureMap | None = None

    def reset(self) -> None:
        """Discard all stored rows."""
        self._parts: deque[Tensor] = deque()
        self._remainder: Tensor | None = None  # buffer for the unread rows of a part
        self._row = 0

    def put(self, rows: Tensor) -> None:
        """Store the next rows, unless `source` has them."""
        if self.source is None:
            self._parts.append(rows)

    def take(self, count: int) -> Iterator[Tensor]:
        """Yield the next `count` rows, part by part."""
        self._row += count
        if self.source is not None:
            yield self.source.read(self._row - count, self._row)
            return
        while count:
            part = self._parts.popleft()
            if part.shape[1] > count:
                self._parts.appendleft(self._copy_remainder(part[:, count:]))
                part = part[:, :count]
            count -= part.shape[1]
            yield part

    def _copy_remainder(self, rows: Tensor) -> Tensor:
        """Return a copy of `rows`, which allows the tensor they are a view of to be freed."""
        if self._remainder is None or self._remainder.shape != rows.shape:
            self._remainder = torch.empty_like(rows)
        return self._remainder.copy_(rows)


class Add(StreamStage):
    """Adds the rows of `shortcut`, through the 1x1 convolution `layer` if there is one, and divides by `divisor`."""

    def __init__(self, shortcut: ResidualBuffer, layer: nn.Module | None = None, divisor: float = 1.0):
        self.shortcut, self.layer, self._divisor = shortcut, layer, divisor

    def reset(self, workspace: Workspace) -> None:
        """Discard the rows of the shortcut."""
        self.shortcut.reset()

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        """Add the shortcut to `rows` in place."""
        top = 0
        for part in self.shortcut.take(rows.shape[1]):
            added = part if self.layer is None else as_nhwc(self.layer(as_nchw(part)))
            rows[:, top : top + part.shape[1]] += added
            top += part.shape[1]
        return rows if self._divisor == 1 else rows.div_(self._divisor)


class Pointwise(StreamStage):
    """Applies a function of single pixels."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self._function = function

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        """Return the function's result for `rows`."""
        return self._function(rows)


def receptive_radius(stages: Sequence[StreamStage]) -> int:
    """Return how far an input row affects the output of `stages` above and below itself, in input rows."""
    radius = 0
    for stage in reversed(stages):
        radius = stage.input_radius(radius)
    return radius

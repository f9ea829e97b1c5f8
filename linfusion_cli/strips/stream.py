"""A network of convolutions as a stream: rows go in from top to bottom, and each row of each map is computed once.

What a 3x3 convolution still needs of the rows above is carried along: its last two input rows. Nothing overlaps and
nothing is blended. That holds for networks whose operations look a few rows far, and whose statistics are known.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion_cli.core.geometry import split_rows
from linfusion_cli.strips.dilation import inner, skip_row_padding
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import as_nchw, as_nhwc
from linfusion_cli.strips.stats import Moments, group_affine

ReadRows = Callable[[int, int], Tensor]  # (top, bottom) -> rows [B, bottom - top, W, C]


class StreamStage:
    """One operation of a stream. `height` rows at most are pushed at a time, divided by `enlarges`.

    `before` is the normalisation of its input, if it has one; `keeps` is what a shortcut will need of its input. A
    stage that is `pointwise` looks at no other pixels, whatever they are, and at no statistics.
    """

    enlarges = 1
    shrinks = 1
    pointwise = True
    before: FrozenNorm | None = None
    keeps: ResidualBuffer | None = None

    def begin(self, workspace: Workspace) -> None:
        """The next rows are a map's first: forget what was carried."""

    def reach(self, rows: int) -> int:
        """How many rows around an input row matter to it, where `rows` around each output row do."""
        return rows

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        """The next rows [B, n > 0, W, C] -> those [B, m, W', C'] that can be computed now; all, with the `last`."""
        raise NotImplementedError


def stream(
    stages: Sequence[StreamStage],
    read: ReadRows,
    length: int,
    height: int,
    step: int | None = None,
    workspace: Workspace | None = None,
) -> Iterator[Tensor]:
    """The `length` rows that `read` gives, through all `stages`, `height` rows at a time; read `step` at a time."""
    workspace = workspace or Workspace()
    for stage in stages:
        stage.begin(workspace)
    for top, bottom in split_rows(length, step or height):
        yield from _through(stages, read(top, bottom), bottom == length, height)


def _through(stages: Sequence[StreamStage], rows: Tensor, last: bool, height: int) -> Iterator[Tensor]:
    """`rows` through all `stages`; what has become more than `height` rows, in parts."""
    for i, stage in enumerate(stages):
        parts = rows.split(max(1, height // stage.enlarges), dim=1)
        if len(parts) > 1:
            for part in parts:
                yield from _through(stages[i:], part, last and part is parts[-1], height)
            return
        rows = stage(rows, last)
        if not rows.shape[1]:
            return
    yield rows


class Workspace:
    """Memory for what lives within one operation only: each takes it over from the one before."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, rows: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, of the dtype and on the device of `rows`."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # or both would be there for a moment
            self._memory = torch.empty(size, dtype=rows.dtype, device=rows.device)
        return self._memory[:size].view(shape)


class FrozenNorm:
    """GroupNorm with the statistics of a whole map, of which it sees a part; then an activation."""

    def __init__(self, norm: nn.GroupNorm, activation: nn.Module | None = None):
        self.norm, self._activation = norm, activation
        self._affine: tuple[Tensor, Tensor] | None = None

    def freeze(self, moments: Moments) -> None:
        """From now on the map has these moments, [1, C]."""
        self._affine = group_affine(self.norm, moments)

    def write(self, target: Tensor, rows: Tensor) -> None:
        """Write rows [B, n, W, C] into `target`, normalised and activated; computed in the statistics' dtype."""
        scale, shift = self._affine
        if target.dtype == scale.dtype:
            activate_(self._activation, torch.addcmul(shift, rows, scale, out=target))
        else:
            target.copy_(activate_(self._activation, torch.addcmul(shift, rows, scale)))


def activate_(activation: nn.Module | None, x: Tensor) -> Tensor:
    """`x` after `activation`, in its own memory where that is known to be possible."""
    if isinstance(activation, nn.SiLU):
        return F.silu(x, inplace=True)
    return x if activation is None else x.copy_(activation(x))


@dataclass(frozen=True)
class Edges:
    """The zeros around a map that the stream supplies, in rows and columns; other columns the layer pads itself."""

    top: int
    bottom: int
    right: int = 0


class Convolution(StreamStage):
    """`layer` over rows that were normalised, or doubled in both directions, before; carries rows for the next."""

    pointwise = False

    def __init__(
        self,
        layer: nn.Module,
        before: FrozenNorm | None = None,
        keeps: ResidualBuffer | None = None,
        doubled: bool = False,
        edges: Edges | None = None,
    ):
        convolution = inner(layer)
        self.layer, self.before, self.keeps = layer, before, keeps
        self.enlarges, self.shrinks = (2 if doubled else 1), convolution.stride[0]
        self.kernel, self._edges = convolution.kernel_size[0], edges or Edges(*[convolution.padding[0]] * 2)

    def begin(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._carried: Tensor | None = None  # memory for the rows carried, of which so many are valid
        self._count = 0

    def reach(self, rows: int) -> int:
        around = self.kernel // 2 if self.shrinks == 1 else self.kernel - 1  # whichever side a stride leaves out
        return -(-(rows * self.shrinks + around) // self.enlarges)

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        if self.keeps is not None:
            self.keeps.put(rows)
        window = self._window(rows, last)
        count = max(0, (window.shape[1] - self.kernel) // self.shrinks + 1)
        self._carry(window[:, count * self.shrinks :])
        if not count:
            return window[:, :0]
        with skip_row_padding(self.layer):
            return as_nhwc(self.layer(as_nchw(window)))

    def _carry(self, rows: Tensor) -> None:
        if self._carried is None:
            self._carried = rows.new_empty(rows.shape[0], self.kernel - 1, *rows.shape[2:])
        self._count = rows.shape[1]
        self._carried[:, : self._count] = rows

    def _window(self, rows: Tensor, last: bool) -> Tensor:
        """The carried rows, or the zeros above the first; the new ones, changed; and the zeros below the last."""
        batch, count, width, channels = rows.shape
        above = self._edges.top if self._carried is None else self._count
        below, right = self._edges.bottom if last else 0, self._edges.right
        shape = (above + count * self.enlarges + below, width * self.enlarges + right)
        window = self._workspace.like(rows, batch, *shape, channels)
        window[:, :above] = 0 if self._carried is None else self._carried[:, :above]
        window[:, shape[0] - below :] = 0
        window[:, :, shape[1] - right :] = 0
        self._fill(window[:, above : shape[0] - below, : shape[1] - right], rows)
        return window

    def _fill(self, target: Tensor, rows: Tensor) -> None:
        if self.before is not None:
            self.before.write(target, rows)
        elif self.enlarges == 1:
            target.copy_(rows)
        else:
            squares = target.unflatten(1, (-1, self.enlarges)).unflatten(3, (-1, self.enlarges))
            squares.copy_(rows[:, :, None, :, None])


class ResidualBuffer:
    """Rows that a shortcut leads past some stages: put in where it leaves the stream, taken where it comes back.

    Where the map is there as a whole, it is read instead (`source`).
    """

    def __init__(self) -> None:
        self.source: FeatureMap | None = None

    def begin(self) -> None:
        self._parts: deque[Tensor] = deque()
        self._left: Tensor | None = None  # memory for what a part has left for later
        self._taken = 0

    def put(self, rows: Tensor) -> None:
        if self.source is None:
            self._parts.append(rows)

    def take(self, count: int) -> Iterator[Tensor]:
        """The next `count` rows, part by part."""
        self._taken += count
        if self.source is not None:
            yield self.source.read(self._taken - count, self._taken)
            return
        while count:
            part = self._parts.popleft()
            if part.shape[1] > count:
                self._parts.appendleft(self._apart(part[:, count:]))
                part = part[:, :count]
            count -= part.shape[1]
            yield part

    def _apart(self, rows: Tensor) -> Tensor:
        """A copy of `rows`, which does not hold on to what they are a view of."""
        if self._left is None or self._left.shape != rows.shape:
            self._left = torch.empty_like(rows)
        return self._left.copy_(rows)


class Add(StreamStage):
    """Adds what was kept, through `layer` (of one pixel) if there is one, and divides by `divisor`."""

    def __init__(self, kept: ResidualBuffer, layer: nn.Module | None = None, divisor: float = 1.0):
        self.kept, self.layer, self._divisor = kept, layer, divisor

    def begin(self, workspace: Workspace) -> None:
        self.kept.begin()

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        top = 0
        for kept in self.kept.take(rows.shape[1]):
            added = kept if self.layer is None else as_nhwc(self.layer(as_nchw(kept)))
            rows[:, top : top + kept.shape[1]] += added
            top += kept.shape[1]
        return rows if self._divisor == 1 else rows.div_(self._divisor)


class Pointwise(StreamStage):
    """Any function of single pixels."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self._function = function

    def __call__(self, rows: Tensor, last: bool) -> Tensor:
        return self._function(rows)


def reach(stages: Sequence[StreamStage]) -> int:
    """How many rows beyond its own a row that goes into `stages` touches of what comes out, counted in its own map."""
    rows = 0
    for stage in reversed(stages):
        rows = stage.reach(rows)
    return rows

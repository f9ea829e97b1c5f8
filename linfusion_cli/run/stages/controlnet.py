"""ControlNets in a run: loaded once, and on the device for as long as a phase hears them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from linfusion_cli.core.geometry import split_rows
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.images.read.source import apply_orientation, source_rows
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mounted
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.run.inputs.controlnets import ControlNetSpec
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.convert import resized_reader
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.controlnet import CONTROL_ROWS, StripControlNet, WholeControlNet, embed_control_image

BEHIND = (0, 0, 0)  # transparent parts of a control picture: black is "nothing here" in edges, poses and depths


@dataclass(frozen=True)
class ControlNetRunner:
    """A ControlNet on the device, ready to run in `phase` after its picture."""

    run: RunContext
    phase: Phase
    found: ControlNetSpec
    loaded: LoadedControlNet

    def whole(self) -> WholeControlNet:
        """To run in one piece."""
        with self._image() as read:
            image = torch.cat([read(*band) for band in split_rows(self.phase.size.height, CONTROL_ROWS)])
        there = image.to(self.run.device, self.run.dtype)
        return WholeControlNet(self.loaded.net, self.found.scale, self.found.kind, there.permute(2, 0, 1)[None])

    def in_strips(self, storage: Storage) -> StripControlNet:
        """To run in strips, with maps in `storage`."""
        net, size = self.loaded.net, self.phase.size
        with self._image() as read:

            def read_there(top: int, bottom: int) -> Tensor:
                return storage.copies.to_device(read(top, bottom), self.run.dtype)[None]

            image = embed_control_image(net, read_there, size.height, size.width, storage)
        return StripControlNet(net, self.found.scale, self.found.kind, image)

    @contextmanager
    def _image(self) -> Iterator[Callable[[int, int], Tensor]]:
        """Reads rows [n, W, 3] of the picture at the phase's size, on the CPU."""
        run, image = self.run, self.found.image
        with (
            run.recorder.stage("control", "read", self.phase.size, self.phase.size.height, "rows") as stage,
            ScratchImage(run.resolved.folder, *image.stored_size.pair) as scratch,
        ):
            for rows in source_rows(image, BEHIND, run.recorder.notice):
                scratch.append(rows)
            resized = resized_reader(
                apply_orientation(scratch.read, image), image.size, run.resolved.visible_size(self.phase)
            )

            def read(top: int, bottom: int) -> Tensor:
                rows = torch.from_numpy(resized(top, bottom, 0, self.phase.size.width))
                stage.advance(bottom)
                return rows

            yield read


def load_controlnets(run: RunContext, linear: Mapping[str, LinearAttention]) -> list[LoadedControlNet]:
    """The ControlNets of the request on the CPU, each folder once; `linear` is the UNet's attention."""
    loaded: dict = {}
    for control in run.resolved.controlnets.found:
        if control.folder not in loaded:
            loaded[control.folder] = LoadedControlNet.load(control.folder, linear, run.dtype)
    return [loaded[control.folder] for control in run.resolved.controlnets.found]


@contextmanager
def activate_controlnets(
    run: RunContext, loaded: list[LoadedControlNet], phase: Phase, attention: str
) -> Iterator[list[ControlNetRunner]]:
    """The ControlNets that act in `phase`, with this attention, on the device; afterwards all are off it."""
    with ExitStack() as stack:
        controlnets = []
        acting_now = run.resolved.controlnets.in_phase(phase.index) if loaded else ()  # all of them, or none
        for found, control in zip(acting_now, loaded if acting_now else (), strict=True):
            stack.callback(control.net.to, "cpu")
            stack.enter_context(mounted(control.net, control.linear if attention == "linear" else {}))
            control.net.to(run.device)
            controlnets.append(ControlNetRunner(run, phase, found, control))
        yield controlnets

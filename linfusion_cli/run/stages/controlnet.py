"""Load the ControlNets of a run once, and keep them on the device only during the phases that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linfusion_cli.core.geometry import split_rows
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.images.read.source import apply_orientation, read_source_rows
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.models.load.controlnet import LoadedControlNet
from linfusion_cli.run.inputs.controlnets import ControlNetSpec
from linfusion_cli.run.stages.cache_keys import move_network
from linfusion_cli.run.stages.context import RunContext
from linfusion_cli.run.stages.convert import build_resized_reader
from linfusion_cli.sampling.phases import Phase
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.controlnet import CONTROL_ROWS, StripControlNet, WholeControlNet, embed_control_image

# Colour of the transparent parts of a control image: black means "nothing" in edge, pose and depth maps.
TRANSPARENT_RGB = (0, 0, 0)


@dataclass(frozen=True)
class ControlNetRunner:
    """A ControlNet on the device with its control image, for use in `phase`."""

    run: RunContext
    phase: Phase
    spec: ControlNetSpec
    loaded: LoadedControlNet

    def build_whole(self) -> WholeControlNet:
        """Return the ControlNet for a UNet that runs whole."""
        with self._open_image() as read:
            image = torch.cat([read(*band) for band in split_rows(self.phase.size.height, CONTROL_ROWS)])
        on_device = image.to(self.run.device, self.run.dtype)
        return WholeControlNet(self.loaded.net, self.spec.scale, self.spec.kind, on_device.permute(2, 0, 1)[None])

    def build_strips(self, storage: Storage) -> StripControlNet:
        """Return the ControlNet for a UNet that runs in strips, with its feature maps in `storage`."""
        net, size = self.loaded.net, self.phase.size
        with self._open_image() as read:

            def read_to_device(top: int, bottom: int) -> Tensor:
                return storage.copies.to_device(read(top, bottom), self.run.dtype)[None]

            image = embed_control_image(net, read_to_device, size.height, size.width, storage)
        return StripControlNet(net, self.spec.scale, self.spec.kind, image)

    @contextmanager
    def _open_image(self) -> Iterator[Callable[[int, int], Tensor]]:
        """Yield a function that reads rows [n, W, 3] of the control image at the size of the phase, on the CPU."""
        run, image, phase, size = self.run, self.spec.image, self.phase, self.phase.size
        with (
            run.recorder.stage("start", size, size.height, "rows", phase=phase.index, phase_name=phase.name) as stage,
            ScratchImage(run.resolved.output_folder, *image.stored_size.pair) as scratch,
        ):
            for rows in read_source_rows(image, TRANSPARENT_RGB, run.recorder.notify):
                scratch.append(rows)
            read_resized = build_resized_reader(
                apply_orientation(scratch.read, image), image.size, run.resolved.visible_size(self.phase)
            )

            def read(top: int, bottom: int) -> Tensor:
                rows = torch.from_numpy(read_resized(top, bottom, 0, self.phase.size.width))
                stage.advance(bottom)
                return rows

            yield read


def load_controlnets(run: RunContext, linear: Mapping[str, LinearAttention]) -> list[LoadedControlNet]:
    """Load the ControlNets of the request to the CPU, each folder once.

    `linear` is the linear attention of the UNet, by path.
    """
    loaded: dict[Path, LoadedControlNet] = {}
    for control in run.resolved.controlnets.specs:
        if control.folder not in loaded:
            loaded[control.folder] = LoadedControlNet.load(control.folder, linear, run.dtype)
    return [loaded[control.folder] for control in run.resolved.controlnets.specs]


@contextmanager
def activate_controlnets(
    run: RunContext, loaded: list[LoadedControlNet], phase: Phase, attention: str
) -> Iterator[list[ControlNetRunner]]:
    """Yield the ControlNets of `phase` on the device, with this kind of attention. Move them to the CPU afterwards."""
    with ExitStack() as stack:
        controlnets = []
        specs = run.resolved.controlnets.for_phase(phase.index) if loaded else ()
        for spec, control in zip(specs, loaded if specs else (), strict=True):
            stack.callback(move_network, control.net, "cpu")
            stack.enter_context(mount_modules(control.net, control.linear if attention == "linear" else {}))
            move_network(control.net, run.device)
            controlnets.append(ControlNetRunner(run, phase, spec, control))
        yield controlnets

"""Estimate the disk space that a run needs, and check that it is free. Needs no torch."""

from __future__ import annotations

import shutil

from linfusion_cli import images
from linfusion_cli.core.errors import WriteFailed
from linfusion_cli.core.units import format_bytes
from linfusion_cli.images.process.scratch import BYTES_PER_PX
from linfusion_cli.run.inputs.resolve import ResolvedRequest

# In units of the latents: the start latents once; the current latents and three tensors of the scheduler, twice.
CHECKPOINT_COPIES = 9


def check_disk_space(resolved: ResolvedRequest) -> None:
    """Raise WriteFailed if the output's disk has too little free space for the run."""
    folder, needed = resolved.output_folder, estimate_disk_bytes(resolved)
    free = shutil.disk_usage(folder).free
    if free < needed:
        size = resolved.request.size
        raise WriteFailed(
            f"{folder} has {format_bytes(free)} free; an image of {size} px needs up to {format_bytes(needed)}.",
            "Free some space, or choose another folder with -o.",
        )


def estimate_disk_bytes(resolved: ResolvedRequest) -> int:
    """Return the maximum size of all output files, the scratch image and the checkpoint."""
    request = resolved.request
    sizes = [request.size, *(resolved.saved_phase_sizes if request.save_phases else [])]
    needs = [
        images.compute_max_file_bytes(resolved.format, size.pair, request.bits, request.compression) for size in sizes
    ]
    return sum(needs) + estimate_scratch_bytes(resolved) + estimate_checkpoint_bytes(resolved)


def estimate_checkpoint_bytes(resolved: ResolvedRequest) -> int:
    """Return the maximum size of the checkpoint, while an old and a new state exist."""
    facts, size = resolved.facts, resolved.phases[-1].size
    return CHECKPOINT_COPIES * 4 * facts.latent_channels * size.divide(facts.vae_factor).area


def estimate_scratch_bytes(resolved: ResolvedRequest) -> int:
    """Return the size of the largest scratch image: between phases, of an input image, or before downscaling."""
    areas_px = [size.area for size in resolved.saved_phase_sizes]
    if resolved.source_size is not None:
        areas_px.append(resolved.source_size.area)
    areas_px.append(resolved.controlnets.max_image_px)
    return max(areas_px) * BYTES_PER_PX

"""`linfusion decode`: kept latents and options -> a picture's file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from linfusion_cli.cli.commands.generate import Asked, run
from linfusion_cli.cli.parsing import options
from linfusion_cli.cli.parsing.build_request import read_text
from linfusion_cli.core.events import Observer

Latents = Annotated[
    Path,
    typer.Argument(help="A file of --keep-latents, or the .linfusion folder that a run has left.", show_default=False),
]
Model = Annotated[str | None, typer.Option(help="The model, where it lies elsewhere now.")]


def command(
    latents: Latents,
    output: options.Output = None,
    model: Model = None,
    vae: options.Vae = None,
    vae_statistics: options.VaeStatistics = None,
    format: options.Format = None,
    compression: options.Compression = None,
    bits: options.Bits = None,
    dither: options.Dither = None,
    dpi: options.Dpi = None,
    preview: options.Preview = None,
    overwrite: options.Overwrite = None,
    prompt_metadata: options.PromptMetadata = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    download: options.Download = None,
    report: options.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    log_file: options.LogFile = None,
    time_limit: options.TimeLimit = None,
) -> None:
    """Make a file from latents that were kept: in another format, say, or with another VAE."""
    given = {
        "output": output,
        "model": model,
        "vae": vae,
        "vae_statistics": vae_statistics,
        "format": format,
        "compression": compression,
        "bits": bits,
        "dither": dither,
        "dpi": dpi,
        "preview": preview,
        "overwrite": overwrite,
        "prompt_metadata": prompt_metadata,
        "vram": None if vram is None else read_text("vram", vram),
        "ram": None if ram is None else read_text("ram", ram),
        "dtype": dtype,
        "device": device,
        "download": download,
    }
    run(partial(asked, latents, given), given, report, as_json, quiet, log_file, time_limit)


def asked(latents: Path, given: dict[str, Any], observer: Observer) -> Asked:
    """The request that made the latents, with what is `given` instead, and the job that decodes them."""
    from linfusion_cli.run.checkpoint.latents_file import open_latents
    from linfusion_cli.run.decode_latents import (
        build_decode_request,
        decode,
    )  # numpy and more: not for --help to wait for

    kept = open_latents(latents)
    return *build_decode_request(kept, given), partial(decode, kept)

"""`linfusion generate`: options -> request, run, report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linfusion_cli import presets
from linfusion_cli.cli import options, render
from linfusion_cli.errors import UsageError
from linfusion_cli.events import Notice, Observer
from linfusion_cli.models.locate import is_here
from linfusion_cli.report import RunReport
from linfusion_cli.request import GenerateRequest
from linfusion_cli.units import parse_size


def command(
    prompt: options.Prompt = None,
    size: options.Size = None,
    output: options.Output = None,
    preset: options.Preset = None,
    model: options.Model = None,
    linfusion: options.Linfusion = None,
    negative_prompt: options.NegativePrompt = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_rescale: options.GuidanceRescale = None,
    strength: options.Strength = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    format: options.Format = None,
    compression: options.Compression = None,
    dpi: options.Dpi = None,
    preview: options.Preview = None,
    overwrite: options.Overwrite = None,
    download: options.Download = None,
    prompt_metadata: options.PromptMetadata = None,
    report: options.Report = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a picture from a prompt and write it to a file."""
    arguments = dict(locals())
    given = {name: value for name, value in arguments.items() if name in GenerateRequest.__dataclass_fields__}
    given |= {"prompt": read_prompt(prompt), "size": None if size is None else parse_size(size)}
    quieten_hub(bool(download), quiet)
    from linfusion_cli.jobs.generate import generate  # numpy and more: not for --help to wait for

    with render.watching(quiet) as observer:
        settings = resolve(given, preset, os.environ, observer)
        request = presets.build_request(settings)
        check_distinct({"--output": request.output, "--preview": request.preview, "--report": report})
        with report_file(report, request.overwrite) as save:
            result = generate(request, settings.origins, observer)
            save(result)
    if not quiet:
        render.show_report(result)
    render.answer(json.dumps(result.to_json(), indent=2) if as_json else result.output)


def check_distinct(files: Mapping[str, Path | None]) -> None:
    """Raise UsageError when two options name one file."""
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is not None and (other := seen.setdefault(path.resolve(), option)) != option:
            raise UsageError(f"{option} {str(path)!r} is the file of {other}.", "Name another file.")


def quieten_hub(download: bool, quiet: bool) -> None:
    """Tell the hub's library, before it is imported, to keep off the network unless asked, and off a log's lines."""
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if quiet or not render.on_terminal():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def read_prompt(argument: str | None) -> str | None:
    """The prompt, which `-` takes from standard input; None if there was none."""
    text = read_stdin() if argument == "-" else argument
    if text is not None and not text.strip():
        raise UsageError("The prompt is empty.", "Write what to paint, or leave it out for the preset's sample prompt.")
    return text


def read_stdin() -> str:
    """All of standard input, which is UTF-8 whatever the locale says."""
    try:
        return "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError("The prompt on standard input is not valid UTF-8.", "Convert it, with iconv say.") from error


def resolve(
    given: Mapping[str, Any], preset: str | None, environ: Mapping[str, str], observer: Observer
) -> presets.Settings:
    """All settings, merged; with no preset and no model named anywhere, SDXL if it is here, else the embedded model."""
    config, config_preset = presets.config_layer(environ)
    layers = [presets.flag_layer(given), presets.environment_layer(environ), config]
    named = (preset, environ.get("LINFUSION_PRESET"), config_preset)
    name = next((name for name in named if name is not None), None)
    if name is None and not any("model" in layer.values for layer in layers):
        name = presets.SDXL if is_here(presets.preset_layer(presets.SDXL).values["model"]) else presets.DEMO
        if name == presets.DEMO:
            observer(
                Notice("SDXL with LinFusion's weights is not on this machine: the small embedded demo model paints.")
            )
    if name is not None:
        layers.append(presets.preset_layer(name))
    return presets.merge([*layers, output_layer(layers)])


def output_layer(layers: list[presets.Layer]) -> presets.Layer:
    """The output's name where none is given: it tells size and seed, and stands in the present folder."""
    values = presets.merge(layers).values
    suffix = {"png": ".png", "jpeg": ".jpg"}.get(values.get("format"), ".tif")
    name = f"linfusion-{values.get('size')}-seed{values.get('seed', 0)}{suffix}"
    return presets.Layer("default", {"output": Path(name)})


@contextmanager
def report_file(path: Path | None, overwrite: bool) -> Iterator[Callable[[RunReport], None]]:
    """Holds the report's file from the beginning, so that a path that refuses does so before hours of work."""
    from linfusion_cli.images import PendingFile

    if path is None:
        yield lambda report: None
        return
    with PendingFile(path, overwrite) as file:

        def save(report: RunReport) -> None:
            file.write(json.dumps(report.to_json(), indent=2).encode() + b"\n")
            file.commit()

        yield save

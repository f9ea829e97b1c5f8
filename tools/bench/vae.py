"""Compare streamed decoding to a PNG file with diffusers' tiled decoding and Pillow: seconds, memory, errors.

    python -m tools.bench.vae [--size 4096] [--large 16384] [--runs 3] [--sdxl 512] [--json FILE]

The latents are those of a drawn scene, encoded by the demo model's VAE. Runs alternate in separate processes; medians
are printed. Memory is the peak minus the memory of the process with the model loaded. `--large` repeats the latents to
a larger size, to measure memory and time. `--sdxl` decodes noise with a random VAE of SDXL's architecture, to measure
its numerical error. 0 skips either.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from linfusion_cli.core.geometry import Size
from linfusion_cli.hardware.host_memory import resident_bytes
from linfusion_cli.hardware.peak import PeakMemory, release_memory
from linfusion_cli.images import ImageInfo, open_sink
from linfusion_cli.images.process.quantise import quantise
from linfusion_cli.models.files.layout import Part
from linfusion_cli.models.load.networks import load_vae
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.planning.vae_strategies import STREAM_ROWS, list_patch_counts
from linfusion_cli.run.outputs.async_writer import AsyncWriter
from linfusion_cli.strips.stream import receptive_radius
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.stages import build_decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, find_last_norm
from tools.bench.shapes import SDXL_KEYS, build_sdxl_vae
from tools.demo_model.scenes.scene import draw_scene

MIB = 1 << 20
CPU = torch.device("cpu")
FACTOR, WARM_LAT, LARGE_LAT = 8, 40, 2048
DEMO_KEYS = 1024
HEIGHT = STREAM_ROWS["cpu"][0]


def load_demo_vae() -> AutoencoderKL:
    """Load the demo model's VAE in fp32 on the CPU."""
    return load_vae(Part(DEMO_FOLDER / "vae"), torch.float32, CPU)


def build_sampled_strategy(latents: Tensor) -> VaeStrategy:
    """Build the strategy that a plan uses if complete feature maps do not fit in memory: sampled statistics."""
    return VaeStrategy(0, list_patch_counts("decode", latents[0, 0].numel())[0], DEMO_KEYS, HEIGHT)


def build_exact_strategy(vae: AutoencoderKL, keys: int = DEMO_KEYS) -> VaeStrategy:
    """Build the strategy with exact statistics."""
    return VaeStrategy(find_last_norm(build_decoder_stages(vae)), 0, keys, HEIGHT)


def decode_in_strips(vae: AutoencoderKL, latents: Tensor, strategy: VaeStrategy) -> np.ndarray:
    """Decode in strips to one array [H, W, 3]."""
    return torch.cat(list(decode_rows(vae, latents, strategy))).numpy()


@torch.inference_mode()
def decode_with_diffusers(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Decode with diffusers, to [H, W, 3] between 0 and 1."""
    found = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return (found[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def make_latents(vae: AutoencoderKL, path: Path, size: int) -> dict[str, Any]:
    """Encode a drawn scene and save its latents to `path`."""
    image = torch.from_numpy(draw_scene(1, (size, size))[0]).float() / 255
    strategy = VaeStrategy(0, list_patch_counts("start", (size // FACTOR) ** 2)[0], DEMO_KEYS, HEIGHT)
    read = lambda top, bottom, left, right: image[top:bottom, left:right]  # noqa: E731
    torch.save(torch.cat(list(encode_rows(vae, read, Size(size, size), strategy)), dim=2), path)
    return {}


def write_in_strips(vae: AutoencoderKL, latents: Tensor, output: Path) -> None:
    """Decode in strips and write a PNG, as `linfusion generate` does."""
    size = (latents.shape[3] * FACTOR, latents.shape[2] * FACTOR)
    info = ImageInfo("bench", 300, {}, "", "", "")
    sink, top = open_sink(output, "png", size, 8, info, overwrite=True), 0
    with AsyncWriter(sink) as writing:
        for rows in decode_rows(vae, latents, build_sampled_strategy(latents)):
            writing.write(quantise(rows.numpy(), top, 8))
            top += len(rows)
        writing.finish()
    sink.close()


def write_in_tiles(vae: AutoencoderKL, latents: Tensor, output: Path) -> None:
    """Decode with diffusers' tiling and write with Pillow."""
    vae.enable_tiling()
    Image.fromarray(quantise(decode_with_diffusers(vae, latents), 0, 8)).save(output)


def measure_decoding(
    write: Callable[[AutoencoderKL, Tensor, Path], None], latents: Tensor, folder: Path
) -> dict[str, float]:
    """Return the seconds of decoding and writing, and the memory in addition to the loaded model."""
    vae = load_demo_vae()
    write(vae, latents[..., :WARM_LAT, :WARM_LAT], folder / "warm.png")
    release_memory(CPU)
    loaded, peak, began = resident_bytes(), PeakMemory(CPU), time.perf_counter()
    write(vae, latents, folder / "out.png")
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak.host_bytes() - loaded}


def compute_difference(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return the mean and the maximum difference and the shift of the mean colour, in units of 1/255."""
    apart = (found - true) * 255
    return {
        "mean": float(np.abs(apart).mean(dtype=np.float64)),
        "colour": float(np.abs(apart.mean(axis=(0, 1), dtype=np.float64)).max()),
        "max": float(np.abs(apart).max()),
    }


def compare_decoders(latents: Tensor) -> dict[str, Any]:
    """Return the errors of sampled statistics, strips, flat latents and diffusers' tiles."""
    vae, area = load_demo_vae(), latents[0, 0].numel()
    true, strategy = decode_in_strips(vae, latents, build_exact_strategy(vae)), build_sampled_strategy(latents)
    share = max(1, round(list_patch_counts("decode", LARGE_LAT**2)[0] * area / LARGE_LAT**2))
    found = {
        "sampled as for 16384²": decode_in_strips(vae, latents, VaeStrategy(0, share, DEMO_KEYS, HEIGHT)),
        "sampled": None,
    }
    found["sampled"] = decode_in_strips(vae, latents, strategy)
    result = {f"{name}, to exact": compute_difference(image, true) for name, image in found.items()}
    low = decode_in_strips(vae, latents[:, :, :64], VaeStrategy(0, strategy.patches, DEMO_KEYS, 3))
    tall = decode_in_strips(vae, latents[:, :, :64], VaeStrategy(0, strategy.patches, DEMO_KEYS, 1 << 20))
    result["strips of 3 rows, to one strip"] = compute_difference(low, tall)
    flat = decode_in_strips(vae, latents.mean(dim=(2, 3), keepdim=True).expand_as(latents)[..., :256, :256], strategy)
    edge = receptive_radius(build_decoder_stages(vae)) * FACTOR  # zero padding affects this margin in any decoder
    inner = flat[edge:-edge, edge:-edge]
    result["flat latents, to their mean"] = compute_difference(inner, inner.mean(axis=(0, 1), dtype=np.float64))
    vae.enable_tiling()
    return result | {"diffusers' tiles, to exact": compute_difference(decode_with_diffusers(vae, latents), true)}


def measure_sdxl_error(size: int) -> dict[str, float]:
    """Return the relative fp32 errors of streamed and plain decoding to an fp64 decode, with SDXL's architecture."""
    torch.manual_seed(0)
    vae = build_sdxl_vae().eval().to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, size // FACTOR, size // FACTOR)
    both = {
        "streamed": decode_in_strips(vae, latents, build_exact_strategy(vae, SDXL_KEYS)),
        "plain": decode_with_diffusers(vae, latents),
    }
    true = decode_with_diffusers(vae.double(), latents.double())
    return {name: float(np.abs(found - true).max() / np.abs(true).max()) for name, found in both.items()}


def measure_case(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case in this process; return its results."""
    name, folder = arguments.child, arguments.folder
    if name == "latents":
        return make_latents(load_demo_vae(), folder / "latents.pt", arguments.size)
    if name == "sdxl":
        return measure_sdxl_error(arguments.sdxl)
    latents = torch.load(folder / "latents.pt")
    if name == "fidelity":
        return compare_decoders(latents)
    times = arguments.large // arguments.size if name == "large" else 1
    return measure_decoding(
        write_in_tiles if name == "tiled" else write_in_strips, latents.repeat(1, 1, times, times), folder
    )


def run_case(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a child process; return its results."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("size", "large", "sdxl")]
    command = [sys.executable, "-m", "tools.bench.vae", "--child", name, "--folder", str(folder), *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases; return their results."""
    run_case("latents", folder, arguments)
    found: dict[str, list[dict[str, float]]] = {"streamed": [], "tiled": []}
    for _ in range(arguments.runs):
        for name, runs in found.items():
            runs.append(run_case(name, folder, arguments))
    medians = {}
    for name, runs in found.items():
        medians[name] = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
    result = {"medians": medians, "differences": run_case("fidelity", folder, arguments)}
    if arguments.large:
        medians["large"] = run_case("large", folder, arguments)
    if arguments.sdxl:
        result["sdxl"] = run_case("sdxl", folder, arguments)
    return result


def format_table(result: dict[str, Any]) -> str:
    """Return the results as two tables."""
    lines = [f"{'':34}{'seconds':>10}{'peak MiB':>10}"]
    for name, found in result["medians"].items():
        lines.append(f"{name:34}{found['seconds']:10.2f}{found['peak_bytes'] / MIB:10.0f}")
    lines.append(f"\n{'difference, in 1/255':34}{'mean':>10}{'colour':>10}{'max':>10}")
    for name, found in result["differences"].items():
        lines.append(f"{name:34}{found['mean']:10.4f}{found['colour']:10.4f}{found['max']:10.4f}")
    if "sdxl" in result:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in result["sdxl"].items())
        lines.append(f"\nSDXL's shape, relative error in fp32: {errors}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare the decoders and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side in pixels")
    parser.add_argument(
        "--large", type=int, default=16384, help="side in pixels of a larger image, for memory; 0 to skip"
    )
    parser.add_argument("--sdxl", type=int, default=512, help="side in pixels with SDXL's architecture; 0 to skip")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps(measure_case(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments)
    sys.stdout.write(format_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

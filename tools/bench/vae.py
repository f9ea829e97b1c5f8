"""Decoding latents to a file: streamed, against diffusers' tiles and Pillow; and how far each is from the whole.

    python -m tools.bench.vae [--size 4096] [--large 16384] [--runs 3] [--sdxl 512] [--json FILE]

Latents are those of a drawn scene, by the demo model's VAE. Runs are processes of their own that take turns; medians
are printed. Memory is the peak above the process with its model loaded. `--large` repeats the latents to that size, for
memory and time; `--sdxl` decodes noise of that size by a random VAE of SDXL's shape, for its error; 0 leaves one out.
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
from tools.bench.shapes import SDXL_KEYS, sdxl_vae
from tools.demo_model.scenes.scene import scene

MIB = 1 << 20
CPU = torch.device("cpu")
FACTOR, WARM_LAT, LARGE_LAT = 8, 40, 2048
DEMO_KEYS = 1024
HEIGHT = STREAM_ROWS["cpu"][0]


def demo_vae() -> AutoencoderKL:
    return load_vae(Part(DEMO_FOLDER / "vae"), torch.float32, CPU)


def sampled(latents: Tensor) -> VaeStrategy:
    """What a plan takes where whole maps have no room."""
    return VaeStrategy(0, list_patch_counts("decode", latents[0, 0].numel())[0], DEMO_KEYS, HEIGHT)


def exact(vae: AutoencoderKL, keys: int = DEMO_KEYS) -> VaeStrategy:
    return VaeStrategy(find_last_norm(build_decoder_stages(vae)), 0, keys, HEIGHT)


def whole(vae: AutoencoderKL, latents: Tensor, method: VaeStrategy) -> np.ndarray:
    return torch.cat(list(decode_rows(vae, latents, method))).numpy()


@torch.inference_mode()
def plain(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """As diffusers decodes."""
    found = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return (found[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def make_latents(vae: AutoencoderKL, path: Path, size: int) -> dict[str, Any]:
    """Encode a drawn scene into `path`."""
    image = torch.from_numpy(scene(1, (size, size))[0]).float() / 255
    method = VaeStrategy(0, list_patch_counts("encode", (size // FACTOR) ** 2)[0], DEMO_KEYS, HEIGHT)
    read = lambda top, bottom, left, right: image[top:bottom, left:right]  # noqa: E731
    torch.save(torch.cat(list(encode_rows(vae, read, Size(size, size), method)), dim=2), path)
    return {}


def streamed(vae: AutoencoderKL, latents: Tensor, output: Path) -> None:
    """Decode and write as a run does."""
    size = (latents.shape[3] * FACTOR, latents.shape[2] * FACTOR)
    info = ImageInfo("bench", 300, {}, "", "", "")
    sink, top = open_sink(output, "png", size, 8, info, overwrite=True), 0
    with AsyncWriter(sink) as writing:
        for rows in decode_rows(vae, latents, sampled(latents)):
            writing.write(quantise(rows.numpy(), top, 8))
            top += len(rows)
        writing.finish()
    sink.close()


def tiled(vae: AutoencoderKL, latents: Tensor, output: Path) -> None:
    """diffusers' tiles, then Pillow."""
    vae.enable_tiling()
    Image.fromarray(quantise(plain(vae, latents), 0, 8)).save(output)


def measured(way: Callable[[AutoencoderKL, Tensor, Path], None], latents: Tensor, folder: Path) -> dict[str, float]:
    """Seconds, and memory above the loaded model, of decoding and writing."""
    vae = demo_vae()
    way(vae, latents[..., :WARM_LAT, :WARM_LAT], folder / "warm.png")
    release_memory(CPU)
    loaded, peak, began = resident_bytes(), PeakMemory(CPU), time.perf_counter()
    way(vae, latents, folder / "out.png")
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak.host_bytes() - loaded}


def difference(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Mean and largest difference, and how far the mean colour moves, in steps of 8 bits."""
    apart = (found - true) * 255
    return {
        "mean": float(np.abs(apart).mean(dtype=np.float64)),
        "colour": float(np.abs(apart.mean(axis=(0, 1), dtype=np.float64)).max()),
        "most": float(np.abs(apart).max()),
    }


def fidelity(latents: Tensor) -> dict[str, Any]:
    """Differences from the decode with exact statistics, of samples and of tiles; of strips; of a flat picture."""
    vae, area = demo_vae(), latents[0, 0].numel()
    true, method = whole(vae, latents, exact(vae)), sampled(latents)
    share = max(1, round(list_patch_counts("decode", LARGE_LAT**2)[0] * area / LARGE_LAT**2))
    found = {"the share of 16384²": whole(vae, latents, VaeStrategy(0, share, DEMO_KEYS, HEIGHT)), "sampled": None}
    found["sampled"] = whole(vae, latents, method)
    result = {f"{name}, to exact": difference(image, true) for name, image in found.items()}
    low = whole(vae, latents[:, :, :64], VaeStrategy(0, method.patches, DEMO_KEYS, 3))
    tall = whole(vae, latents[:, :, :64], VaeStrategy(0, method.patches, DEMO_KEYS, 1 << 20))
    result["strips of 3 rows, to one piece"] = difference(low, tall)
    flat = whole(vae, latents.mean(dim=(2, 3), keepdim=True).expand_as(latents)[..., :256, :256], method)
    edge = receptive_radius(build_decoder_stages(vae)) * FACTOR  # what the zeros around the picture touch, in any decoder
    inner = flat[edge:-edge, edge:-edge]
    result["flat latents, to their mean"] = difference(inner, inner.mean(axis=(0, 1), dtype=np.float64))
    vae.enable_tiling()
    return result | {"diffusers' tiles, to exact": difference(plain(vae, latents), true)}


def sdxl_error(size: int) -> dict[str, float]:
    """Relative errors to the plain decode in fp64 of both in fp32, statistics exact, by a VAE of SDXL's shape."""
    torch.manual_seed(0)
    vae = sdxl_vae().eval().to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, size // FACTOR, size // FACTOR)
    both = {"streamed": whole(vae, latents, exact(vae, SDXL_KEYS)), "plain": plain(vae, latents)}
    true = plain(vae.double(), latents.double())
    return {name: float(np.abs(found - true).max() / np.abs(true).max()) for name, found in both.items()}


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """One case in this process -> its figures."""
    name, folder = arguments.child, arguments.folder
    if name == "latents":
        return make_latents(demo_vae(), folder / "latents.pt", arguments.size)
    if name == "sdxl":
        return sdxl_error(arguments.sdxl)
    latents = torch.load(folder / "latents.pt")
    if name == "fidelity":
        return fidelity(latents)
    times = arguments.large // arguments.size if name == "large" else 1
    return measured(tiled if name == "tiled" else streamed, latents.repeat(1, 1, times, times), folder)


def run(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{key}={getattr(arguments, key)}" for key in ("size", "large", "sdxl")]
    command = [sys.executable, "-m", "tools.bench.vae", "--child", name, "--folder", str(folder), *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases -> their figures."""
    run("latents", folder, arguments)
    found: dict[str, list[dict[str, float]]] = {"streamed": [], "tiled": []}
    for _ in range(arguments.runs):
        for name, runs in found.items():
            runs.append(run(name, folder, arguments))
    medians = {}
    for name, runs in found.items():
        medians[name] = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
    result = {"medians": medians, "differences": run("fidelity", folder, arguments)}
    if arguments.large:
        medians["large"] = run("large", folder, arguments)
    if arguments.sdxl:
        result["sdxl"] = run("sdxl", folder, arguments)
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':34}{'seconds':>10}{'peak MiB':>10}"]
    for name, found in result["medians"].items():
        lines.append(f"{name:34}{found['seconds']:10.2f}{found['peak_bytes'] / MIB:10.0f}")
    lines.append(f"\n{'difference, in 1/255':34}{'mean':>10}{'colour':>10}{'most':>10}")
    for name, found in result["differences"].items():
        lines.append(f"{name:34}{found['mean']:10.4f}{found['colour']:10.4f}{found['most']:10.4f}")
    if "sdxl" in result:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in result["sdxl"].items())
        lines.append(f"\nSDXL's shape, relative error in fp32: {errors}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="side in pixels")
    parser.add_argument("--large", type=int, default=16384, help="side of a larger one, for memory; 0 for none")
    parser.add_argument("--sdxl", type=int, default=512, help="side for SDXL's shape; 0 for none")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps(child(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments)
    sys.stdout.write(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

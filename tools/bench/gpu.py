"""Measure one forward pass of SDXL's UNet and one decode of its VAE on a CUDA GPU: seconds, memory, utilisation.

    python -m tools.bench.gpu [--sizes 4096 8192 16384] [--places device skips host] [--compile] [--plain] [--vae]
        [--json FILE]

Each case runs in a separate process, with random weights. `--plain` adds diffusers' forward pass with the same linear
attention, for sizes that fit in memory. The last column is the share of the GPU's measured FLOP rate: that of a large
matrix product for the UNet, that of a convolution for the VAE, which decodes with sampled statistics.
Without a GPU: `--device cpu --divisor 10 --sizes 256`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from linfusion_cli.core.geometry import Size
from linfusion_cli.hardware.cuda import synchronize
from linfusion_cli.hardware.device import pick_vae_dtype
from linfusion_cli.hardware.host_memory import resident_bytes
from linfusion_cli.hardware.peak import PeakMemory, release_memory
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.planning.plan import STRIP_SIZES
from linfusion_cli.planning.speed import measure_mean_seconds
from linfusion_cli.planning.vae_strategies import STREAM_ROWS, list_patch_counts
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES, Storage
from linfusion_cli.unet.estimate import ForwardSettings, estimate_unet
from linfusion_cli.unet.forward import strip_forward
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.estimate import estimate_vae
from linfusion_cli.vae.stages import build_decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy
from tools.bench.shapes import SDXL_KEYS, build_linear_attentions, build_random_inputs, build_sdxl_unet, build_sdxl_vae

GIB = 1 << 30
VAE_FACTOR = 8


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the UNet on `device`."""
    return torch.float32 if device.type == "cpu" else torch.float16


def measure_convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a convolution typical of the VAE."""
    channels, side = (64, 64) if device.type == "cpu" else (256, 1024)
    x = torch.randn(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    return 2 * layer.weight.numel() * side**2 / measure_mean_seconds(lambda: layer(x), device)


def measure_matmul_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product, the practical maximum of `device`."""
    side = 1024 if device.type == "cpu" else 8192
    x = torch.randn(side, side, device=device, dtype=pick_dtype(device))
    return 2 * side**3 / measure_mean_seconds(lambda: x @ x, device)


@torch.inference_mode()
def measure_decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode noise of one size in this process; return seconds, memory and utilisation."""
    device, side = torch.device(arguments.device), arguments.sizes[0] // VAE_FACTOR
    dtype = pick_vae_dtype("auto", device)
    torch.manual_seed(0)
    with device:
        vae = build_sdxl_vae(arguments.divisor).eval().to(dtype, memory_format=torch.channels_last)
    strategy = VaeStrategy(0, list_patch_counts("decode", side**2)[0], SDXL_KEYS, STREAM_ROWS[device.type][0])
    estimate = estimate_vae(build_decoder_stages(vae), Size(side, side), 1, 4, strategy, dtype.itemsize)
    weights = sum(parameter.numel() for parameter in vae.parameters()) * dtype.itemsize

    def forward(side: int) -> None:
        for _ in decode_rows(vae, torch.randn(1, 4, side, side), strategy):
            pass

    forward(min(side, 64))
    release_memory(device)
    peak, began = PeakMemory(device), time.perf_counter()
    forward(side)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak_bytes": peak.device_bytes() if device.type == "cuda" else peak.host_bytes(),
        "planned_bytes": estimate.peak["device"] + weights,
        "host_bytes": resident_bytes(),
        "share": estimate.flops / seconds / measure_convolution_rate(device, dtype),
    }


@torch.inference_mode()
def measure_forward(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one UNet forward pass in this process; return seconds, memory and utilisation."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with device:
        unet = build_sdxl_unet(arguments.divisor).eval().to(pick_dtype(device), memory_format=torch.channels_last)
        linear = {path: module.to(unet.dtype) for path, module in build_linear_attentions(unet).items()}
    condition, side = build_random_inputs(unet), arguments.sizes[0] // VAE_FACTOR
    size = StripSize(arguments.rows, arguments.tokens)
    run = StripContext(
        size, Storage(arguments.places[0], device, unet.dtype), SingleDevice(), compiled=arguments.compile
    )

    def forward(side: int) -> None:
        latents, timestep = torch.randn(1, 4, side, side, device=device, dtype=unet.dtype), torch.tensor(500)
        if arguments.plain:
            unet(latents, timestep, condition.text, added_cond_kwargs=condition.added)
        else:
            strip_forward(unet, run, latents, timestep, condition)
        synchronize(device)

    with mount_modules(unet, linear):
        weights = sum(parameter.numel() for parameter in unet.parameters()) * unet.dtype.itemsize
        estimate = estimate_unet(unet, ForwardSettings(size, run.storage.place, 1, side, side, unet.dtype.itemsize))
        forward(side if arguments.compile else min(side, 64))  # warm-up; code is compiled for one shape
        release_memory(device)  # the peak counts all memory that torch has reserved, used or not
        peak, began = PeakMemory(device), time.perf_counter()
        forward(side)
        seconds = time.perf_counter() - began
    measured = peak.device_bytes() if device.type == "cuda" else peak.host_bytes()
    host = resident_bytes()
    planned = estimate.peak["device"] + weights
    share = estimate.flops / seconds / measure_matmul_rate(device)
    return {"seconds": seconds, "peak_bytes": measured, "planned_bytes": planned, "host_bytes": host, "share": share}


def list_cases(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """Return (size in pixels, mode) of each case; a mode is the storage of the feature maps, "plain" or "vae"."""
    modes = [*arguments.places, *(name for name in ("plain", "vae") if getattr(arguments, name))]
    return [(size, mode) for size in arguments.sizes for mode in modes]


def run_case(size: int, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a child process; return its results or, if it failed, its error."""
    options = [f"--{mode}"] if mode in ("plain", "vae") else ["--places", mode]
    options += ["--compile"] if arguments.compile and mode not in ("plain", "vae") else []
    for name in ("device", "divisor", "rows", "tokens"):
        options += [f"--{name}", str(getattr(arguments, name))]
    command = [sys.executable, "-m", "tools.bench.gpu", "--child", "--sizes", str(size), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip().splitlines()[-1]}
    return {"size": size, "mode": mode} | found


def format_line(found: dict[str, Any]) -> str:
    """Return the table row for one case."""
    head = f"{found['size']:>7}{found['mode']:>9}"
    if "error" in found:
        return f"{head}  {found['error']}\n"
    bytes_of = [f"{found[key] / GIB:9.2f}" for key in ("peak_bytes", "planned_bytes", "host_bytes")]
    return f"{head}{found['seconds']:10.3f}{''.join(bytes_of)}{found['share']:8.1%}\n"


def main() -> None:
    """Measure all cases and print a table."""
    best = STRIP_SIZES["cuda"][2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384], help="side in pixels")
    parser.add_argument(
        "--places", nargs="+", choices=PLACES, default=list(PLACES), help="where feature maps are stored"
    )
    parser.add_argument("--plain", action="store_true", help="also measure diffusers' forward pass")
    parser.add_argument("--vae", action="store_true", help="also measure decoding")
    parser.add_argument("--compile", action="store_true", help="use torch.compile for the token blocks")
    parser.add_argument("--rows", type=int, default=best.rows)
    parser.add_argument("--tokens", type=int, default=best.tokens)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--divisor", type=int, default=1, help="divide SDXL's channels by this number")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps((measure_decode if arguments.vae else measure_forward)(arguments)))
        return
    sys.stdout.write(f"{'size':>7}{'storage':>9}{'seconds':>10}{'peak GiB':>9}{'planned':>9}{'host':>9}{'share':>8}\n")
    results = []
    for case in list_cases(arguments):
        results.append(run_case(*case, arguments))
        sys.stdout.write(format_line(results[-1]))
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""One forward of SDXL's UNet, and one decode of its VAE, with random weights on a CUDA card: memory, seconds, share.

    python -m tools.bench.gpu [--sizes 4096 8192 16384] [--places device skips host] [--compile] [--plain] [--vae]
        [--json FILE]

Each case is a process of its own. The plain forward, with the same linear attention, runs where it fits. The share is
that of the card's rate: of a large product for the UNet, of a convolution for the VAE, whose statistics are sampled.
Nothing is downloaded. Without a card: `--device cpu --divisor 10 --sizes 256`.
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
from tools.bench.shapes import SDXL_KEYS, linear_attentions, random_condition, sdxl_unet, sdxl_vae

GIB = 1 << 30
VAE_FACTOR = 8


def dtype_for(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.float16


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a convolution as most of the VAE's are."""
    channels, side = (64, 64) if device.type == "cpu" else (256, 1024)
    x = torch.randn(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    return 2 * layer.weight.numel() * side**2 / measure_mean_seconds(lambda: layer(x), device)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product: what the card can do."""
    side = 1024 if device.type == "cpu" else 8192
    x = torch.randn(side, side, device=device, dtype=dtype_for(device))
    return 2 * side**3 / measure_mean_seconds(lambda: x @ x, device)


@torch.inference_mode()
def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decoding noise of one size in this process -> its figures."""
    device, side = torch.device(arguments.device), arguments.sizes[0] // VAE_FACTOR
    dtype = pick_vae_dtype("auto", device)
    torch.manual_seed(0)
    with device:
        vae = sdxl_vae(arguments.divisor).eval().to(dtype, memory_format=torch.channels_last)
    method = VaeStrategy(0, list_patch_counts("decode", side**2)[0], SDXL_KEYS, STREAM_ROWS[device.type][0])
    ledger = estimate_vae(build_decoder_stages(vae), Size(side, side), 1, 4, method, dtype.itemsize)
    weights = sum(parameter.numel() for parameter in vae.parameters()) * dtype.itemsize

    def forward(side: int) -> None:
        for _ in decode_rows(vae, torch.randn(1, 4, side, side), method):
            pass

    forward(min(side, 64))
    release_memory(device)
    peak, began = PeakMemory(device), time.perf_counter()
    forward(side)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak_bytes": peak.device_bytes() if device.type == "cuda" else peak.host_bytes(),
        "planned_bytes": ledger.peak["device"] + weights,
        "host_bytes": resident_bytes(),
        "share": ledger.flops / seconds / convolution_rate(device, dtype),
    }


@torch.inference_mode()
def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """One case in this process -> its figures."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with device:
        unet = sdxl_unet(arguments.divisor).eval().to(dtype_for(device), memory_format=torch.channels_last)
        linear = {path: module.to(unet.dtype) for path, module in linear_attentions(unet).items()}
    condition, side = random_condition(unet), arguments.sizes[0] // VAE_FACTOR
    size = StripSize(arguments.rows, arguments.tokens)
    run = StripContext(size, Storage(arguments.places[0], device, unet.dtype), SingleDevice(), compiled=arguments.compile)

    def forward(side: int) -> None:
        latents, timestep = torch.randn(1, 4, side, side, device=device, dtype=unet.dtype), torch.tensor(500)
        if arguments.plain:
            unet(latents, timestep, condition.text, added_cond_kwargs=condition.added)
        else:
            strip_forward(unet, run, latents, timestep, condition)
        synchronize(device)

    with mount_modules(unet, linear):
        weights = sum(parameter.numel() for parameter in unet.parameters()) * unet.dtype.itemsize
        ledger = estimate_unet(unet, ForwardSettings(size, run.storage.place, 1, side, side, unet.dtype.itemsize))
        forward(side if arguments.compile else min(side, 64))  # warms up; a compiled program is one for this shape
        release_memory(device)  # of what loading and warming up left: a peak counts what torch holds, used or not
        peak, began = PeakMemory(device), time.perf_counter()
        forward(side)
        seconds = time.perf_counter() - began
    measured = peak.device_bytes() if device.type == "cuda" else peak.host_bytes()
    host = resident_bytes()
    planned = ledger.peak["device"] + weights
    share = ledger.flops / seconds / matmul_rate(device)
    return {"seconds": seconds, "peak_bytes": measured, "planned_bytes": planned, "host_bytes": host, "share": share}


def cases(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """(size in pixels, place of the maps, or "plain") of every case."""
    ways = [*arguments.places, *(name for name in ("plain", "vae") if getattr(arguments, name))]
    return [(size, way) for size in arguments.sizes for way in ways]


def measure(size: int, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own -> its figures, or the error it ended with."""
    options = [f"--{way}"] if way in ("plain", "vae") else ["--places", way]
    options += ["--compile"] if arguments.compile and way not in ("plain", "vae") else []
    for name in ("device", "divisor", "rows", "tokens"):
        options += [f"--{name}", str(getattr(arguments, name))]
    command = [sys.executable, "-m", "tools.bench.gpu", "--child", "--sizes", str(size), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip().splitlines()[-1]}
    return {"size": size, "way": way} | found


def line(found: dict[str, Any]) -> str:
    head = f"{found['size']:>7}{found['way']:>9}"
    if "error" in found:
        return f"{head}  {found['error']}\n"
    bytes_of = [f"{found[key] / GIB:9.2f}" for key in ("peak_bytes", "planned_bytes", "host_bytes")]
    return f"{head}{found['seconds']:10.3f}{''.join(bytes_of)}{found['share']:8.1%}\n"


def main() -> None:
    best = STRIP_SIZES["cuda"][2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384], help="side in pixels")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES), help="where maps wait")
    parser.add_argument("--plain", action="store_true", help="the plain forward too")
    parser.add_argument("--vae", action="store_true", help="decoding too")
    parser.add_argument("--compile", action="store_true", help="have torch compile the code that tokens go through")
    parser.add_argument("--rows", type=int, default=best.rows)
    parser.add_argument("--tokens", type=int, default=best.tokens)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--divisor", type=int, default=1, help="of SDXL's channels")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps((decode if arguments.vae else child)(arguments)))
        return
    sys.stdout.write(f"{'size':>7}{'maps on':>9}{'seconds':>10}{'peak GiB':>9}{'planned':>9}{'host':>9}{'share':>8}\n")
    results = []
    for case in cases(arguments):
        results.append(measure(*case, arguments))
        sys.stdout.write(line(results[-1]))
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

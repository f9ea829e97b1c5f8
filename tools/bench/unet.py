"""Compare the strip forward pass of an SDXL-shaped UNet with diffusers' forward pass.

    python -m tools.bench.unet [--latents 512] [--runs 5] [--rows 16] [--tokens 1024] [--json FILE]

The UNet has random weights and a fifth of SDXL's channels. Both use the same linear attention and run alternately in
separate processes; medians are printed. Memory is the peak during the forward pass minus the memory of the process with
the model loaded. Strips also run at half the side, to show how the time grows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from linfusion_cli.hardware.host_memory import resident_bytes
from linfusion_cli.hardware.peak import PeakMemory, release_memory
from linfusion_cli.hardware.versions import cpu_count
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.planning.estimate import LIBRARY_HEAP_BYTES
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.estimate import ForwardSettings, estimate_unet
from linfusion_cli.unet.forward import strip_forward
from tools.bench.shapes import build_linear_attentions, build_random_inputs, build_sdxl_unet

MIB = 1 << 20
CPU = torch.device("cpu")


@torch.inference_mode()
def measure_forward(kind: str, side: int, rows: int, tokens: int, divisor: int) -> dict[str, float]:
    """Run one forward pass after a warm-up; return its seconds and its memory in addition to the loaded model."""
    torch.manual_seed(0)
    torch.set_num_threads(cpu_count())
    unet = build_sdxl_unet(divisor).eval().to(memory_format=torch.channels_last)
    condition = build_random_inputs(unet)
    run = StripContext(StripSize(rows, tokens), Storage("device", CPU, torch.float32), SingleDevice())
    with mount_modules(unet, build_linear_attentions(unet)):

        def forward(side: int) -> None:
            latents, timestep = torch.randn(1, 4, side, side), torch.tensor(500)
            if kind == "strips":
                strip_forward(unet, run, latents, timestep, condition)
            else:
                unet(latents, timestep, condition.text, added_cond_kwargs=condition.added)

        forward(32)
        release_memory(CPU)
        loaded = resident_bytes()
        peak, began = PeakMemory(CPU), time.perf_counter()
        forward(side)
        seconds = time.perf_counter() - began
        planned = (
            estimate_unet(unet, ForwardSettings(run.size, "device", 1, side, side, 4)).peak["device"]
            + LIBRARY_HEAP_BYTES
        )
        return {"seconds": seconds, "peak_bytes": peak.host_bytes() - loaded, "planned_bytes": planned}


def run_case(kind: str, side: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one case in a child process; return its results."""
    options = ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens), "--divisor", str(arguments.divisor)]
    command = [sys.executable, "-m", "tools.bench.unet", "--child", kind, "--latents", str(side), *options]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def compute_medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each key."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases alternately; return medians and ratios."""
    cases = {"strips": ("strips", arguments.latents), "plain": ("plain", arguments.latents)}
    cases["strips at half the side"] = ("strips", arguments.latents // 2)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(arguments.runs):
        for name, case in cases.items():
            found[name].append(run_case(*case, arguments))
    result = {name: compute_medians(runs) for name, runs in found.items()}
    strips, plain, half = result.values()
    ratios = {key: strips[key] / plain[key] for key in ("seconds", "peak_bytes")}
    return {
        "settings": vars(arguments),
        "medians": result,
        "ratios": ratios,
        "growth": strips["seconds"] / half["seconds"],
    }


def format_table(result: dict[str, Any]) -> str:
    """Return the results as a table."""
    lines = [f"{'':26}{'seconds':>10}{'peak MiB':>10}{'planned':>10}"]
    for name, found in result["medians"].items():
        planned = f"{found['planned_bytes'] / MIB:10.1f}" if name.startswith("strips") else ""
        lines.append(f"{name:26}{found['seconds']:10.2f}{found['peak_bytes'] / MIB:10.1f}{planned}")
    ratios = result["ratios"]
    lines.append(f"{'strips / plain':26}{ratios['seconds']:10.3f}{ratios['peak_bytes']:10.3f}")
    lines.append(f"{'time, from half the side':26}{result['growth']:10.2f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare both forward passes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=512, help="side of the square latents")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=StripSize.rows)
    parser.add_argument("--tokens", type=int, default=StripSize.tokens)
    parser.add_argument("--divisor", type=int, default=5, help="divide SDXL's channels by this number")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", choices=("strips", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        options = (arguments.latents, arguments.rows, arguments.tokens, arguments.divisor)
        sys.stdout.write(json.dumps(measure_forward(arguments.child, *options)))
        return
    result = compare(arguments)
    sys.stdout.write(format_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()

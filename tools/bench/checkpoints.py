"""Measure the cost of saving checkpoints during a run.

    python tools/bench/checkpoints.py [--size 2048] [--runs 3] [--every 86400 60 5 0] [--folder DIR] [-- OPTIONS]

Generate the same image with each interval of `--checkpoint-every` in turn, each run in a separate process, and print
medians. The first interval, one day, is the baseline: the run then saves only at the end of each phase.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


def measure(size: str, every: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """Generate one image; return the report with the wall-clock seconds of the process added."""
    command = [sys.executable, "-m", "linfusion_cli", "generate", "--preset", "demo", "--size", size]
    command += ["-o", str(folder / f"{every}.tif"), "--checkpoint-every", every, "--json", "--quiet", "--overwrite"]
    began = time.perf_counter()
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) | {"wall_seconds": time.perf_counter() - began}


def format_line(every: str, reports: list[dict[str, Any]]) -> str:
    """Return the table row for one interval."""
    wall = statistics.median(report["wall_seconds"] for report in reports)
    saves = [report["checkpoints"] for report in reports]
    count, seconds, size = (statistics.median(save[key] for save in saves) for key in ("count", "seconds", "bytes"))
    share = statistics.median(report["checkpoints"]["seconds"] / report["total_seconds"] for report in reports)
    peak = statistics.median(report["peak_host_bytes"] for report in reports) / (1 << 20)
    return (
        f"every {every:>6} s{wall:9.1f} s{peak:8.0f} MiB{count:6.0f} saves{size / 1e6:9.1f} MB"
        f"{seconds:8.2f} s, {100 * share:.2f} %\n"
    )


def main() -> None:
    """Measure all intervals and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2048")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--every", nargs="+", default=["86400", "60", "5", "0"])
    parser.add_argument("--folder", type=Path, default=None, help="write images and checkpoints here")
    parser.add_argument("more", nargs="*", help="options passed on to generate, after --")
    arguments = parser.parse_args()
    reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for _ in range(arguments.runs):
            for every in arguments.every:
                reports[every].append(measure(arguments.size, every, Path(temporary), arguments.more))
    for every, group in reports.items():
        sys.stdout.write(format_line(every, group))


if __name__ == "__main__":
    main()

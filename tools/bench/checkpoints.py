"""Measures what saving the state costs a run, and how quickly a run goes on from there.

    python tools/bench/checkpoints.py [--size 2048] [--runs 3] [--every 86400 60 5 0] [--folder DIR] [-- OPTIONS]

The same picture with each interval of `--checkpoint-every` in turn, each run a process of its own; medians. The first
interval is what the others are compared with: a day, in which only phases' borders are saved.
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
    """One run -> its report, with the wall seconds as the shell sees them."""
    command = [sys.executable, "-m", "linfusion_cli", "generate", "--preset", "demo", "--size", size]
    command += ["-o", str(folder / f"{every}.tif"), "--checkpoint-every", every, "--json", "--quiet", "--overwrite"]
    began = time.perf_counter()
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) | {"wall_seconds": time.perf_counter() - began}


def line(every: str, reports: list[dict[str, Any]]) -> str:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2048")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--every", nargs="+", default=["86400", "60", "5", "0"])
    parser.add_argument("--folder", type=Path, default=None, help="where the pictures, and journals, are written")
    parser.add_argument("more", nargs="*", help="options of generate, after --")
    arguments = parser.parse_args()
    reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for _ in range(arguments.runs):
            for every in arguments.every:
                reports[every].append(measure(arguments.size, every, Path(temporary), arguments.more))
    for every, found in reports.items():
        sys.stdout.write(line(every, found))


if __name__ == "__main__":
    main()

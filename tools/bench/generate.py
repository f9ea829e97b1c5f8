"""Measure complete runs of `linfusion generate`: seconds by kind of stage and peak memory.

    python tools/bench/generate.py [--sizes 2048 4096 8192] [--runs 1] [--folder DIR] [-- MORE OPTIONS OF GENERATE]

Each run is a separate process; runs of different sizes alternate, and medians are printed. Peak memory is taken from
the report, which has the maximum of all stages, because `ru_maxrss` misses peaks that a stage has reset.
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

GIB = 1 << 30


def measure(size: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """Generate one image; return the report with the wall-clock seconds of the process added."""
    output = folder / f"{size}.tif"
    command = [sys.executable, "-m", "linfusion_cli", "generate", "--preset", "demo", "--size", size]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "-o", str(output), "--json", "--overwrite", *more], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) | {"wall_seconds": time.perf_counter() - began}


def seconds_by_kind(report: dict[str, Any]) -> dict[str, float]:
    """Return the total seconds of each kind of stage."""
    totals: dict[str, float] = defaultdict(float)
    for stage in report["stages"]:
        totals[stage["kind"]] += stage["seconds"]
    return dict(totals)


def format_line(size: str, reports: list[dict[str, Any]]) -> str:
    """Return the table row for one size."""
    wall = statistics.median(report["wall_seconds"] for report in reports)
    peak = statistics.median(report["peak_host_bytes"] for report in reports) / GIB
    kinds = [seconds_by_kind(report) for report in reports]
    parts = [f"{kind} {statistics.median(kind_of[kind] for kind_of in kinds):.1f}" for kind in kinds[0]]
    return f"{size:>12}{wall:9.1f} s{peak:8.2f} GiB{reports[0]['file_bytes'] / 1e6:9.1f} MB   {', '.join(parts)}\n"


def main() -> None:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["2048", "4096", "8192"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="keep the images here")
    parser.add_argument("more", nargs="*", help="options passed on to generate, after --")
    arguments = parser.parse_args()
    reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(arguments.runs):
            for size in arguments.sizes:
                reports[size].append(measure(size, arguments.folder or Path(temporary), arguments.more))
    for size, of_size in reports.items():
        sys.stdout.write(format_line(size, of_size))


if __name__ == "__main__":
    main()

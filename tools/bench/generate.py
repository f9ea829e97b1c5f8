"""Measures whole runs of `linfusion generate`: seconds and peak memory by stage, each run a process of its own.

    python tools/bench/generate.py [--sizes 2048 4096 8192] [--runs 1] [--folder DIR] [-- MORE OPTIONS OF GENERATE]

Runs of different sizes take turns; medians are printed. Peak memory is the
largest of all stages, as the report has it (`ru_maxrss` forgets peaks that a stage has reset).
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
    """One run -> its report, with the wall seconds as the shell sees them."""
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
    """Seconds by kind of stage."""
    totals: dict[str, float] = defaultdict(float)
    for stage in report["stages"]:
        totals[stage["kind"]] += stage["seconds"]
    return dict(totals)


def line(size: str, reports: list[dict[str, Any]]) -> str:
    wall = statistics.median(report["wall_seconds"] for report in reports)
    peak = statistics.median(report["peak_host_bytes"] for report in reports) / GIB
    kinds = [seconds_by_kind(report) for report in reports]
    parts = [f"{kind} {statistics.median(kind_of[kind] for kind_of in kinds):.1f}" for kind in kinds[0]]
    return f"{size:>12}{wall:9.1f} s{peak:8.2f} GiB{reports[0]['file_bytes'] / 1e6:9.1f} MB   {', '.join(parts)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["2048", "4096", "8192"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="keep the pictures here")
    parser.add_argument("more", nargs="*", help="options of generate, after --")
    arguments = parser.parse_args()
    reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(arguments.runs):
            for size in arguments.sizes:
                reports[size].append(measure(size, arguments.folder or Path(temporary), arguments.more))
    for size, of_size in reports.items():
        sys.stdout.write(line(size, of_size))


if __name__ == "__main__":
    main()

"""Measure `linfusion info --verify` on a very large image: seconds, CPU seconds, peak memory.

    python tools/bench/verify.py [--size 16384] [--runs 3] [--folder /tmp]

Each run is a separate process; formats alternate, and medians are printed. The image is the same as in `writers.py`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from writers import ROOT, WRITERS, format_table, make_texture, parse_size, read_peak_bytes

FORMATS = ("tiff", "tiff-zstd", "png", "jpeg")


def measure_verify(path: Path) -> dict[str, float]:
    """Verify one file in this process. CPU time and peak memory include the interpreter and all imports."""
    from linfusion_cli.images.verify.verify import verify_image

    begin = time.perf_counter()
    found = verify_image(path)
    wall_sec = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_sec = usage.ru_utime + usage.ru_stime
    return {
        "wall_sec": wall_sec,
        "cpu_sec": cpu_sec,
        "peak_mb": read_peak_bytes() / 1e6,
        "file_mb": found.file_bytes / 1e6,
    }


def main() -> None:
    """Measure all formats and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=(16384, 16384))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        np.save(Path(folder) / "texture.npy", make_texture(arguments.size[0]))
        for name in FORMATS:
            WRITERS[name](Path(folder), arguments.size)
            (Path(folder) / "out").rename(Path(folder) / name)
        for _ in range(arguments.runs):
            for name in FORMATS:
                command = [sys.executable, __file__, "--child", str(Path(folder) / name)]
                output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                results[name].append(json.loads(output))
    sys.stdout.write(format_table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(json.dumps(measure_verify(Path(sys.argv[2]))))
    else:
        main()

"""Measure writing a very large image in each format: seconds, CPU seconds, peak memory, bytes.

    python tools/bench/writers.py [--against] [--size 16384] [--runs 3] [--folder /tmp] [--only png tiff]

Each run is a separate process; writers alternate, and medians are printed. `rows` only produces the rows: it is the
overhead contained in all other figures. `--against` adds Pillow and tifffile, which need the complete image.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TEXTURE_ROWS = 256
WRITE_ROWS = 64
OCTAVES = ((512, 60), (128, 30), (32, 14), (8, 6), (3, 3))  # cell size in pixels, strength
GRAIN = 0.2  # with this noise deflate compresses to 0.43, as for photographs
LINFUSION_WRITERS = ("png", "tiff", "tiff-zstd", "jpeg", "preview")
OTHER_WRITERS = ("pillow-png", "tifffile-deflate")

Shape = tuple[int, int]


def make_texture(width_px: int) -> np.ndarray:
    """Return [256, W, 3] uint8 noise with the spectrum of a photograph."""
    random = np.random.default_rng(1)
    total = random.standard_normal((TEXTURE_ROWS, width_px, 3), dtype=np.float32) * GRAIN + 128
    for cell, strength in OCTAVES:
        grid = random.standard_normal((TEXTURE_ROWS // cell + 2, width_px // cell + 2, 3), dtype=np.float32) * strength
        for channel in range(3):
            plane = Image.fromarray(grid[..., channel]).resize((width_px, TEXTURE_ROWS), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane)
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def iterate_rows(folder: Path, size: Shape) -> Iterator[np.ndarray]:
    """Yield the image in blocks of 64 rows: views of the saved texture, which cost almost no time."""
    source = np.load(folder / "texture.npy")
    for row in range(0, size[1], WRITE_ROWS):
        at = row % TEXTURE_ROWS
        yield source[at : at + min(WRITE_ROWS, size[1] - row)]


def consume_rows(folder: Path, size: Shape) -> None:
    """Iterate over the rows without writing them."""
    for _ in iterate_rows(folder, size):
        pass


def build_writer(format: str, compression: str | None = None) -> Callable[[Path, Shape], None]:
    """Return a function that writes the image with linfusion's writer for `format`."""

    def run(folder: Path, size: Shape) -> None:
        from linfusion_cli.images import ImageInfo, open_sink

        info = ImageInfo("bench", 300, {"prompt": "bench"}, "bench", "", "bench")
        sink = open_sink(folder / "out", format, size, 8, info, compression)
        for part in iterate_rows(folder, size):
            sink.write(part)
        sink.close()

    return run


def write_preview(folder: Path, size: Shape) -> None:
    """Write the preview of the image."""
    from linfusion_cli.images import ImageInfo, PreviewSink

    sink = PreviewSink(folder / "out.jpg", size, 8, ImageInfo("bench", 300, {}, "", "", ""))
    for part in iterate_rows(folder, size):
        sink.write(part)
    sink.close()


def write_pillow_png(folder: Path, size: Shape) -> None:
    """Write a PNG with Pillow."""
    whole = np.concatenate(list(iterate_rows(folder, size)))
    Image.fromarray(whole).save(folder / "out", "PNG")


def write_tifffile_deflate(folder: Path, size: Shape) -> None:
    """Write a tiled, deflate-compressed TIFF with tifffile."""
    import tifffile

    def tiles() -> Iterator[np.ndarray]:
        source = list(iterate_rows(folder, size))
        for at in range(0, len(source), 512 // WRITE_ROWS):
            band = np.concatenate(source[at : at + 512 // WRITE_ROWS])
            for left in range(0, size[0], 512):
                yield band[:, left : left + 512]

    options = {"tile": (512, 512), "compression": "zlib", "compressionargs": {"level": 1}, "predictor": True}
    shape = (size[1], size[0], 3)
    tifffile.imwrite(folder / "out", tiles(), shape=shape, dtype=np.uint8, photometric="rgb", metadata=None, **options)


WRITERS: dict[str, Callable[[Path, Shape], None]] = {
    "rows": consume_rows,
    "png": build_writer("png"),
    "tiff": build_writer("tiff"),
    "tiff-zstd": build_writer("tiff", "zstd"),
    "jpeg": build_writer("jpeg"),
    "preview": write_preview,
    "pillow-png": write_pillow_png,
    "tifffile-deflate": write_tifffile_deflate,
}


def measure_writer(name: str, folder: Path, size: Shape) -> dict[str, float]:
    """Write one file in this process. CPU time and peak memory include the interpreter and all imports."""
    begin = time.perf_counter()
    WRITERS[name](folder, size)
    wall_sec = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_SELF)
    written = sum(path.stat().st_size for path in folder.glob("out*"))
    return {
        "wall_sec": wall_sec,
        "cpu_sec": usage.ru_utime + usage.ru_stime,
        "peak_mb": read_peak_bytes() / 1e6,
        "file_mb": written / 1e6,
    }


def read_peak_bytes() -> int:
    """Return the peak resident memory of this process. `ru_maxrss` would include the parent's memory at the fork."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def run_in_subprocess(name: str, texture_path: Path, size: Shape, parent: Path) -> dict[str, float]:
    """Run one writer in a child process; return its results."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        (Path(folder) / "texture.npy").hardlink_to(texture_path)
        command = [sys.executable, __file__, "--child", name, folder, f"{size[0]}x{size[1]}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output)


def format_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the medians as a table."""
    lines = [f"{'writer':18}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'file MB':>9}"]
    for name, runs in results.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"{name:18}{medians['wall_sec']:9.2f}{medians['cpu_sec']:9.2f}"
            f"{medians['peak_mb']:9.0f}{medians['file_mb']:9.0f}"
        )
    return "\n".join(lines) + "\n"


def parse_size(text: str) -> Shape:
    """Parse "W" or "WxH"."""
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def main() -> None:
    """Measure all writers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=(16384, 16384))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--against", action="store_true", help="also measure Pillow and tifffile")
    parser.add_argument("--only", nargs="+", choices=WRITERS, help="measure only these writers")
    arguments = parser.parse_args()
    names = arguments.only or ["rows", *LINFUSION_WRITERS, *(OTHER_WRITERS if arguments.against else ())]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        texture_path = Path(folder) / "texture.npy"
        np.save(texture_path, make_texture(arguments.size[0]))
        for _ in range(arguments.runs):
            for name in names:
                results[name].append(run_in_subprocess(name, texture_path, arguments.size, Path(folder)))
    sys.stdout.write(format_table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(json.dumps(measure_writer(sys.argv[2], Path(sys.argv[3]), parse_size(sys.argv[4]))))
    else:
        main()

"""Measures what writing a very large picture costs: seconds, CPU seconds, peak memory, bytes.

    python tools/bench/writers.py [--against] [--size 16384] [--runs 3] [--folder /tmp] [--only png tiff]

Each run is a process of its own; the writers take turns, and medians are printed. `rows` only makes the rows, so its
figures are what the others contain of that. `--against` adds what Pillow and tifffile do with the whole picture.
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
OCTAVES = ((512, 60), (128, 30), (32, 14), (8, 6), (3, 3))  # size in pixels and strength of the structures
GRAIN = 0.2  # with it deflate reaches the ratio that photographs have, 0.43
OURS = ("png", "tiff", "tiff-zstd", "jpeg", "preview")
OTHERS = ("pillow-png", "tifffile-deflate")

Shape = tuple[int, int]


def texture(width_px: int) -> np.ndarray:
    """`[256, W, 3]` uint8 with the spectrum of a photograph."""
    random = np.random.default_rng(1)
    total = random.standard_normal((TEXTURE_ROWS, width_px, 3), dtype=np.float32) * GRAIN + 128
    for cell, strength in OCTAVES:
        grid = random.standard_normal((TEXTURE_ROWS // cell + 2, width_px // cell + 2, 3), dtype=np.float32) * strength
        for channel in range(3):
            plane = Image.fromarray(grid[..., channel]).resize((width_px, TEXTURE_ROWS), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(plane)
    return np.clip(total, 0, 255, out=total).astype(np.uint8)


def rows(folder: Path, size: Shape) -> Iterator[np.ndarray]:
    """The picture, 64 rows at a time: views of the texture, which was made once, so that they cost nothing."""
    source = np.load(folder / "texture.npy")
    for row in range(0, size[1], WRITE_ROWS):
        at = row % TEXTURE_ROWS
        yield source[at : at + min(WRITE_ROWS, size[1] - row)]


def only_rows(folder: Path, size: Shape) -> None:
    for _ in rows(folder, size):
        pass


def ours(format: str, compression: str | None = None) -> Callable[[Path, Shape], None]:
    def run(folder: Path, size: Shape) -> None:
        from linfusion_cli.images import ImageInfo, open_sink

        info = ImageInfo("bench", 300, {"prompt": "bench"}, "bench", "", "bench")
        sink = open_sink(folder / "out", format, size, 8, info, compression)
        for part in rows(folder, size):
            sink.write(part)
        sink.close()

    return run


def preview(folder: Path, size: Shape) -> None:
    from linfusion_cli.images import ImageInfo, PreviewSink

    sink = PreviewSink(folder / "out.jpg", size, 8, ImageInfo("bench", 300, {}, "", "", ""))
    for part in rows(folder, size):
        sink.write(part)
    sink.close()


def pillow_png(folder: Path, size: Shape) -> None:
    whole = np.concatenate(list(rows(folder, size)))
    Image.fromarray(whole).save(folder / "out", "PNG")


def tifffile_deflate(folder: Path, size: Shape) -> None:
    import tifffile

    def tiles() -> Iterator[np.ndarray]:
        source = list(rows(folder, size))
        for at in range(0, len(source), 512 // WRITE_ROWS):
            band = np.concatenate(source[at : at + 512 // WRITE_ROWS])
            for left in range(0, size[0], 512):
                yield band[:, left : left + 512]

    options = {"tile": (512, 512), "compression": "zlib", "compressionargs": {"level": 1}, "predictor": True}
    shape = (size[1], size[0], 3)
    tifffile.imwrite(folder / "out", tiles(), shape=shape, dtype=np.uint8, photometric="rgb", metadata=None, **options)


WRITERS: dict[str, Callable[[Path, Shape], None]] = {
    "rows": only_rows,
    "png": ours("png"),
    "tiff": ours("tiff"),
    "tiff-zstd": ours("tiff", "zstd"),
    "jpeg": ours("jpeg"),
    "preview": preview,
    "pillow-png": pillow_png,
    "tifffile-deflate": tifffile_deflate,
}


def child(name: str, folder: Path, size: Shape) -> dict[str, float]:
    """One run in this process. CPU time and peak memory count the interpreter and the imports too."""
    begin = time.perf_counter()
    WRITERS[name](folder, size)
    wall_sec = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_SELF)
    written = sum(path.stat().st_size for path in folder.glob("out*"))
    return {
        "wall_sec": wall_sec,
        "cpu_sec": usage.ru_utime + usage.ru_stime,
        "peak_mb": peak_bytes() / 1e6,
        "file_mb": written / 1e6,
    }


def peak_bytes() -> int:
    """Peak resident memory of this program. (`ru_maxrss` would also count what the parent held when it forked.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(name: str, texture_path: Path, size: Shape, parent: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        (Path(folder) / "texture.npy").hardlink_to(texture_path)
        command = [sys.executable, __file__, "--child", name, folder, f"{size[0]}x{size[1]}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output)


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"{'writer':18}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'file MB':>9}"]
    for name, runs in results.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"{name:18}{medians['wall_sec']:9.2f}{medians['cpu_sec']:9.2f}"
            f"{medians['peak_mb']:9.0f}{medians['file_mb']:9.0f}"
        )
    return "\n".join(lines) + "\n"


def parse_size(text: str) -> Shape:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=(16384, 16384))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--against", action="store_true", help="also Pillow and tifffile")
    parser.add_argument("--only", nargs="+", choices=WRITERS, help="these writers")
    arguments = parser.parse_args()
    names = arguments.only or ["rows", *OURS, *(OTHERS if arguments.against else ())]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        texture_path = Path(folder) / "texture.npy"
        np.save(texture_path, texture(arguments.size[0]))
        for _ in range(arguments.runs):
            for name in names:
                results[name].append(measure(name, texture_path, arguments.size, Path(folder)))
    sys.stdout.write(table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(json.dumps(child(sys.argv[2], Path(sys.argv[3]), parse_size(sys.argv[4]))))
    else:
        main()

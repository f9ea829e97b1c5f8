"""Generate the images of the README and docs: `python -m tools.demo_model.evaluate.pictures`."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tools.demo_model.evaluate.sample import PROMPTS, generate_images, load_shipped_model, save_grid
from tools.demo_model.store import ROOT, WORK, start_log

DOCS = ROOT / "docs" / "images"
# seeds selected by eye among the 64 used by `measure`
README_PROMPT, README_SEED = "a sunset over the sea with a sun", 0
LARGE_PROMPT, LARGE_SEED = "a blue day over mountains with a clear sky and a sun", 19
LARGE_PX, CROP_PX = 4096, 512


def generate_image(prompt: str, seed: int, size_px: int) -> Path:
    """Generate one image with linfusion; return its path."""
    path = WORK / "pictures" / f"{size_px}-{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["generate", prompt, "--preset", "demo", "--size", str(size_px), "--seed", str(seed), "-o", str(path)]
    subprocess.run([sys.executable, "-m", "linfusion_cli", *command, "--overwrite"], check=True)
    return path


def add_crops(image: Image.Image, corners: list[tuple[int, int]]) -> Image.Image:
    """Return the reduced image next to crops at 100 % with top left `corners` (x, y); frames mark the crops."""
    side = CROP_PX * len(corners)
    whole = np.array(image.resize((side, side), Image.Resampling.LANCZOS))
    scale = side / image.width
    for x, y in corners:
        left, top, reach = int(x * scale), int(y * scale), int(CROP_PX * scale)
        whole[top : top + reach, [left, left + reach]] = 255
        whole[[top, top + reach], left : left + reach] = 255
    crops = [np.array(image.crop((x, y, x + CROP_PX, y + CROP_PX))) for x, y in corners]
    return Image.fromarray(np.concatenate([whole, np.concatenate(crops)], axis=1))


def main() -> None:
    """Write all images."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.evaluate.pictures", description=main.__doc__)
    parser.parse_args()
    start_log()
    pipe, _ = load_shipped_model()
    grid = WORK / "pictures" / "grid.png"
    save_grid(grid, generate_images(pipe, PROMPTS, range(len(PROMPTS)), None))
    Image.open(grid).save(DOCS / "demo-grid.jpg", quality=88)
    readme = Image.open(generate_image(README_PROMPT, README_SEED, 2048))
    readme.resize((1024, 1024), Image.Resampling.LANCZOS).save(DOCS / "demo.jpg", quality=88)
    Image.MAX_IMAGE_PIXELS = None
    large = Image.open(generate_image(LARGE_PROMPT, LARGE_SEED, LARGE_PX))
    corners = [(2432, 896), (3072, 1856), (640, 3200)]
    add_crops(large, corners).save(DOCS / "demo-4096.jpg", quality=85)


if __name__ == "__main__":
    main()

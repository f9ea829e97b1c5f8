"""Compare the upscalers with a plain resize: the demo model from 256² to 2048², over many seeds.

python -m tools.bench.ladder pictures [--seeds 32]    generate the images that are missing in .work/ladder
python -m tools.bench.ladder measure [--seeds 32]     print discs, SSIM to the base, detail relative to a resize
python -m tools.bench.ladder show [--seed 0]          save a comparison with crops at 100 %, for docs/images
python -m tools.bench.ladder dilated [--rounds 3]     compare --dilated-min 0.01 with 0: seconds and PSNR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import mean, median

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, label, laplace

from linfusion_cli.core.geometry import Size
from linfusion_cli.run.pipeline import generate
from linfusion_cli.settings.execution import ExecutionOptions
from linfusion_cli.settings.request import Request

WORK = Path(".work/ladder")
PROMPTS = {"sun": "a red sunset over mountains with the sun", "moon": "a starry night over mountains with a full moon"}
UPSCALERS = ("sdedit", "demofusion")
BASE_PX, SIDE_PX, CROP_PX = 256, 2048, 512
MIN_DISC_PX = 40  # minimum area in the base; smaller spots are stars and lit clouds
WINDOW_PX = 1.5  # standard deviation of SSIM's window (Wang et al., 2004)


def print_line(value: object) -> None:
    """Print `value` immediately, even to a pipe."""
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def build_path(subject: str, upscaler: str, seed: int) -> Path:
    """Return the path of one upscaled image."""
    return WORK / f"{subject}-{upscaler}-{seed:02}.png"


def generate_images(seeds: int) -> None:
    """Generate all images that do not exist yet."""
    WORK.mkdir(parents=True, exist_ok=True)
    for subject, prompt in PROMPTS.items():
        for seed in range(seeds):
            for upscaler in UPSCALERS:
                output = build_path(subject, upscaler, seed)
                if not output.exists():
                    generate(build_request(prompt, upscaler, seed, output), {})
                    print_line(output)


def build_request(prompt: str, upscaler: str, seed: int, output: Path) -> Request:
    """Build the request for one image."""
    return Request(
        prompt=prompt,
        size=Size(SIDE_PX, SIDE_PX),
        model="demo",
        steps=(24,),
        guidance_scale=(4.0,),
        upscaler=upscaler,
        seed=seed,
        save_phases=True,
        execution=ExecutionOptions(output=output, overwrite=True),
    )


def read_pixels(path: Path) -> np.ndarray:
    """Read an image as [H, W, 3] between 0 and 1."""
    return np.asarray(Image.open(path), np.float32) / 255


def build_base_path(subject: str, seed: int) -> Path:
    """Return the path of the base image, which is the same for both upscalers."""
    output = build_path(subject, "demofusion", seed)
    return output.with_name(f"{output.stem}-{BASE_PX}x{BASE_PX}.png")


def resize(image: np.ndarray, side_px: int) -> np.ndarray:
    """Enlarge or reduce to a square with Lanczos."""
    size, kind = (side_px, side_px), Image.Resampling.LANCZOS
    planes = [Image.fromarray(image[..., i]).resize(size, kind) for i in range(3)]
    return np.stack(planes, -1).clip(0, 1)


def to_grey(image: np.ndarray) -> np.ndarray:
    """Return the luma [H, W] of [H, W, 3]."""
    return image @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def count_discs(image: np.ndarray, base: np.ndarray) -> int:
    """Count suns and moons: spots brighter than median + 0.75 (maximum - median) of the base."""
    light, base_light = (gaussian_filter(to_grey(one), 2) for one in (image, base))
    threshold = np.median(base_light) + 0.75 * (base_light.max() - np.median(base_light))
    labels, _ = label(light > threshold)
    return int((np.bincount(labels.ravel())[1:] >= MIN_DISC_PX).sum())


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Return the structural similarity of two grey images in 0..1: Wang et al., IEEE TIP 13 (2004), eq. 13."""
    blur = lambda x: gaussian_filter(x.astype(np.float64), WINDOW_PX)  # noqa: E731
    means = blur(one), blur(other)
    variances = blur(one**2) - means[0] ** 2, blur(other**2) - means[1] ** 2
    covariance = blur(one * other) - means[0] * means[1]
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    return float((top / ((means[0] ** 2 + means[1] ** 2 + c1) * (variances[0] + variances[1] + c2))).mean())


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two images in 0..1."""
    return float(-10 * np.log10(max(np.square(one - other, dtype=np.float64).mean(), 1e-12)))


def compute_detail(image: np.ndarray) -> float:
    """Return the standard deviation of the Laplacian."""
    return float(laplace(to_grey(image)).std())


def measure_subject(subject: str, seed: int) -> dict[str, dict[str, float]]:
    """Return discs, SSIM to the base and detail of the resized base and of both upscaled images."""
    base = read_pixels(build_base_path(subject, seed))
    images = {"resize": resize(base, SIDE_PX)} | {
        name: read_pixels(build_path(subject, name, seed)) for name in UPSCALERS
    }
    small = {name: resize(image, BASE_PX) for name, image in images.items()}
    return {"base": {"discs": count_discs(base, base)}} | {
        name: {
            "discs": count_discs(small[name], base),
            "ssim": ssim(to_grey(small[name]), to_grey(base)),
            "detail": compute_detail(images[name]),
        }
        for name in images
    }


def print_report(seeds: int) -> None:
    """Print one line per subject and upscaler."""
    for subject in PROMPTS:
        found = [measure_subject(subject, seed) for seed in range(seeds)]
        bases = [one["base"]["discs"] for one in found]
        print_line(f"{subject}: {sum(bases)} discs in {seeds} bases")
        for name in ("resize", *UPSCALERS):
            more = [seed for seed, one in enumerate(found) if one[name]["discs"] > bases[seed]]
            fewer = sum(one[name]["discs"] < bases[seed] for seed, one in enumerate(found))
            similarity = [one[name]["ssim"] for one in found]
            gain = mean(one[name]["detail"] / one["resize"]["detail"] for one in found)
            print_line(
                f"  {name:10}  discs {sum(one[name]['discs'] for one in found)}, more than the base at seeds {more}, "
                f"fewer {fewer} times; SSIM mean {mean(similarity):.3f}, min {min(similarity):.3f}; detail {gain:.2f}"
            )


def save_comparison(subject: str, seed: int, corner: tuple[int, int], target: Path) -> None:
    """Save base, plain resize, sdedit and demofusion side by side: the complete image above, a crop at 100 % below."""
    base = read_pixels(build_base_path(subject, seed))
    columns = {"base, enlarged pixels": base.repeat(SIDE_PX // BASE_PX, 0).repeat(SIDE_PX // BASE_PX, 1)}
    columns |= {"resize (Lanczos)": resize(base, SIDE_PX)}
    columns |= {name: read_pixels(build_path(subject, name, seed)) for name in UPSCALERS}
    top, left = corner
    sheet = Image.new("RGB", (CROP_PX * len(columns), 2 * CROP_PX))
    for i, (name, image) in enumerate(columns.items()):
        overview, crop = resize(image, CROP_PX), image[top : top + CROP_PX, left : left + CROP_PX]
        for row, part in enumerate((overview, crop)):
            sheet.paste(Image.fromarray((part * 255).round().astype(np.uint8)), (i * CROP_PX, row * CROP_PX))
        ImageDraw.Draw(sheet).text((i * CROP_PX + 8, 8), name, fill="white", stroke_width=2, stroke_fill="black")
    sheet.save(target, quality=90)
    print_line(target)


@cache
def build_command(dilated_min: float, output: str) -> list[str]:
    """Build the command of a DemoFusion run."""
    options = ["generate", PROMPTS["sun"], "--preset", "demo", "--size", SIDE_PX, "--upscaler", "demofusion"]
    options += ["--dilated-min", dilated_min, "-o", output, "--overwrite", "--json", "--quiet"]
    return [sys.executable, "-m", "linfusion_cli", *map(str, options)]


def compare_dilated_min(rounds: int) -> None:
    """Compare complete runs with --dilated-min 0 and 0.01, alternating in separate processes."""
    WORK.mkdir(parents=True, exist_ok=True)
    outputs = {dilated_min: str(WORK / f"dilated-{dilated_min}.png") for dilated_min in (0.0, 0.01)}
    seconds: dict[float, list[float]] = {dilated_min: [] for dilated_min in outputs}
    for _ in range(rounds):
        for dilated_min, output in outputs.items():
            printed = subprocess.run(
                build_command(dilated_min, output), check=True, capture_output=True, text=True
            ).stdout
            stages = [stage for stage in json.loads(printed)["stages"] if stage["kind"] == "denoise"]
            seconds[dilated_min].append(sum(stage["seconds"] for stage in stages[1:]))
    always_sec, limited_sec = (median(seconds[dilated_min]) for dilated_min in outputs)
    psnr_db = psnr(*(read_pixels(Path(output)) for output in outputs.values()))
    print_line(
        f"phases above the base: {always_sec:.1f} s with 0, {limited_sec:.1f} s with 0.01; PSNR {psnr_db:.1f} dB"
    )


def main() -> None:
    """Run the command given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["pictures", "measure", "show", "dilated"])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", choices=list(PROMPTS), default="sun")
    parser.add_argument("--corner", type=int, nargs=2, default=(800, 1024), metavar=("TOP", "LEFT"))
    parser.add_argument("--output", type=Path, default=Path("docs/images/ladder.jpg"))
    arguments = parser.parse_args()
    if arguments.command == "pictures":
        generate_images(arguments.seeds)
    elif arguments.command == "measure":
        print_report(arguments.seeds)
    elif arguments.command == "show":
        save_comparison(arguments.subject, arguments.seed, tuple(arguments.corner), arguments.output)
    else:
        compare_dilated_min(arguments.rounds)


if __name__ == "__main__":
    main()

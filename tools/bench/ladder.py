"""What growing a picture gives: the demo model's ladder from 256² to 2048², over many seeds, by each upscaler.

python -m tools.bench.ladder pictures [--seeds 32]    paints them, in .work/ladder; goes on where it was stopped
python -m tools.bench.ladder measure [--seeds 32]     discs, likeness to the base, detail beyond a plain resize
python -m tools.bench.ladder show [--seed 0]          side by side, with crops at 100 %, for docs/images
python -m tools.bench.ladder dilated [--rounds 3]     --dilated-min 0.01 against 0: seconds and PSNR
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
from linfusion_cli.settings.request import GenerateRequest

WORK = Path(".work/ladder")
PROMPTS = {"sun": "a red sunset over mountains with the sun", "moon": "a starry night over mountains with a full moon"}
UPSCALERS = ("sdedit", "demofusion")
BASE_PX, SIDE_PX, CROP_PX = 256, 2048, 512
DISC_PX = 40  # of a base: smaller spots are stars and lit clouds
WINDOW_PX = 1.5  # deviation of SSIM's window (Wang et al., 2004)


def say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def path_of(subject: str, upscaler: str, seed: int) -> Path:
    return WORK / f"{subject}-{upscaler}-{seed:02}.png"


def paint(seeds: int) -> None:
    """All pictures that are not there yet."""
    WORK.mkdir(parents=True, exist_ok=True)
    for subject, prompt in PROMPTS.items():
        for seed in range(seeds):
            for upscaler in UPSCALERS:
                output = path_of(subject, upscaler, seed)
                if not output.exists():
                    generate(request(prompt, upscaler, seed, output), {})
                    say(output)


def request(prompt: str, upscaler: str, seed: int, output: Path) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        size=Size(SIDE_PX, SIDE_PX),
        output=output,
        model="demo",
        steps=(24,),
        guidance_scale=(4.0,),
        upscaler=upscaler,
        seed=seed,
        save_phases=True,
        overwrite=True,
    )


def pixels(path: Path) -> np.ndarray:
    """[H, W, 3] between 0 and 1."""
    return np.asarray(Image.open(path), np.float32) / 255


def base_of(subject: str, seed: int) -> Path:
    output = path_of(subject, "demofusion", seed)
    return output.with_name(f"{output.stem}-{BASE_PX}x{BASE_PX}.png")


def resized(image: np.ndarray, side_px: int) -> np.ndarray:
    """Lanczos, both ways."""
    size, kind = (side_px, side_px), Image.Resampling.LANCZOS
    planes = [Image.fromarray(image[..., i]).resize(size, kind) for i in range(3)]
    return np.stack(planes, -1).clip(0, 1)


def grey(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def discs(image: np.ndarray, base: np.ndarray) -> int:
    """How many suns or moons: spots brighter than three quarters of the way from the base's median to its maximum."""
    light, ruler = (gaussian_filter(grey(one), 2) for one in (image, base))
    threshold = np.median(ruler) + 0.75 * (ruler.max() - np.median(ruler))
    labels, _ = label(light > threshold)
    return int((np.bincount(labels.ravel())[1:] >= DISC_PX).sum())


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two grey pictures between 0 and 1: Wang et al., IEEE TIP 13 (2004), eq. 13."""
    blur = lambda x: gaussian_filter(x.astype(np.float64), WINDOW_PX)  # noqa: E731
    means = blur(one), blur(other)
    variances = blur(one**2) - means[0] ** 2, blur(other**2) - means[1] ** 2
    covariance = blur(one * other) - means[0] * means[1]
    small, less = 0.01**2, 0.03**2
    top = (2 * means[0] * means[1] + small) * (2 * covariance + less)
    return float((top / ((means[0] ** 2 + means[1] ** 2 + small) * (variances[0] + variances[1] + less))).mean())


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.square(one - other, dtype=np.float64).mean(), 1e-12)))


def detail(image: np.ndarray) -> float:
    """The deviation of what neighbouring pixels do not tell of each other."""
    return float(laplace(grey(image)).std())


def measured(subject: str, seed: int) -> dict[str, dict[str, float]]:
    """Of the resized base and of both upscalers' pictures: discs, likeness to the base, detail."""
    base = pixels(base_of(subject, seed))
    images = {"resize": resized(base, SIDE_PX)} | {name: pixels(path_of(subject, name, seed)) for name in UPSCALERS}
    small = {name: resized(image, BASE_PX) for name, image in images.items()}
    return {"base": {"discs": discs(base, base)}} | {
        name: {
            "discs": discs(small[name], base),
            "ssim": ssim(grey(small[name]), grey(base)),
            "detail": detail(images[name]),
        }
        for name in images
    }


def tell(seeds: int) -> None:
    """A line per subject and upscaler."""
    for subject in PROMPTS:
        found = [measured(subject, seed) for seed in range(seeds)]
        bases = [one["base"]["discs"] for one in found]
        say(f"{subject}: {sum(bases)} discs in {seeds} bases")
        for name in ("resize", *UPSCALERS):
            more = [seed for seed, one in enumerate(found) if one[name]["discs"] > bases[seed]]
            fewer = sum(one[name]["discs"] < bases[seed] for seed, one in enumerate(found))
            likeness = [one[name]["ssim"] for one in found]
            gain = mean(one[name]["detail"] / one["resize"]["detail"] for one in found)
            say(
                f"  {name:10}  discs {sum(one[name]['discs'] for one in found)}, more than the base at seeds {more}, "
                f"fewer {fewer} times; SSIM mean {mean(likeness):.3f}, least {min(likeness):.3f}; detail {gain:.2f}"
            )


def show(subject: str, seed: int, corner: tuple[int, int], target: Path) -> None:
    """Base, plain resize, sdedit and demofusion: the whole above, a crop at 100 % below."""
    base = pixels(base_of(subject, seed))
    columns = {"base, enlarged pixels": base.repeat(SIDE_PX // BASE_PX, 0).repeat(SIDE_PX // BASE_PX, 1)}
    columns |= {"resize (Lanczos)": resized(base, SIDE_PX)}
    columns |= {name: pixels(path_of(subject, name, seed)) for name in UPSCALERS}
    top, left = corner
    sheet = Image.new("RGB", (CROP_PX * len(columns), 2 * CROP_PX))
    for i, (name, image) in enumerate(columns.items()):
        whole, crop = resized(image, CROP_PX), image[top : top + CROP_PX, left : left + CROP_PX]
        for row, part in enumerate((whole, crop)):
            sheet.paste(Image.fromarray((part * 255).round().astype(np.uint8)), (i * CROP_PX, row * CROP_PX))
        ImageDraw.Draw(sheet).text((i * CROP_PX + 8, 8), name, fill="white", stroke_width=2, stroke_fill="black")
    sheet.save(target, quality=90)
    say(target)


@cache
def command(least: float, output: str) -> list[str]:
    options = ["generate", PROMPTS["sun"], "--preset", "demo", "--size", SIDE_PX, "--upscaler", "demofusion"]
    options += ["--dilated-min", least, "-o", output, "--overwrite", "--json", "--quiet"]
    return [sys.executable, "-m", "linfusion_cli", *map(str, options)]


def compare_dilated(rounds: int) -> None:
    """Whole runs in processes of their own, taking turns."""
    WORK.mkdir(parents=True, exist_ok=True)
    outputs = {least: str(WORK / f"dilated-{least}.png") for least in (0.0, 0.01)}
    seconds: dict[float, list[float]] = {least: [] for least in outputs}
    for _ in range(rounds):
        for least, output in outputs.items():
            printed = subprocess.run(command(least, output), check=True, capture_output=True, text=True).stdout
            stages = [stage for stage in json.loads(printed)["stages"] if stage["kind"] == "denoise"]
            seconds[least].append(sum(stage["seconds"] for stage in stages[1:]))
    always, some = (median(seconds[least]) for least in outputs)
    alike = psnr(*(pixels(Path(output)) for output in outputs.values()))
    say(f"phases above the base: {always:.1f} s always dilated, {some:.1f} s from 0.01 on; PSNR {alike:.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pictures", "measure", "show", "dilated"])
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", choices=list(PROMPTS), default="sun")
    parser.add_argument("--corner", type=int, nargs=2, default=(800, 1024), metavar=("TOP", "LEFT"))
    parser.add_argument("--output", type=Path, default=Path("docs/images/ladder.jpg"))
    given = parser.parse_args()
    if given.what == "pictures":
        paint(given.seeds)
    elif given.what == "measure":
        tell(given.seeds)
    elif given.what == "show":
        show(given.subject, given.seed, tuple(given.corner), given.output)
    else:
        compare_dilated(given.rounds)


if __name__ == "__main__":
    main()

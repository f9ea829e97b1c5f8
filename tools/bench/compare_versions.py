"""Check that two versions of the program create identical files and reports.

    python -m tools.bench.compare_versions OLD_TREE [NEW_TREE]

A tree is a checkout; both run with this Python. Files are compared byte by byte, reports key by key. Reports may differ
in times, measured memory and budgets, and in the keys listed in RENAMED_KEYS. Prints one line per case; the exit code
is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL = ("--size", "192", "--base-size", "128", "--steps", "4")
DEMO = ("generate", "a lake in the mountains", "--preset", "demo", *SMALL)
XL = ("generate", "a hill", "--model", "models/xl", "--linfusion", "models/linfusion", "--size", "160", "--steps", "3")
CONTROL = ("--controlnet", "models/control", "--control-image", "models/image.png", "--control-phases", "all")
IMAGE_PROMPT = ("--ip-adapter", "models/ip.safetensors", "--ip-image", "models/image.png")
IMAGE_PROMPT += ("--ip-image-encoder", "models/image_encoder")
CASES: dict[str, tuple[str, ...]] = {
    "png": (*DEMO, "-o", "png.png"),
    "tiff": (*DEMO, "-o", "tiff.tif", "--bits", "16", "--dither", "--compression", "zstd", "--seed", "3"),
    "jpeg": (*DEMO, "-o", "jpeg.jpg", "--preview", "preview.png", "--save-phases", "--upscale-space", "latent"),
    "demofusion": (*DEMO, "-o", "demofusion.png", "--upscaler", "demofusion", "--dilated-min", "0"),
    "linear": (*DEMO, "-o", "linear.png", "--attention", "linear", "--vae-statistics", "sampled"),
    "scheduler": (*DEMO, "-o", "scheduler.tif", "--scheduler", "euler-a", "--guidance-rescale", "0.5"),
    "reduced": (*DEMO[:-6], "--size", "100x80", "--steps", "2", "-o", "reduced.png"),
    "latents": (*DEMO, "-o", "latents.png", "--keep-latents", "latents.safetensors", "--vae-latents", "sample"),
    "decode": ("decode", "latents.safetensors", "-o", "decode.tif", "--bits", "16"),
    "upscale": (
        "upscale",
        "png.png",
        "--prompt",
        "a lake",
        "--preset",
        "demo",
        "--size",
        "256",
        "--steps",
        "3",
        "-o",
        "up.png",
    ),
    "lora": (*XL, "-o", "lora.png", "--lora", "models/lora.safetensors:0.7", "--clip-skip", "2"),
    "controlnet": (*XL, "-o", "controlnet.png", *CONTROL),
    "ip-adapter": (*XL, "-o", "ip.png", *IMAGE_PROMPT),
    "batch": ("batch", "jobs.jsonl", "--preset", "demo", *SMALL, "--output-dir", "batch", "--reports"),
    "plan": ("plan", "a lake", "--preset", "demo", "--size", "2048"),
    "info": ("info", "png.png", "--verify"),
}
EXTRA = {"batch": ("-q",), "plan": ("--json",), "info": ("--json",)}  # all other cases: --json -q
JOBS = '{"prompt": "a hill"}\n{"prompt": "the sea", "seed": 5, "output": "sea.tif"}\n'
# Values that depend on the machine. Planned host memory includes the memory of the process at startup.
MEASURED_KEYS = re.compile(r"seconds|per_second|peak_|host_bytes|budget_bytes|memory_bytes|checkpoints\.bytes|\btime\b")
# Parts of dotted keys that have another name in the new version; the changelog lists them.
RENAMED_KEYS = {"mode": "strategy", "need": "estimate", "waiting_bytes": "image_buffer_bytes"}


def main() -> int:
    """Compare both trees; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parents[2])
    trees = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder / "models")
        old, new = (create_outputs(tree.resolve(), folder, folder / which) for which, tree in vars(trees).items())
    differences = [difference for case in CASES for difference in compare(case, old, new)]
    sys.stdout.writelines(f"{difference}\n" for difference in differences)
    sys.stdout.write(f"{len(CASES)} cases, {len(old[1])} files, {len(differences)} differences\n")
    return 1 if differences or not old[1] else 0


def write_models(folder: Path) -> None:
    """Write a small random SDXL model with LinFusion weights, a LoRA, a ControlNet and an IP-Adapter."""
    import torch
    from safetensors.torch import save_file

    from linfusion_cli.mixers.linear.mount import find_self_attentions
    from tests.support.small_controlnets import build_small_controlnet, write_controlnet
    from tests.support.small_ip_adapters import write_adapter, write_encoder, write_image
    from tests.support.small_models import build_small_xl_unet, write_linfusion, write_small_xl

    torch.manual_seed(0)
    write_small_xl(folder / "xl")
    unet = build_small_xl_unet()
    write_linfusion(folder / "linfusion", unet)
    write_controlnet(folder / "control", build_small_controlnet(unet))
    write_encoder(folder / "image_encoder")
    write_adapter(folder / "ip.safetensors", unet)
    write_image(folder / "image.png", width=64, height=64)
    factors = {}
    for path, module in find_self_attentions(unet).items():
        width = module.to_q.in_features
        factors[f"unet.{path}.to_q.lora_A.weight"] = torch.randn(2, width)
        factors[f"unet.{path}.to_q.lora_B.weight"] = torch.randn(module.to_q.out_features, 2)
    save_file(factors, folder / "lora.safetensors")


def create_outputs(tree: Path, folder: Path, results: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run all cases with the program in `tree`; return the reports and the SHA-256 of each output file.

    Reports contain paths, so both trees use the same working folder; it is moved to `results` afterwards.
    """
    work = folder / "work"
    work.mkdir()
    (work / "models").symlink_to(folder / "models")
    (work / "jobs.jsonl").write_text(JOBS, encoding="utf-8")
    reports = {}
    for case, arguments in CASES.items():
        command = [sys.executable, "-m", "linfusion_cli", *arguments, *EXTRA.get(case, ("--json", "-q"))]
        environment = os.environ | {"PYTHONPATH": str(tree), "XDG_CONFIG_HOME": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        text = done.stdout.replace(str(tree), "TREE")
        reports[case] = {"exit": done.returncode, "report": read_report(text), "stderr": done.stderr}
        sys.stdout.write(f"{results.name:4} {case:12} exit {done.returncode} {done.stderr.strip()[-200:]}\n")
        sys.stdout.flush()
    files = {str(path.relative_to(work)): path for path in sorted(work.rglob("*")) if path.is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if is_output(name)}
    for name, path in files.items():
        if name.endswith(".json"):
            reports["batch"][name] = read_report(path.read_text(encoding="utf-8").replace(str(tree), "TREE"))
    shutil.move(work, results)
    return reports, hashes


def is_output(name: str) -> bool:
    """Return whether the file is an image or another output, rather than a model or a report."""
    return not name.startswith("models") and not name.endswith((".json", ".jsonl"))


def read_report(text: str) -> Any:
    """Parse `text` as JSON; return it unchanged if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def compare(case: str, old: tuple[dict, dict], new: tuple[dict, dict]) -> Iterator[str]:
    """Yield the differences in the reports of a case; for the first case also those between the files."""
    if case == next(iter(CASES)):
        for name in sorted({**old[1], **new[1]}):
            if old[1].get(name) != new[1].get(name):
                yield f"file {name}: {old[1].get(name)} instead of {new[1].get(name)}"
    before, now = (dict(flatten(version[0][case])) for version in (old, new))
    before = {".".join(RENAMED_KEYS.get(part, part) for part in key.split(".")): before[key] for key in before}
    if now["exit"] != 0:
        yield f"{case}: exit code {now['exit']}"
    for key in {**before, **now}:
        if not MEASURED_KEYS.search(key) and key != "stderr" and before.get(key) != now.get(key):
            yield f"{case}: {key}: {before.get(key)!r} -> {now.get(key)!r}"


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested JSON."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from flatten(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


if __name__ == "__main__":
    sys.exit(main())

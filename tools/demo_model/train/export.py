"""Stage `export`: the folder that the program loads, as diffusers lays it out, in half precision."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from linfusion_cli.mixers.linear.weights import save_weights
from tools.demo_model.store import MODEL, WORK, log
from tools.demo_model.train.distill import load_linear
from tools.demo_model.train.tokenizer import FOLDER, make_tokenizer
from tools.demo_model.train.unet import build_scheduler, load_trained
from tools.demo_model.train.vae import load_vae

LIMIT_BYTES = 16 * 1024 * 1024


def assemble() -> StableDiffusionXLPipeline:
    """The whole model in fp32."""
    tokenizer = make_tokenizer()
    unet, text = load_trained(tokenizer)
    return StableDiffusionXLPipeline(
        vae=load_vae(),
        text_encoder=text.first,
        text_encoder_2=text.second,
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def export() -> None:
    """Write beside, then rename file by file: a reader sees the old file or the new one, never a part."""
    scratch = WORK / "export"
    shutil.rmtree(scratch, ignore_errors=True)
    pipe = assemble()
    linear = load_linear(pipe.unet)
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(scratch, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(scratch / name)
        shutil.copytree(FOLDER, scratch / name)
    _forget_paths(scratch)
    _name_as_published(scratch / "text_encoder" / "model.safetensors")
    save_weights(scratch / "linfusion", linear)
    _move(scratch, MODEL)


def _forget_paths(folder: Path) -> None:
    """diffusers notes where a part was loaded from; that says nothing on another machine."""
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name_as_published(file: Path) -> None:
    """Every version of transformers reads the first encoder under `text_model.`; newer ones save it without."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def _move(source: Path, target: Path) -> None:
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if size > LIMIT_BYTES:
        raise ValueError(f"the model has {size} bytes, more than {LIMIT_BYTES}")
    for path in files:
        goal = target / path.relative_to(source)
        goal.parent.mkdir(parents=True, exist_ok=True)
        beside = goal.with_name(goal.name + ".new")
        shutil.copyfile(path, beside)  # not the mode: safetensors writes files only their owner may read
        beside.replace(goal)
    log.info("export: %d files, %.2f MB in %s", len(files), size / 1e6, target)

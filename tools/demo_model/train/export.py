"""Stage `export`: write the model in diffusers' folder layout, in half precision."""

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
from tools.demo_model.train.unet import build_scheduler, load_trained_models
from tools.demo_model.train.vae import load_vae

MAX_BYTES = 16 * 1024 * 1024


def build_pipeline() -> StableDiffusionXLPipeline:
    """Build the complete pipeline in fp32."""
    tokenizer = make_tokenizer()
    unet, text = load_trained_models(tokenizer)
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
    """Write the model to a temporary folder, then replace the installed files one by one atomically."""
    scratch = WORK / "export"
    shutil.rmtree(scratch, ignore_errors=True)
    pipe = build_pipeline()
    linear = load_linear(pipe.unet)
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(scratch, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(scratch / name)
        shutil.copytree(FOLDER, scratch / name)
    _remove_source_paths(scratch)
    _add_text_model_prefix(scratch / "text_encoder" / "model.safetensors")
    save_weights(scratch / "linfusion", linear)
    _install_files(scratch, MODEL)


def _remove_source_paths(folder: Path) -> None:
    """Remove the local paths that diffusers records in config files."""
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _add_text_model_prefix(file: Path) -> None:
    """Add the `text_model.` prefix, which new versions of transformers omit and old versions require."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def _install_files(source: Path, target: Path) -> None:
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if size > MAX_BYTES:
        raise ValueError(f"The model has {size} bytes; the limit is {MAX_BYTES}.")
    for path in files:
        target_file = target / path.relative_to(source)
        target_file.parent.mkdir(parents=True, exist_ok=True)
        scratch = target_file.with_name(target_file.name + ".new")
        shutil.copyfile(path, scratch)  # without the mode: safetensors creates files readable only by their owner
        scratch.replace(target_file)
    log.info("export: %d files, %.2f MB in %s", len(files), size / 1e6, target)

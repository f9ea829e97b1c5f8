"""Write SDXL in the layout of its published repository: real configs, and weights files without data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPVisionConfig

from linfusion_cli.mixers.linear.weights import build_spec
from linfusion_cli.models.families.facts import read_config
from linfusion_cli.models.locate.published import get_configs
from tests.support.small_models import build_scheduler_config, write_small_tokenizer
from tools.bench.shapes import build_linear_attentions, build_sdxl_unet, build_sdxl_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_RANK, LORA_LAYERS = 4, 24
TOKENS = {"vocab_size": 49408, "bos_token_id": 512, "eos_token_id": 513}  # of the small tokenizer
TEXT = ("text_encoder", "text_encoder_2")
VISION = {  # OpenCLIP ViT-bigG/14, the image encoder of SDXL's plain IP-Adapter
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1280,
}


def write_sdxl(folder: Path) -> Path:
    """Write the model with LinFusion weights, a LoRA, a ControlNet, an IP-Adapter and an image."""
    with torch.device("meta"):
        unet, vae = build_sdxl_unet(), build_sdxl_vae()
        linear = build_linear_attentions(unet)
        net = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    for part, network in (("unet", unet), ("vae", vae), ("controlnet", net)):
        write_part(folder / part, dict(network.config) | {"_class_name": type(network).__name__})
    for part in TEXT:
        config = read_config(get_configs("sdxl") / part / "config.json")
        write_part(folder / part, CLIPTextConfig(**config | TOKENS).to_dict(), "model.safetensors")
        write_small_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
    write_json(folder / "scheduler" / "scheduler_config.json", build_scheduler_config())
    names = {part: ["diffusers", ""] for part in ("unet", "vae", *TEXT, "tokenizer", "tokenizer_2", "scheduler")}
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    write_json(folder / "model_index.json", index | names)
    modules = [build_spec(path, module).__dict__ for path, module in linear.items()]
    write_part(folder / "linfusion", {"_class_name": "LinFusion", "modules_list": modules})
    write_part(folder / "adapter" / "image_encoder", CLIPVisionConfig(**VISION).to_dict(), "model.safetensors")
    write_shapes(folder / "adapter" / "ip.safetensors", adapter_shapes(unet))
    write_lora(folder / "lora.safetensors", unet)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "image.png")
    return folder


def write_part(folder: Path, config: Mapping[str, object], weights: str = WEIGHTS) -> None:
    write_json(folder / "config.json", {name: value for name, value in config.items() if value is not None})
    write_shapes(folder / weights, {})


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, default=str))


def write_shapes(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a sparse safetensors file with fp16 tensors of these shapes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    end, entries = 0, {}
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("r+b") as sparse_file:
        sparse_file.truncate(8 + len(header) + end)


def adapter_shapes(unet: UNet2DConditionModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the published ip-adapter_sdxl.safetensors."""
    width = unet.config.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {
        "image_proj.proj.weight": (4 * width, VISION["projection_dim"]),
        "image_proj.proj.bias": (4 * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(names):
        channels = unet.get_submodule(name).to_k.out_features
        shapes |= {f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight": (channels, width) for side in "kv"}
    return shapes


def write_lora(file: Path, unet: UNet2DConditionModel) -> None:
    """Write a LoRA for some of the attention layers."""
    layers = {path: layer for path, layer in unet.named_modules() if path.endswith((".to_q", ".to_out.0"))}
    tensors = {}
    for path, layer in list(layers.items())[:LORA_LAYERS]:
        tensors[f"unet.{path}.lora_A.weight"] = torch.zeros(LORA_RANK, layer.in_features)
        tensors[f"unet.{path}.lora_B.weight"] = torch.zeros(layer.out_features, LORA_RANK)
    save_file(tensors, file)

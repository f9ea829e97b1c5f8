"""Whether a model can be used: every header read, every shape compared, every number looked at."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.core.fs import expand_home, is_file, is_folder
from linfusion_cli.mixers.linear import weights
from linfusion_cli.models.adapters.lora_file import read_lora
from linfusion_cli.models.adapters.textual_inversion import is_inversion, read_inversion
from linfusion_cli.models.families.facts import FAMILY_NAMES, read_config, read_facts
from linfusion_cli.models.files.header import INTEGER_BUFFERS, Header, read_header
from linfusion_cli.models.files.hub import find_snapshot
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.load.networks import (
    DOWNLOAD_AGAIN,
    find_mismatch,
    load_meta,
    read_matching_state,
    read_vae_class,
    read_weights_headers,
    strip_text_model_prefix,
)
from linfusion_cli.models.load.single_file import find_converter
from linfusion_cli.models.locate.controlnet import UNION_CLASSES
from linfusion_cli.models.locate.files import MODEL_KIND, find_file, find_lora, is_hub_file, is_lora
from linfusion_cli.models.locate.ip_adapter import ENCODER_WIDTH_FIELDS, read_adapter
from linfusion_cli.models.locate.model import DEMO, LAYOUT_HINT, check_weights_suffix, find_linfusion, find_model
from linfusion_cli.models.text.tokens import load_tokenizer

SINGLE_NETWORKS = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, ControlNetModel)}
SINGLE_NETWORKS |= dict.fromkeys(UNION_CLASSES, ControlNetUnionModel)
LINFUSION = "LinFusion"
FIT_UNKNOWN = "Whether it fits a model shows where it is used with one."


@dataclass(frozen=True)
class PartSummary:
    """One part of a model as it was found: its files, and how many tensors of which type are in them."""

    name: str
    files: list[Path]
    bytes: int
    tensors: int
    types: str


@dataclass(frozen=True)
class CheckResult:
    """What something turned out to be, in words, its parts, and what else a person should know of it."""

    what: str
    parts: list[PartSummary]
    remarks: list[str]


def check(name: str) -> CheckResult:
    """What --model, --vae, --lora, --controlnet or --ip-adapter `name` is.

    Raises Unavailable where it is not here, and DataError naming the first thing that is wrong with it.
    """
    path = find_file(MODEL_KIND, name, download=False).path if is_hub_file(name) else expand_home(name)
    check_weights_suffix("", path)
    if is_file(path):
        return check_file(str(path), read_header(path))
    folder = path if is_folder(path) or name == DEMO else find_snapshot(name, "")
    if folder is not None and not is_file(folder / "model_index.json"):
        if is_file(folder / "config.json"):
            return check_single_network(folder)
        if any(is_lora(read_header(file)) for file in folder.glob("*.safetensors")):
            return check_lora(read_header(find_lora(name)))
    return check_model(find_model(name))


def check_file(name: str, header: Header) -> CheckResult:
    """A single file: a whole model, or one of the things that come beside one, whose shapes that decides."""
    check_file_finite(header)
    if is_lora(header):
        return check_lora(header)
    if any(key.startswith("ip_adapter.") for key in header.shapes):
        needs = ENCODER_WIDTH_FIELDS[read_adapter(header.file).kind]
        return CheckResult(
            f"IP-Adapter, which takes an image encoder's {needs}", [summarize_part("ip_adapter", [header])], []
        )
    if is_inversion(header):
        vectors = read_inversion(header.file).vectors
        words = ", ".join(f"{len(values)} for the {part}" for part, values in vectors.items())
        return CheckResult(f"textual inversion, vectors: {words}", [summarize_part("textual_inversion", [header])], [])
    if any(key.startswith("control_model.") for key in header.shapes):
        raise DataError(f"{header.file} is a ControlNet in one file.", "Use its folder in diffusers' layout.")
    if any(key.startswith("decoder.") for key in header.shapes):
        return CheckResult("VAE, whose shapes the model beside it decides", [summarize_part("vae", [header])], [])
    return check_model(find_model(name))


def check_lora(header: Header) -> CheckResult:
    """A LoRA's file, without a model to fit."""
    counts = {part: len(read_lora(header.file, part).layers) for part in ("unet", "text_encoder", "text_encoder_2")}
    layers = ", ".join(f"{count} in the {part}" for part, count in counts.items() if count)
    return CheckResult(f"LoRA (layers: {layers})", [summarize_part("lora", [header])], [FIT_UNKNOWN])


def check_single_network(folder: Path) -> CheckResult:
    """A folder with one network in it."""
    name = read_config(folder / "config.json").get("_class_name")
    if name == LINFUSION:
        header = read_header(folder / weights.WEIGHTS_NAME)
        check_file_finite(header)
        layers = len(weights.read_specs(folder / weights.CONFIG_NAME))
        return CheckResult(f"LinFusion's weights for {layers} layers", [summarize_part("linfusion", [header])], [])
    if name not in SINGLE_NETWORKS:
        raise DataError(f"{folder} holds a {name}, which is nothing that can be used.", LAYOUT_HINT)
    return CheckResult(name, [check_part(name, SINGLE_NETWORKS[name], Part(folder))], [])


def check_model(model: Model) -> CheckResult:
    """A whole model, with LinFusion's weights for it where they are here."""
    facts = read_facts(model)
    kinds: dict[str, type[nn.Module]] = {"unet": UNet2DConditionModel, "vae": read_vae_class(model.get_part("vae"))}
    kinds |= {"text_encoder": CLIPTextModel}
    kinds |= {"text_encoder_2": CLIPTextModelWithProjection} if facts.is_xl else {}
    parts = [check_part(name, kind, model.get_part(name)) for name, kind in kinds.items()]
    for suffix in ("", "_2") if facts.is_xl else ("",):
        kind = kinds[f"text_encoder{suffix}"]
        load_tokenizer(
            model.folder / f"tokenizer{suffix}", load_meta(kind, model.get_part(f"text_encoder{suffix}")).config
        )
    predicts = facts.prediction_type or "what a probe will tell"
    what = f"{FAMILY_NAMES[facts.family]} family, {facts.native_px} px, predicts {predicts}"
    return CheckResult(what, parts, [*facts.warnings, describe_linfusion(model, facts.family)])


def describe_linfusion(model: Model, family: str) -> str:
    """Whether LinFusion's weights for the model are here, and fit."""
    try:
        folder = find_linfusion("auto", model, family)
    except Unavailable as error:
        return f"LinFusion: {error}"
    unet = load_meta(UNet2DConditionModel, model.get_part("unet"))
    modules = weights.load_weights(folder, unet, torch.float32)
    return f"LinFusion: {folder} fits, {len(modules)} layers"


def check_part(name: str, kind: type[nn.Module], part: Part) -> PartSummary:
    """One part: all tensors of its network are there, with its shapes, of floats that are numbers."""
    headers, module = read_weights_headers(part), load_meta(kind, part)
    if part.file is not None:  # whose numbers were looked at before, once for all its parts
        read_matching_state(module, headers[0], on_meta=True)
        return summarize_part(name, headers, find_converter(headers[0], kind)[0])
    given = {strip_text_model_prefix(name): shape for header in headers for name, shape in header.shapes.items()}
    if found := find_mismatch(module, given):
        reason = "The weights in {} do not fit its config.json: {} is {} in the files and {} by its config."
        raise DataError(reason.format(part, *found), DOWNLOAD_AGAIN)
    for header in headers:
        check_file_finite(header)
    return summarize_part(name, headers)


def check_file_finite(header: Header) -> None:
    """Raise DataError naming the first tensor of a file that is not all finite numbers."""
    with safe_open(header.file, framework="pt") as opened:
        for name in header.shapes:
            if not name.endswith(INTEGER_BUFFERS) and not opened.get_tensor(name).sum(dtype=torch.float32).isfinite():
                raise DataError(f"{header.file} is damaged: {name} is not all finite numbers.", DOWNLOAD_AGAIN)


def summarize_part(name: str, headers: list[Header], prefix: str = "") -> PartSummary:
    """What the files of a part hold, of a file with several parts those tensors whose names begin with `prefix`."""
    found = [(header, key) for header in headers for key in header.shapes if key.startswith(prefix)]
    types = Counter(header.dtypes[key] for header, key in found)
    size = sum(math.prod(header.shapes[key]) * get_item_bytes(header.dtypes[key]) for header, key in found)
    kinds = ", ".join(kind for kind, _ in types.most_common())
    return PartSummary(name, [header.file for header in headers], size, types.total(), kinds)


def get_item_bytes(kind: str) -> int:
    """The bytes of one number of a type, as headers name them: BF16, I64, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1

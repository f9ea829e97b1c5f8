"""Check whether a model or adapter is usable: read all headers, compare all shapes, look for NaN and Inf."""

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
LINFUSION_CLASS = "LinFusion"
FIT_UNKNOWN = "Whether it fits a model is checked when it is used."


@dataclass(frozen=True)
class PartSummary:
    """A network or adapter with its files, size in bytes, number of tensors, and dtypes by frequency."""

    name: str
    files: list[Path]
    bytes: int
    tensors: int
    types: str


@dataclass(frozen=True)
class CheckResult:
    """Result of a check: a description, the parts, and remarks for the user."""

    what: str
    parts: list[PartSummary]
    remarks: list[str]


def check(name: str) -> CheckResult:
    """Check `name`, a value of --model, --vae, --lora, --controlnet or --ip-adapter.

    Raise Unavailable if it is not on this machine, and DataError for the first problem.
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
    """Check a single file: a model, an adapter or a VAE; the shapes of the latter two depend on the model."""
    check_file_finite(header)
    if is_lora(header):
        return check_lora(header)
    if any(key.startswith("ip_adapter.") for key in header.shapes):
        field = ENCODER_WIDTH_FIELDS[read_adapter(header.file).kind]
        return CheckResult(
            f"IP-Adapter for the {field} of an image encoder", [summarize_part("ip_adapter", [header])], []
        )
    if is_inversion(header):
        vectors = read_inversion(header.file).vectors
        counts = ", ".join(f"{len(values)} for the {part}" for part, values in vectors.items())
        return CheckResult(f"textual inversion, vectors: {counts}", [summarize_part("textual_inversion", [header])], [])
    if any(key.startswith("control_model.") for key in header.shapes):
        raise DataError(f"{header.file} is a single-file ControlNet.", "Use a folder in diffusers' layout.")
    if any(key.startswith("decoder.") for key in header.shapes):
        return CheckResult("VAE (shapes are checked with a model)", [summarize_part("vae", [header])], [])
    return check_model(find_model(name))


def check_lora(header: Header) -> CheckResult:
    """Check a LoRA without a model."""
    counts = {part: len(read_lora(header.file, part).layers) for part in ("unet", "text_encoder", "text_encoder_2")}
    layers = ", ".join(f"{count} in the {part}" for part, count in counts.items() if count)
    return CheckResult(f"LoRA (layers: {layers})", [summarize_part("lora", [header])], [FIT_UNKNOWN])


def check_single_network(folder: Path) -> CheckResult:
    """Check a folder with a single network."""
    name = str(read_config(folder / "config.json").get("_class_name"))
    if name == LINFUSION_CLASS:
        header = read_header(folder / weights.WEIGHTS_NAME)
        check_file_finite(header)
        layers = len(weights.read_specs(folder / weights.CONFIG_NAME))
        return CheckResult(f"LinFusion weights for {layers} layers", [summarize_part("linfusion", [header])], [])
    if name not in SINGLE_NETWORKS:
        raise DataError(f"{folder} has the unsupported class {name}.", LAYOUT_HINT)
    return CheckResult(name, [check_part(name, SINGLE_NETWORKS[name], Part(folder))], [])


def check_model(model: Model) -> CheckResult:
    """Check a complete model, and its LinFusion weights if they are on this machine."""
    facts = read_facts(model)
    encoders: dict[str, type[CLIPTextModel | CLIPTextModelWithProjection]] = {"text_encoder": CLIPTextModel}
    if facts.is_xl:
        encoders["text_encoder_2"] = CLIPTextModelWithProjection
    kinds: dict[str, type[nn.Module]] = {"unet": UNet2DConditionModel, "vae": read_vae_class(model.get_part("vae"))}
    parts = [check_part(name, kind, model.get_part(name)) for name, kind in (kinds | encoders).items()]
    for name, kind in encoders.items():
        tokenizer = model.folder / name.replace("text_encoder", "tokenizer")
        load_tokenizer(tokenizer, load_meta(kind, model.get_part(name)).config)
    prediction = facts.prediction_type or "a type that a probe detects at the start of a run"
    what = f"{FAMILY_NAMES[facts.family]} family, {facts.native_px} px, predicts {prediction}"
    return CheckResult(what, parts, [*facts.warnings, describe_linfusion(model, facts.family)])


def describe_linfusion(model: Model, family: str) -> str:
    """Return a remark: whether the LinFusion weights for the model are on this machine, and fit."""
    try:
        folder = find_linfusion("auto", model, family)
    except Unavailable as error:
        return f"LinFusion: {error}"
    unet = load_meta(UNet2DConditionModel, model.get_part("unet"))
    assert folder is not None  # only `none` has no folder
    modules = weights.load_weights(folder, unet, torch.float32)
    return f"LinFusion: {folder} fits, {len(modules)} layers"


def check_part(name: str, kind: type[nn.Module], part: Part) -> PartSummary:
    """Check that all tensors of a network exist, have the right shapes and dtypes, and are finite."""
    headers, module = read_weights_headers(part), load_meta(kind, part)
    if part.file is not None:  # `check_file` has already checked all values
        read_matching_state(module, headers[0], on_meta=True)
        return summarize_part(name, headers, find_converter(headers[0], kind)[0])
    shapes = {strip_text_model_prefix(name): shape for header in headers for name, shape in header.shapes.items()}
    if mismatch := find_mismatch(module, shapes):
        reason = "The weights in {} do not fit its config.json: {} is {} in the files, but {} by the config."
        raise DataError(reason.format(part, *mismatch), DOWNLOAD_AGAIN)
    for header in headers:
        check_file_finite(header)
    return summarize_part(name, headers)


def check_file_finite(header: Header) -> None:
    """Raise DataError for the first tensor of a file with NaN or Inf."""
    with safe_open(header.file, framework="pt") as opened:
        for name in header.shapes:
            if not name.endswith(INTEGER_BUFFERS) and not opened.get_tensor(name).sum(dtype=torch.float32).isfinite():
                raise DataError(f"{header.file} is damaged: {name} contains NaN or Inf.", DOWNLOAD_AGAIN)


def summarize_part(name: str, headers: list[Header], prefix: str = "") -> PartSummary:
    """Summarize the tensors in the files of a part; `prefix` selects the tensors in a file with several parts."""
    tensors = [(header, key) for header in headers for key in header.shapes if key.startswith(prefix)]
    types = Counter(header.dtypes[key] for header, key in tensors)
    size = sum(math.prod(header.shapes[key]) * get_item_bytes(header.dtypes[key]) for header, key in tensors)
    kinds = ", ".join(kind for kind, _ in types.most_common())
    return PartSummary(name, [header.file for header in headers], size, types.total(), kinds)


def get_item_bytes(kind: str) -> int:
    """Return the bytes per element of a dtype name in headers, e.g. BF16, I64, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1

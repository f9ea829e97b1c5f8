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
from linfusion_cli.core.units import is_file, is_folder, user_path
from linfusion_cli.mixers.linear import weights
from linfusion_cli.models.adapters.lora_file import read_lora
from linfusion_cli.models.adapters.textual_inversion import is_inversion, read_inversion
from linfusion_cli.models.families.facts import FAMILY_NAMES, read_config, read_facts
from linfusion_cli.models.files.header import COUNTERS, Header, read_header
from linfusion_cli.models.files.hub import cached
from linfusion_cli.models.files.parts import Model, Part
from linfusion_cli.models.load.parts import AGAIN, checked_headers, fitting_state, misfit, outline, plain, vae_kind
from linfusion_cli.models.load.single_file import place_in
from linfusion_cli.models.locate.controlnet import UNION_NAMES
from linfusion_cli.models.locate.files import MODEL, find_file, find_lora, is_hub_file, is_lora
from linfusion_cli.models.locate.ip_adapter import INPUTS, read_adapter
from linfusion_cli.models.locate.model import DEMO, LAYOUTS, check_weights_name, find_linfusion, find_model
from linfusion_cli.models.text.tokens import load_tokenizer

ALONE = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, ControlNetModel)}
ALONE |= dict.fromkeys(UNION_NAMES, ControlNetUnionModel)
LINFUSION = "LinFusion"
UNFITTED = "Whether it fits a model shows where it is used with one."


@dataclass(frozen=True)
class PartFound:
    """One part of a model as it was found: its files, and how many tensors of which type are in them."""

    name: str
    files: list[Path]
    bytes: int
    tensors: int
    types: str


@dataclass(frozen=True)
class Found:
    """What something turned out to be, in words, its parts, and what else a person should know of it."""

    what: str
    parts: list[PartFound]
    remarks: list[str]


def check(name: str) -> Found:
    """What --model, --vae, --lora, --controlnet or --ip-adapter `name` is.

    Raises Unavailable where it is not here, and DataError naming the first thing that is wrong with it.
    """
    path = find_file(MODEL, name, download=False).path if is_hub_file(name) else user_path(name)
    check_weights_name("", path)
    if is_file(path):
        return check_file(str(path), read_header(path))
    folder = path if is_folder(path) or name == DEMO else cached(name, "")
    if folder is not None and not is_file(folder / "model_index.json"):
        if is_file(folder / "config.json"):
            return check_alone(folder)
        if any(is_lora(read_header(file)) for file in folder.glob("*.safetensors")):
            return check_lora(read_header(find_lora(name)))
    return check_model(find_model(name))


def check_file(name: str, header: Header) -> Found:
    """A single file: a whole model, or one of the things that come beside one, whose shapes that decides."""
    check_numbers_in(header)
    if is_lora(header):
        return check_lora(header)
    if any(key.startswith("ip_adapter.") for key in header.shapes):
        needs = INPUTS[read_adapter(header.file).kind]
        return Found(f"IP-Adapter, which takes an image encoder's {needs}", [part_found("ip_adapter", [header])], [])
    if is_inversion(header):
        vectors = read_inversion(header.file).vectors
        words = ", ".join(f"{len(values)} for the {part}" for part, values in vectors.items())
        return Found(f"textual inversion, vectors: {words}", [part_found("textual_inversion", [header])], [])
    if any(key.startswith("control_model.") for key in header.shapes):
        raise DataError(f"{header.file} is a ControlNet in one file.", "Use its folder in diffusers' layout.")
    if any(key.startswith("decoder.") for key in header.shapes):
        return Found("VAE, whose shapes the model beside it decides", [part_found("vae", [header])], [])
    return check_model(find_model(name))


def check_lora(header: Header) -> Found:
    """A LoRA's file, without a model to fit."""
    counts = {part: len(read_lora(header.file, part).layers) for part in ("unet", "text_encoder", "text_encoder_2")}
    layers = ", ".join(f"{count} in the {part}" for part, count in counts.items() if count)
    return Found(f"LoRA (layers: {layers})", [part_found("lora", [header])], [UNFITTED])


def check_alone(folder: Path) -> Found:
    """A folder with one network in it."""
    name = read_config(folder / "config.json").get("_class_name")
    if name == LINFUSION:
        header = read_header(folder / weights.WEIGHTS_NAME)
        check_numbers_in(header)
        layers = len(weights.read_specs(folder / weights.CONFIG_NAME))
        return Found(f"LinFusion's weights for {layers} layers", [part_found("linfusion", [header])], [])
    if name not in ALONE:
        raise DataError(f"{folder} holds a {name}, which is nothing that can be used.", LAYOUTS)
    return Found(name, [check_part(name, ALONE[name], Part(folder))], [])


def check_model(model: Model) -> Found:
    """A whole model, with LinFusion's weights for it where they are here."""
    facts = read_facts(model)
    kinds: dict[str, type[nn.Module]] = {"unet": UNet2DConditionModel, "vae": vae_kind(model.part("vae"))}
    kinds |= {"text_encoder": CLIPTextModel}
    kinds |= {"text_encoder_2": CLIPTextModelWithProjection} if facts.is_xl else {}
    parts = [check_part(name, kind, model.part(name)) for name, kind in kinds.items()]
    for suffix in ("", "_2") if facts.is_xl else ("",):
        kind = kinds[f"text_encoder{suffix}"]
        load_tokenizer(model.folder / f"tokenizer{suffix}", outline(kind, model.part(f"text_encoder{suffix}")).config)
    predicts = facts.prediction_type or "what a probe will tell"
    what = f"{FAMILY_NAMES[facts.family]} family, {facts.native_px} px, predicts {predicts}"
    return Found(what, parts, [*facts.warnings, linfusion_remark(model, facts.family)])


def linfusion_remark(model: Model, family: str) -> str:
    """Whether LinFusion's weights for the model are here, and fit."""
    try:
        folder = find_linfusion("auto", model, family)
    except Unavailable as error:
        return f"LinFusion: {error}"
    unet = outline(UNet2DConditionModel, model.part("unet"))
    modules = weights.load_weights(folder, unet, torch.float32)
    return f"LinFusion: {folder} fits, {len(modules)} layers"


def check_part(name: str, kind: type[nn.Module], part: Part) -> PartFound:
    """One part: all tensors of its network are there, with its shapes, of floats that are numbers."""
    headers, module = checked_headers(part), outline(kind, part)
    if part.file is not None:  # whose numbers were looked at before, once for all its parts
        fitting_state(module, headers[0], on_meta=True)
        return part_found(name, headers, place_in(headers[0], kind)[0])
    given = {plain(name): shape for header in headers for name, shape in header.shapes.items()}
    if found := misfit(module, given):
        reason = "The weights in {} do not fit its config.json: {} is {} in the files and {} by its config."
        raise DataError(reason.format(part, *found), AGAIN)
    for header in headers:
        check_numbers_in(header)
    return part_found(name, headers)


def check_numbers_in(header: Header) -> None:
    """Raise DataError naming the first tensor of a file that is not all finite numbers."""
    with safe_open(header.file, framework="pt") as opened:
        for name in header.shapes:
            if not name.endswith(COUNTERS) and not opened.get_tensor(name).sum(dtype=torch.float32).isfinite():
                raise DataError(f"{header.file} is damaged: {name} is not all finite numbers.", AGAIN)


def part_found(name: str, headers: list[Header], prefix: str = "") -> PartFound:
    """What the files of a part hold, of a file with several parts those tensors whose names begin with `prefix`."""
    found = [(header, key) for header in headers for key in header.shapes if key.startswith(prefix)]
    types = Counter(header.types[key] for header, key in found)
    size = sum(math.prod(header.shapes[key]) * itemsize(header.types[key]) for header, key in found)
    kinds = ", ".join(kind for kind, _ in types.most_common())
    return PartFound(name, [header.file for header in headers], size, types.total(), kinds)


def itemsize(kind: str) -> int:
    """The bytes of one number of a type, as headers name them: BF16, I64, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", kind)
    return int(bits[0]) // 8 if bits else 1

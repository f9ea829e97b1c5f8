"""Read the parts of a model: safetensors only, from this machine only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import PreTrainedModel

from linfusion_cli.core.errors import DataError, NonFinite, Unavailable, first_line
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.models.families.facts import read_config
from linfusion_cli.models.files.header import Header, read_header
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.load.single_file import read_state_dict, read_transformer_depths

Vae = AutoencoderKL | AutoencoderTiny
Network = TypeVar("Network", bound=nn.Module)

DOWNLOAD_AGAIN = "Download the model again."
WIDE_DTYPES = {"F64", "F32", "BF16"}  # in a safetensors header: with numbers that are too large for fp16

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()


def load_unet(model: Model, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of `model`, on the CPU, where its attention can be replaced before it moves."""
    return load_part(UNet2DConditionModel, model.get_part("unet"), dtype, torch.device("cpu"))


def load_vae(part: Part, dtype: torch.dtype, device: torch.device) -> Vae:
    """The VAE in `part`, ready to run."""
    return load_part(read_vae_class(part), part, dtype, device)


def read_vae_class(part: Part) -> type[Vae]:
    """The class of the VAE in `part`, by its config; raises DataError for one that is not known."""
    name = read_config(part.config_path).get("_class_name", AutoencoderKL.__name__)
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    if name not in kinds:
        raise DataError(f"The VAE in {part} is of the kind {name}.", f"Use one of the kinds {', '.join(kinds)}.")
    return kinds[name]


def load_meta(kind: type[Network], part: Part) -> Network:
    """A part of a model without its weights: what its config says, on the meta device."""
    config = read_network_config(kind, part)
    try:
        with init_empty_weights():
            made = kind(kind.config_class(**config)) if issubclass(kind, PreTrainedModel) else kind.from_config(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{part.config_path} makes no {kind.__name__} ({first_line(error)}).", DOWNLOAD_AGAIN
        ) from error
    return made.eval().requires_grad_(False)


def read_network_config(kind: type, part: Part) -> dict[str, Any]:
    """What its config.json says; a UNet in a single file may be less deep than its family's."""
    config = read_config(part.config_path)
    if kind is UNet2DConditionModel and part.file is not None:
        return config | read_transformer_depths(read_header(part.file), config)
    return config


def load_part(kind: type[Network], part: Part, dtype: torch.dtype, device: torch.device) -> Network:
    """One part of a model, as `kind`, its convolutions' weights in channels-last, in which they run fastest.

    Raises Unavailable when files are missing, DataError when they are broken, NonFinite for weights too large for fp16.
    """
    headers = read_weights_headers(part)
    module = (
        load_from_folder(kind, part, dtype)
        if part.file is None
        else load_from_single_file(kind, part, headers[0], dtype)
    )
    if device.type == "cpu":
        copy_parameters(module)
    check_finite(part, module, may_overflow=dtype == torch.float16 and any(map(has_wide_dtype, headers)))
    return module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def read_weights_headers(part: Part) -> list[Header]:
    """The headers of its weights; raises Unavailable or DataError where these are missing or broken."""
    files = part.weights
    if not files:
        reason = f"The model is incomplete: {part} has no weights."
        raise Unavailable(reason, "Add --download, or use another --model.")
    headers = [read_header(file) for file in files]
    for header in headers if part.file is None else ():  # a single file may hold more than what is read of it
        header.check_dtypes()
    return headers


def load_from_folder(kind: type[Network], part: Part, dtype: torch.dtype) -> Network:
    """A part as diffusers or transformers read it from its folder."""
    options = {"variant": "fp16"} if ".fp16" in part.weights[0].name else {}
    options |= {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        module, found = kind.from_pretrained(str(part.folder), **options)
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"The weights in {part} do not fit its config.json ({first_line(error)})."
        raise DataError(reason, DOWNLOAD_AGAIN) from error
    if found["missing_keys"]:  # the libraries would go on with random numbers in their place
        raise DataError(f"The weights in {part} lack {min(found['missing_keys'])}.", DOWNLOAD_AGAIN)
    return module


def load_from_single_file(kind: type[Network], part: Part, header: Header, dtype: torch.dtype) -> Network:
    """A part out of a single file."""
    module = load_meta(kind, part)
    state = read_matching_state(module, header, on_meta=False)
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
    return module


def read_matching_state(module: nn.Module, header: Header, on_meta: bool) -> dict[str, Tensor]:
    """The tensors of a single file that are `module`'s; raises DataError naming the first that is not as it should be.

    What else the file holds in its place is left out, such as a text encoder's last layers that nobody listens to.
    """
    found = {strip_text_model_prefix(name): tensor for name, tensor in read_state_dict(header, module, on_meta).items()}
    if wrong := find_mismatch(module, {name: tuple(tensor.shape) for name, tensor in found.items()}):
        reason = "{} is of another make than it seems: {} is {} in the file and {} in a model of its family."
        raise DataError(reason.format(header.file, *wrong), "Use another file.")
    return {name: found[strip_text_model_prefix(name)] for name, _ in module.named_parameters()}


def find_mismatch(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, object, tuple[int, ...]] | None:
    """The first parameter of `module` that `shapes`, by plain names, lack or have otherwise: name, found, wanted."""
    for name, parameter in module.named_parameters():
        found, wanted = shapes.get(strip_text_model_prefix(name), "no such tensor"), tuple(parameter.shape)
        if found != wanted:
            return name, found, wanted
    return None


def strip_text_model_prefix(name: str) -> str:
    """A tensor's name without the level that CLIPTextModel has in some versions of transformers, and in most files."""
    return name.removeprefix("text_model.")


def has_wide_dtype(header: Header) -> bool:
    """Whether a file may hold numbers that are too large for fp16."""
    return not WIDE_DTYPES.isdisjoint(header.dtypes.values())


def check_finite(part: Part, module: nn.Module, may_overflow: bool) -> None:
    """Raise DataError naming the first weights that are not all finite numbers: their pictures would be black.

    NonFinite where they `may_overflow`: a wider dtype will tell.
    """
    for name, parameter in module.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            if may_overflow:
                raise NonFinite(f"The weights in {part} have NaN or Inf in {name}.")
            raise DataError(f"The weights in {part} are damaged: {name} is not all finite numbers.", DOWNLOAD_AGAIN)


def copy_parameters(module: nn.Module) -> None:
    """Copy the parameters out of the mapped file: its other alignments make CPU results differ by 1e-5."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()

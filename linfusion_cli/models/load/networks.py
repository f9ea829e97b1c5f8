"""Load the networks of a model from local safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, ConfigMixin, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from linfusion_cli.core.errors import DataError, NonFinite, Unavailable, first_line
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.models.families.facts import read_config
from linfusion_cli.models.files.header import Header, read_header
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.load.single_file import read_state_dict, read_transformer_depths

Vae = AutoencoderKL | AutoencoderTiny
Network = TypeVar("Network", bound=nn.Module)
AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module, covariant=True)

DOWNLOAD_AGAIN = "Download the model again."
WIDE_DTYPES = {"F64", "F32", "BF16"}  # dtypes in safetensors headers with a larger range than fp16

diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()


class PretrainedClass(Protocol[AnyNetwork]):
    """A class of diffusers or transformers, loaded with `output_loading_info`."""

    def from_pretrained(self, folder: str, **options: object) -> tuple[AnyNetwork, dict[str, list[str]]]:
        """Load a network, and return it with information such as missing keys."""
        ...


def load_unet(model: Model, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the UNet of `model` on the CPU, where its attention can be replaced before it is moved."""
    return load_part(UNet2DConditionModel, model.get_part("unet"), dtype, torch.device("cpu"))


def load_vae(part: Part, dtype: torch.dtype, device: torch.device) -> Vae:
    """Load the VAE in `part` on `device`."""
    return load_part(read_vae_class(part), part, dtype, device)


def read_vae_class(part: Part) -> type[Vae]:
    """Return the class of the VAE in `part` from its config; raise DataError if it is not supported."""
    name = read_config(part.config_path).get("_class_name", AutoencoderKL.__name__)
    classes: dict[str, type[Vae]] = {AutoencoderKL.__name__: AutoencoderKL, AutoencoderTiny.__name__: AutoencoderTiny}
    if name not in classes:
        raise DataError(f"The VAE in {part} has the unsupported class {name}.", f"Use {' or '.join(classes)}.")
    return classes[name]


def load_meta(kind: type[Network], part: Part) -> Network:
    """Build a network from its config on the meta device, without weights; raise DataError if the config is invalid."""
    config = read_network_config(kind, part)
    try:
        with init_empty_weights():
            if issubclass(kind, PreTrainedModel):
                module = kind(cast(type[PretrainedConfig], kind.config_class)(**config))
            else:
                module = cast(Network, cast(type[ConfigMixin], kind).from_config(config))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{part.config_path} is not a valid config of {kind.__name__} ({first_line(error)}).", DOWNLOAD_AGAIN
        ) from error
    return cast(Network, module.eval().requires_grad_(False))


def read_network_config(kind: type, part: Part) -> dict[str, Any]:
    """Read the config of a network; the depth of a UNet in a single file is read from the file."""
    config = read_config(part.config_path)
    if kind is UNet2DConditionModel and part.file is not None:
        return config | read_transformer_depths(read_header(part.file), config)
    return config


def load_part(kind: type[Network], part: Part, dtype: torch.dtype, device: torch.device) -> Network:
    """Load a network of class `kind`, with convolution weights in channels-last format, which is the fastest.

    Raise Unavailable if files are missing, DataError if they are broken, NonFinite if weights overflow in fp16.
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
    module.eval().requires_grad_(False)
    return module.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # lacks memory_format


def read_weights_headers(part: Part) -> list[Header]:
    """Read the headers of the weights files; raise Unavailable if they are missing, DataError if they are broken."""
    files = part.weights
    if not files:
        reason = f"The model is incomplete: {part} has no weights."
        raise Unavailable(reason, "Add --download, or use another --model.")
    headers = [read_header(file) for file in files]
    if part.file is None:  # a single file can have tensors that are not read
        for header in headers:
            header.check_dtypes()
    return headers


def load_from_folder(kind: type[Network], part: Part, dtype: torch.dtype) -> Network:
    """Load a network from its folder with diffusers or transformers; raise DataError if weights do not fit."""
    options = {"variant": "fp16"} if ".fp16" in part.weights[0].name else {}
    options |= {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        module, loading_info = cast(PretrainedClass[Network], kind).from_pretrained(str(part.folder), **options)
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"The weights in {part} do not fit its config.json ({first_line(error)})."
        raise DataError(reason, DOWNLOAD_AGAIN) from error
    if loading_info["missing_keys"]:  # the libraries only log a warning and initialize them randomly
        raise DataError(f"The weights in {part} lack {min(loading_info['missing_keys'])}.", DOWNLOAD_AGAIN)
    return module


def load_from_single_file(kind: type[Network], part: Part, header: Header, dtype: torch.dtype) -> Network:
    """Load a network from a single file."""
    module = load_meta(kind, part)
    state = read_matching_state(module, header, on_meta=False)
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=False, assign=True)
    return module


def read_matching_state(module: nn.Module, header: Header, on_meta: bool) -> dict[str, Tensor]:
    """Read the parameters of `module` from a single file; raise DataError for the first one that does not match.

    Additional tensors with the same prefix are ignored, e.g. the last layers of a text encoder that are not used.
    """
    tensors = {
        strip_text_model_prefix(name): tensor for name, tensor in read_state_dict(header, module, on_meta).items()
    }
    if mismatch := find_mismatch(module, {name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        reason = "{} does not fit its model family: {} is {} in the file, but {} in the family."
        raise DataError(reason.format(header.file, *mismatch), "Use another file.")
    return {name: tensors[strip_text_model_prefix(name)] for name, _ in module.named_parameters()}


def find_mismatch(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, object, tuple[int, ...]] | None:
    """Return name, actual and expected shape of the first parameter that is missing or differs; None if all match.

    The keys of `shapes` are names without the prefix `text_model.`.
    """
    for name, parameter in module.named_parameters():
        actual, expected = shapes.get(strip_text_model_prefix(name), "missing"), tuple(parameter.shape)
        if actual != expected:
            return name, actual, expected
    return None


def strip_text_model_prefix(name: str) -> str:
    """Remove the prefix that CLIPTextModel has in older versions of transformers, and in most files."""
    return name.removeprefix("text_model.")


def has_wide_dtype(header: Header) -> bool:
    """Return whether a file has a dtype with a larger range than fp16."""
    return not WIDE_DTYPES.isdisjoint(header.dtypes.values())


def check_finite(part: Part, module: nn.Module, may_overflow: bool) -> None:
    """Raise DataError for the first parameter with NaN or Inf, which would lead to black images.

    Raise NonFinite instead if they `may_overflow`: the weights can be finite in a wider dtype.
    """
    for name, parameter in module.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():
            if may_overflow:
                raise NonFinite(f"The weights in {part} contain NaN or Inf in {name}.")
            raise DataError(f"The weights in {part} are damaged: {name} contains NaN or Inf.", DOWNLOAD_AGAIN)


def copy_parameters(module: nn.Module) -> None:
    """Copy the parameters out of the memory-mapped file: another alignment changes CPU results by 1e-5."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()

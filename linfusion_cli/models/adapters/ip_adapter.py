"""IP-Adapter (arXiv 2308.06721): image prompts in the cross-attention of the UNet, in addition to the text.

    out = W_o · (attention(q, text) + Σ scale · attention(q, image))

The image projection of the adapter converts the embedding of an image encoder to tokens, and each cross-attention has
separate keys and values for them. diffusers loads both into the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from linfusion_cli.core.errors import DataError, first_line
from linfusion_cli.core.fs import is_file
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.models.families.facts import detect_family
from linfusion_cli.models.files.layout import Part
from linfusion_cli.models.load.networks import load_part
from linfusion_cli.models.locate.ip_adapter import OUTPUT_TENSORS, PLAIN_KIND, Adapter, AdapterFile

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

PLAIN_TOKEN_COUNT = 4  # tokens per image of a plain adapter, computed by one linear layer
LOADING_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, AttributeError, SafetensorError, OSError)


def load_adapters(unet: UNet2DConditionModel, adapters: Sequence[Adapter]) -> None:
    """Load `adapters` into `unet`, which must have its original attention; afterwards it requires `image_embeds`.

    The weights are converted to the UNet's dtype and device; for a UNet on the meta device no weights are read. Raise
    DataError if a file does not fit or is broken.
    """
    for adapter in adapters:
        check_fit(adapter.weights, unet)
    if not adapters:
        return
    try:
        unet._load_ip_adapter_weights([read_adapter_state(adapter.weights, unet) for adapter in adapters])
    except LOADING_ERRORS as error:
        if is_out_of_memory(error):
            raise
        files = ", ".join(str(adapter.weights.file) for adapter in adapters)
        reason = f"The IP-Adapter {files} could not be loaded ({first_line(error)})."
        raise DataError(reason, "Download it again, or use another IP-Adapter.") from error
    projections = cast(MultiIPAdapterImageProjection, unet.encoder_hid_proj).image_projection_layers
    for adapter, projection in zip(adapters, cast(nn.ModuleList, projections), strict=True):
        check_projection_size(adapter.weights, projection)
    for attention in find_cross_attentions(unet):
        processor = cast(IPAdapterAttnProcessor2_0, attention.processor)
        processor.scale = [adapter.scale for adapter in adapters]  # pyright: ignore[reportAttributeAccessIssue]  # a list


def check_fit(adapter: AdapterFile, unet: UNet2DConditionModel) -> None:
    """Raise DataError for the first layer of the adapter that is missing, unknown or has a wrong shape for `unet`."""
    expected = dict(list_expected_shapes(adapter, unet))
    layers = [*expected, *(name for name in adapter.shapes if name.startswith("ip_adapter.") and name not in expected)]
    for name in layers:
        file_shape, model_shape = adapter.shapes.get(name), expected.get(name)
        if file_shape != model_shape:
            mismatch = f"{name} is {file_shape or 'missing'} in the file, but {model_shape or 'missing'} in the model."
            hint = f"Use an IP-Adapter for the family of this model, {detect_family(unet.config)}."
            raise DataError(f"The IP-Adapter {adapter.file} does not fit the model: {mismatch}", hint)


def list_expected_shapes(adapter: AdapterFile, unet: UNet2DConditionModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and expected shape of the tensors that depend on the shapes of `unet`."""
    for i, attention in enumerate(find_cross_attentions(unet)):
        for layer in ("to_k", "to_v"):  # files count all attentions; every second one is a cross-attention
            yield f"ip_adapter.{2 * i + 1}.{layer}_ip.weight", tuple(getattr(attention, layer).weight.shape)
    last = f"image_proj.{OUTPUT_TENSORS[adapter.kind]}"
    rows = unet.config["cross_attention_dim"] * (PLAIN_TOKEN_COUNT if adapter.kind == PLAIN_KIND else 1)
    yield last, (rows, *adapter.shapes[last][1:])


def find_cross_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """Return the cross-attentions of the UNet in the order of an adapter file."""
    paths = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [cast(Attention, unet.get_submodule(path)) for path in paths if path.endswith("attn2")]


def read_adapter_state(adapter: AdapterFile, unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """Read the file into the nested dictionary that diffusers expects, as copies in the UNet's dtype."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    dtype, is_meta = unet.dtype, unet.device.type == "meta"  # read once: diffusers walks all modules for each
    with safe_open(adapter.file, framework="pt") as opened:
        for name, shape in adapter.shapes.items():
            part, _, rest = name.partition(".")
            tensor = torch.empty(shape, device="meta") if is_meta else opened.get_tensor(name)
            state[part][rest] = tensor.to(dtype, copy=True)
    return state


def check_projection_size(adapter: AdapterFile, projection: nn.Module) -> None:
    """Raise DataError if the file does not have exactly the parameters of the image projection."""
    count = sum(torch.Size(shape).numel() for name, shape in adapter.shapes.items() if name.startswith("image_proj."))
    expected = sum(parameter.numel() for parameter in projection.parameters())
    if count != expected:
        reason = f"The image projection of the IP-Adapter {adapter.file} has {count} parameters instead of {expected}."
        raise DataError(reason, "Download it again, or use another IP-Adapter.")


def encode_images(
    adapters: Sequence[Adapter], images: Sequence[Image], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return the embeddings of each adapter's RGB image and its negative, on the CPU: [1, 1, D], or [1, 1, L, D].

    The second shape is for adapters that take patches. Encoders are freed afterwards; adapters can share an encoder.
    """
    embeds: dict[int, tuple[Tensor, Tensor]] = {}
    for folder in dict.fromkeys(adapter.encoder for adapter in adapters):
        indices = [i for i, adapter in enumerate(adapters) if adapter.encoder == folder]
        tasks = [(adapters[i], images[i]) for i in indices]
        embeds |= zip(indices, encode_with_encoder(folder, tasks, dtype, device), strict=True)
    return [embeds[i] for i in range(len(adapters))]


def encode_with_encoder(
    folder: Path, tasks: Sequence[tuple[Adapter, Image]], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return the embeddings like `encode_images`, for adapters with the same encoder."""
    encoder = load_part(CLIPVisionModelWithProjection, Part(folder), dtype, device)
    preprocess = load_preprocessor(folder, cast(int, encoder.config.image_size))
    result: list[tuple[Tensor, Tensor]] = []
    for adapter, image in tasks:
        pixels = preprocess(image, return_tensors="pt").pixel_values.to(device=device, dtype=dtype)
        positive, negative = compute_embeddings(encoder, pixels, adapter.weights.is_patch_based)
        result.append((positive[None].cpu(), negative[None].cpu()))
    return result


@torch.inference_mode()
def compute_embeddings(
    encoder: CLIPVisionModelWithProjection, pixels: Tensor, is_patch_based: bool
) -> tuple[Tensor, Tensor]:
    """Return the embedding of `pixels` [1, 3, h, w] and its negative.

    The negative is the embedding of a black image for patches, otherwise zeros.
    """
    if not is_patch_based:
        embeds = encoder(pixels).image_embeds
        return embeds, torch.zeros_like(embeds)
    positive, negative = (
        encoder(image, output_hidden_states=True).hidden_states[-2] for image in (pixels, torch.zeros_like(pixels))
    )
    return positive, negative


def load_preprocessor(folder: Path, image_size: int) -> CLIPImageProcessor:
    """Load the image preprocessor of the encoder in `folder`; by default that of CLIP with the encoder's image size.

    Raise DataError if its config is broken.
    """
    from transformers import CLIPImageProcessor

    if not is_file(folder / "preprocessor_config.json"):
        return CLIPImageProcessor(size=image_size, crop_size=image_size)
    try:
        return CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = f"{folder / 'preprocessor_config.json'} could not be read ({first_line(error)})."
        raise DataError(reason, "Download the file again, or remove it.") from error

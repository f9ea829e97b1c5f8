"""IP-Adapter (arXiv 2308.06721): a UNet's cross-attention listens to pictures beside the text.

    out = W_o · (attention(q, text) + Σ scale · attention(q, picture))

The picture's tokens are what the adapter's image projection makes of an image encoder's embedding, and each
cross-attention has keys and values of its own for them. diffusers loads both into the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from linfusion_cli.core.errors import DataError, first_line
from linfusion_cli.core.fs import is_file
from linfusion_cli.hardware.torch_errors import is_out_of_memory
from linfusion_cli.models.families.facts import detect_family
from linfusion_cli.models.files.layout import Part
from linfusion_cli.models.load.networks import load_part
from linfusion_cli.models.locate.ip_adapter import OUTPUT_TENSORS, PLAIN_KIND, Adapter, AdapterFile

PLAIN_TOKEN_COUNT = 4  # that a plain adapter makes of its picture, side by side in the rows of one matrix
LOADING_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, AttributeError, SafetensorError, OSError)


def load_adapters(unet: UNet2DConditionModel, adapters: Sequence[Adapter]) -> None:
    """Make `unet`, with its original attention, listen to pictures; from then on it must be given `image_embeds`.

    Weights take the UNet's dtype and device; on the meta device none are read. Raises DataError for a file that does
    not fit, or that is broken.
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
        reason = f"The IP-Adapter {files} cannot be loaded ({first_line(error)})."
        raise DataError(reason, "Download it again, or use another one.") from error
    for adapter, projection in zip(adapters, unet.encoder_hid_proj.image_projection_layers, strict=True):
        check_projection_size(adapter.weights, projection)
    for attention in find_cross_attentions(unet):
        attention.processor.scale = [adapter.scale for adapter in adapters]


def check_fit(adapter: AdapterFile, unet: UNet2DConditionModel) -> None:
    """Raise DataError naming the first layer of the adapter that is not as `unet` needs it."""
    wanted = dict(list_expected_shapes(adapter, unet))
    layers = [*wanted, *(name for name in adapter.shapes if name.startswith("ip_adapter.") and name not in wanted)]
    for name in layers:
        found, shape = adapter.shapes.get(name), wanted.get(name)
        if found != shape:
            says = f"{name} is {found or 'no such layer'} in the file and {shape or 'no such layer'} in the model."
            hint = f"Use an IP-Adapter made for this model's family, {detect_family(unet.config)}."
            raise DataError(f"The IP-Adapter {adapter.file} does not fit the model: {says}", hint)


def list_expected_shapes(adapter: AdapterFile, unet: UNet2DConditionModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor name -> the shape that it must have for `unet`, of all layers that touch it."""
    for i, attention in enumerate(find_cross_attentions(unet)):
        for layer in ("to_k", "to_v"):  # the files count all attentions, of which every other is this kind
            yield f"ip_adapter.{2 * i + 1}.{layer}_ip.weight", tuple(getattr(attention, layer).weight.shape)
    last = f"image_proj.{OUTPUT_TENSORS[adapter.kind]}"
    rows = unet.config.cross_attention_dim * (PLAIN_TOKEN_COUNT if adapter.kind == PLAIN_KIND else 1)
    yield last, (rows, *adapter.shapes[last][1:])


def find_cross_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """The UNet's cross-attentions, in the order in which an adapter's file counts them."""
    paths = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [unet.get_submodule(path) for path in paths if path.endswith("attn2")]


def read_adapter_state(adapter: AdapterFile, unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """The file's tensors as diffusers' loader takes them, in memory of their own, in the UNet's dtype."""
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    dtype, is_outline = unet.dtype, unet.device.type == "meta"  # for each of which diffusers walks all modules
    with safe_open(adapter.file, framework="pt") as opened:
        for name, shape in adapter.shapes.items():
            part, _, rest = name.partition(".")
            tensor = torch.empty(shape, device="meta") if is_outline else opened.get_tensor(name)
            state[part][rest] = tensor.to(dtype, copy=True)
    return state


def check_projection_size(adapter: AdapterFile, projection: torch.nn.Module) -> None:
    """Raise DataError unless the file has as many numbers for the image projection as that takes."""
    numbers = sum(torch.Size(shape).numel() for name, shape in adapter.shapes.items() if name.startswith("image_proj."))
    needed = sum(parameter.numel() for parameter in projection.parameters())
    if numbers != needed:
        reason = f"The IP-Adapter {adapter.file} has {numbers} numbers in its image projection, instead of {needed}."
        raise DataError(reason, "Download it again, or use another one.")


def encode_images(
    adapters: Sequence[Adapter], images: Sequence[Image], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """What each adapter hears of its RGB picture, and of no picture, on the CPU: [1, 1, D], or [1, 1, L, D] of patches.

    The encoders are gone afterwards; one that serves several adapters is loaded once.
    """
    heard: dict[int, tuple[Tensor, Tensor]] = {}
    for folder in dict.fromkeys(adapter.encoder for adapter in adapters):
        which = [i for i, adapter in enumerate(adapters) if adapter.encoder == folder]
        tasks = [(adapters[i], images[i]) for i in which]
        heard |= zip(which, encode_with_encoder(folder, tasks, dtype, device), strict=True)
    return [heard[i] for i in range(len(adapters))]


def encode_with_encoder(
    folder: Path, tasks: Sequence[tuple[Adapter, Image]], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """As `encode_pictures`, for the adapters of one encoder."""
    encoder = load_part(CLIPVisionModelWithProjection, Part(folder), dtype, device)
    prepare = load_preprocessor(folder, encoder.config.image_size)
    result = []
    for adapter, image in tasks:
        pixels = prepare(image, return_tensors="pt").pixel_values.to(device=device, dtype=dtype)
        embeds = compute_embeddings(encoder, pixels, adapter.weights.is_patch_based)
        result.append(tuple(part[None].cpu() for part in embeds))
    return result


@torch.inference_mode()
def compute_embeddings(encoder: CLIPVisionModelWithProjection, pixels: Tensor, patches: bool) -> tuple[Tensor, Tensor]:
    """What `encoder` makes of `pixels` [1, 3, h, w], and what stands for none: of black, or nothing at all."""
    if not patches:
        embeds = encoder(pixels).image_embeds
        return embeds, torch.zeros_like(embeds)
    both = (encoder(image, output_hidden_states=True) for image in (pixels, torch.zeros_like(pixels)))
    return tuple(out.hidden_states[-2] for out in both)


def load_preprocessor(folder: Path, image_size: int):
    """How the encoder in `folder` takes pictures: as its config says, else as CLIP does, at its own size; DataError."""
    from transformers import CLIPImageProcessor

    if not is_file(folder / "preprocessor_config.json"):
        return CLIPImageProcessor(size=image_size, crop_size=image_size)
    try:
        return CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = f"{folder / 'preprocessor_config.json'} could not be read ({first_line(error)})."
        raise DataError(reason, "Download it again, or remove it.") from error

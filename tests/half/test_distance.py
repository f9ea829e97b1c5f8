"""Both families and the demo model in half precision: no mixed dtypes, and latents close to those in fp32."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from linfusion_cli.core.geometry import Size
from tests.support.small_controlnets import build_small_controlnet, build_small_union_controlnet, write_controlnet
from tests.support.small_ip_adapters import write_adapter, write_encoder, write_image
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet, write_linfusion

pytestmark = pytest.mark.slow

UNETS = {"xl": build_small_xl_unet, "sd": build_small_sd_unet}
# Maximum distance of latents from those in fp32: mean absolute difference, divided by the standard deviation in fp32.
# Measured maxima: 0.0086 and 0.0012 for the random models, including rounded noise; 0.048 and 0.011 for the demo model,
# which has small latents.
MAX_DISTANCE = {"bfloat16": 0.02, "float16": 0.003}
MAX_DEMO_DISTANCE = {"bfloat16": 0.1, "float16": 0.025}
WHOLE = {"linfusion": "none"}  # every phase in one piece
IN_STRIPS = {"attention": ("linear",)}  # every phase in strips
DEMO = {"model": "demo", "size": Size(256, 256), "base_size": Size(128, 128)}


@dataclass(frozen=True)
class Case:
    """A model, its adapters, and settings."""

    family: str
    adapters: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)


CASES = {
    "xl": Case("xl", (), {"upscaler": "demofusion"}),
    "xl in strips, LoRA": Case("xl", ("lora",), {"upscaler": "demofusion", **IN_STRIPS}),
    "xl whole, LoRA, control": Case("xl", ("lora", "control"), {"upscaler": "sdedit", **WHOLE}),
    "xl in strips, control": Case("xl", ("control",), {"upscaler": "demofusion", **IN_STRIPS}),
    "xl in strips, union": Case("xl", ("union",), {"upscaler": "sdedit"}),
    "xl whole, IP-Adapters": Case("xl", ("plain", "plus"), {"upscaler": "demofusion", **WHOLE}),
    "xl in strips, IP-Adapter, LoRA": Case("xl", ("full", "lora"), {"upscaler": "sdedit", "scheduler": "dpmpp-2m-sde"}),
    "xl in latent space": Case("xl", (), {"upscale_space": "latent", "scheduler": "euler-a", **IN_STRIPS}),
    "sd": Case("sd", ("linear",), {"upscaler": "sdedit"}),
    "sd in strips, LoRA": Case("sd", ("linear", "lora"), {"upscaler": "demofusion", **IN_STRIPS}),
    "sd whole, control": Case("sd", ("control",), {"upscaler": "demofusion", **WHOLE}),
    "sd in strips, control": Case("sd", ("linear", "control"), {"upscaler": "sdedit", "guidance_rescale": 0.7}),
    "sd in strips, IP-Adapter": Case("sd", ("linear", "plus"), {"upscaler": "demofusion", "scheduler": "unipc"}),
    "demo": Case("demo", (), {"upscaler": "sdedit", **DEMO}),
    "demo whole": Case("demo", (), {"upscaler": "demofusion", **WHOLE, **DEMO}),
}


@pytest.fixture(scope="module")
def adapter_settings(tmp_path_factory):
    """Write adapters -> a function that returns the settings for the named adapters of a family."""
    folder = tmp_path_factory.mktemp("adapters")
    write_encoder(folder / "image_encoder")
    image = str(write_image(folder / "a.png"))
    edges = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(edges).save(folder / "edges.png")
    write_linfusion(folder / "sd-linear", build_small_sd_unet())

    def control(family: str, name: str) -> dict:
        unet = UNETS[family]()
        net = build_small_union_controlnet(unet) if name == "union" else build_small_controlnet(unet)
        settings = {"controlnet": (str(write_controlnet(folder / f"{family}-{name}", net)),)}
        settings |= {"control_type": ("canny",)} if name == "union" else {}
        return settings | {"control_image": (str(folder / "edges.png"),), "control_phases": ("all",)}

    def adapter(family: str, kind: str) -> str:
        return str(write_adapter(folder / f"{family}-{kind}.safetensors", UNETS[family](), kind))

    def build_settings(family: str, names: tuple[str, ...]) -> dict:
        result: dict = {}
        for name in names:
            if name == "lora":
                result |= {"lora": (f"{write_lora(folder, family)}:0.7",)}
            elif name == "linear":
                result |= {"linfusion": str(folder / "sd-linear")}
            elif name in ("control", "union"):
                result |= control(family, name)
        adapters = [name for name in names if name in ("plain", "plus", "full")]
        ip_settings = {"ip_adapter": tuple(adapter(family, kind) for kind in adapters)}
        return result | ip_settings | {"ip_image": (image,) * len(adapters)}

    return build_settings


def write_lora(folder: Path, family: str) -> Path:
    """Write a LoRA for all layers of a small UNet."""
    torch.manual_seed(1)
    factors = {}
    for path, module in UNETS[family]().named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            out_channels, in_channels, *kernel = module.weight.shape
            factors[f"unet.{path}.lora_A.weight"] = 0.1 * torch.randn(2, in_channels, *kernel)
            factors[f"unet.{path}.lora_B.weight"] = 0.1 * torch.randn(out_channels, 2, *[1 for _ in kernel])
    file = folder / f"{family}-lora.safetensors"
    save_file(factors, file)
    return file


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_close_to_float32(make, clear, sd_model, adapter_settings, name):
    case = CASES[name]
    settings = {"steps": (2,), "strength": (0.9,), "guidance_scale": (3.0,), **case.settings}
    settings |= adapter_settings(case.family, case.adapters) | ({"model": str(sd_model)} if case.family == "sd" else {})
    expected = make(dtype="float32", **settings).latents
    for dtype, max_distance in (MAX_DEMO_DISTANCE if case.family == "demo" else MAX_DISTANCE).items():
        clear()
        result = make(dtype=dtype, **settings)
        assert result.report.dtypes == [{"phase": 0, "step": 0, "dtype": dtype}]
        distance = float((result.latents - expected).abs().mean() / expected.std())
        assert 0 < distance <= max_distance

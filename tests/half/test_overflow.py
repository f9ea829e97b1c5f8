"""Real overflows in fp16, of weights, activations, prompts and LoRAs, are repeated in bfloat16."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import NonFinite
from tests.half.runs import BASE, build_history, list_notices
from tests.support.marks import mostly_slow

# Text encoder weights times 1e5 and convolution weights times 3e5 are finite in fp16, but the activations are not. In
# wider dtypes all are finite, and normalization brings them back to the usual range.


@pytest.fixture
def own_model(xl_model, tmp_path):
    """Return a copy of the small model that a test can change."""
    return shutil.copytree(xl_model, tmp_path / "model")


def scale(file: Path, name: str, times: float) -> None:
    tensors = load_file(file)
    tensors[name] *= times
    save_file(tensors, file, metadata={"format": "pt"})


WEIGHTS = "diffusion_pytorch_model.safetensors"
OVERFLOWS = {
    "weights": ("unet/" + WEIGHTS, "down_blocks.0.resnets.0.conv1.weight", 1e7, "down_blocks"),
    "activations": ("unet/" + WEIGHTS, "down_blocks.0.resnets.0.conv1.weight", 3e5, "step 1"),
    "prompts": ("text_encoder_2/model.safetensors", "layers.0.mlp.fc2.weight", 1e5, "prompt"),
}


@pytest.mark.parametrize("name", mostly_slow(OVERFLOWS, quick=("activations",)))
def test_a_real_overflow_equals_a_run_in_bfloat16_from_the_start(make, clear, own_model, name):
    """No weights and no prompt embeddings of fp16 are used any more."""
    file, tensor, times, message = OVERFLOWS[name]
    key = next(key for key in load_file(own_model / file) if key.endswith(tensor))
    scale(own_model / file, key, times)
    result = make(model=str(own_model))
    assert result.report.dtypes == build_history((0, 0, "bfloat16"))
    assert (
        len(list_notices(result)) == 1 and message in list_notices(result)[0] and "(float16)" in list_notices(result)[0]
    )
    clear()
    assert torch.equal(result.latents, make(model=str(own_model), dtype="bfloat16").latents)


@pytest.mark.slow
def test_a_lora_that_overflows_is_merged_again(make, clear, tmp_path):
    torch.manual_seed(0)
    layer = "unet.down_blocks.0.resnets.0.conv1"
    factors = {"lora_A": torch.randn(2, 8, 3, 3), "lora_B": torch.randn(8, 2, 1, 1)}
    tensors = {f"{layer}.{name}.weight": 1e3 * factor for name, factor in factors.items()}
    save_file(tensors, tmp_path / "large.safetensors")
    changes = {"lora": (f"{tmp_path / 'large.safetensors'}:1.0",)}
    result = make(**changes)
    assert result.report.dtypes == build_history((0, 0, "bfloat16")) and len(list_notices(result)) == 1
    for name in ("a.png", "a.safetensors"):
        (tmp_path / name).unlink()
    assert torch.equal(result.latents, make(dtype="bfloat16", **changes).latents)


@pytest.mark.slow
def test_a_damaged_file_is_not_an_overflow(make, own_model):
    file = own_model / "unet" / WEIGHTS
    scale(file, "conv_in.weight", math.nan)
    with pytest.raises(Exception, match="conv_in.weight") as end:
        make(model=str(own_model))
    assert end.value.exit_code == 65


def test_a_probe_that_overflows_is_repeated(make, own_model, forwards):
    config = own_model / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    del values["prediction_type"]
    config.write_text(json.dumps(values))
    forwards.bad = {(BASE, 0): {"float16"}}  # a probe is the first forward pass
    result = make(model=str(own_model))
    assert "(float16)" in list_notices(result)[0] and "step" not in list_notices(result)[0]
    assert forwards.dtypes == ["float16"] + ["bfloat16"] * 8 and result.report.dtypes == build_history(
        (0, 0, "bfloat16")
    )


@pytest.mark.slow
def test_latents_that_were_not_finite_before_are_not_repeated_in_another_dtype(make, own_model, forwards):
    """A schedule that divides by zero: no reload, and a hint that helps."""
    config = own_model / "scheduler" / "scheduler_config.json"
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(NonFinite, match="--scheduler.*--fresh"):
        make(model=str(own_model), scheduler="ddim")
    assert set(forwards.dtypes) == {"float16"}

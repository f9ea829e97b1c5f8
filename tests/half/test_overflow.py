"""What really overflows in fp16, weights, activations, prompts and LoRAs, is made again from the files in bfloat16."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import NonFinite
from tests.half.runs import BASE, history, notices
from tests.support.marks import mostly_slow

# 1e5 times a text encoder's weights are still numbers in fp16, and so are 3e5 times those of a convolution; what comes
# out of them is not, and normalisations make numbers again of what wider dtypes hold.


@pytest.fixture
def own_model(xl_model, tmp_path):
    """A copy of the small model, to be changed."""
    return shutil.copytree(xl_model, tmp_path / "model")


def scale(file: Path, name: str, times: float) -> None:
    tensors = load_file(file)
    tensors[name] *= times
    save_file(tensors, file, metadata={"format": "pt"})


WEIGHTS = "diffusion_pytorch_model.safetensors"
OVERFLOWS = {
    "weights": ("unet/" + WEIGHTS, "down_blocks.0.resnets.0.conv1.weight", 1e7, "have NaN or Inf in down_blocks"),
    "activations": ("unet/" + WEIGHTS, "down_blocks.0.resnets.0.conv1.weight", 3e5, "predicts NaN or Inf at step 1"),
    "prompts": ("text_encoder_2/model.safetensors", "layers.0.mlp.fc2.weight", 1e5, "embeddings of the prompts"),
}


@pytest.mark.parametrize("name", mostly_slow(OVERFLOWS, quick=("activations",)))
def test_what_overflows_indeed_equals_a_run_in_bfloat16_from_the_start(make, clear, own_model, name):
    """No number of fp16 is left in it: not of weights, nor of prompts."""
    file, tensor, times, message = OVERFLOWS[name]
    found = next(key for key in load_file(own_model / file) if key.endswith(tensor))
    scale(own_model / file, found, times)
    made = make(model=str(own_model))
    assert made.report.dtypes == history((0, 0, "bfloat16"))
    assert len(notices(made)) == 1 and message in notices(made)[0] and "(float16)" in notices(made)[0]
    clear()
    assert torch.equal(made.latents, make(model=str(own_model), dtype="bfloat16").latents)


@pytest.mark.slow
def test_a_lora_that_overflows_is_merged_anew(make, clear, tmp_path):
    torch.manual_seed(0)
    layer = "unet.down_blocks.0.resnets.0.conv1"
    factors = {"lora_A": torch.randn(2, 8, 3, 3), "lora_B": torch.randn(8, 2, 1, 1)}
    tensors = {f"{layer}.{name}.weight": 1e3 * factor for name, factor in factors.items()}
    save_file(tensors, tmp_path / "large.safetensors")
    changed = {"lora": (f"{tmp_path / 'large.safetensors'}:1.0",)}
    made = make(**changed)
    assert made.report.dtypes == history((0, 0, "bfloat16")) and len(notices(made)) == 1
    for name in ("a.png", "a.safetensors"):
        (tmp_path / name).unlink()
    assert torch.equal(made.latents, make(dtype="bfloat16", **changed).latents)


@pytest.mark.slow
def test_a_damaged_file_is_no_overflow(make, own_model):
    file = own_model / "unet" / WEIGHTS
    scale(file, "conv_in.weight", math.nan)
    with pytest.raises(Exception, match="damaged: conv_in.weight is not all finite") as end:
        make(model=str(own_model))
    assert end.value.exit_code == 65


def test_a_probe_that_overflows_is_repeated(make, own_model, forwards):
    config = own_model / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    del values["prediction_type"]
    config.write_text(json.dumps(values))
    forwards.bad = {(BASE, 0): {"float16"}}  # a probe is the first forward of all
    made = make(model=str(own_model))
    assert "for pure noise (float16)." in notices(made)[0] and "By" not in notices(made)[0]
    assert forwards.dtypes == ["float16"] + ["bfloat16"] * 8 and made.report.dtypes == history((0, 0, "bfloat16"))


@pytest.mark.slow
def test_latents_that_were_not_finite_before_are_no_matter_of_dtypes(make, own_model, forwards):
    """A schedule that divides by no signal: no reload, and the advice that helps."""
    config = own_model / "scheduler" / "scheduler_config.json"
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(NonFinite, match="not finite either: use another --scheduler, with --fresh"):
        make(model=str(own_model), scheduler="ddim")
    assert set(forwards.dtypes) == {"float16"}

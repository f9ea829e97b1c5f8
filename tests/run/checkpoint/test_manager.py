"""A model of any family and file layout gives the latents that diffusers computes with it."""

import json
import re
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.models.locate.model import DEMO_FOLDER, FAMILY_BASES
from linfusion_cli.run.pipeline import generate
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_models import write_small_sd, write_small_xl
from tests.support.small_single_files import copy_without_weights, write_original, write_small_sd21

WRITERS = {"sdxl": write_small_xl, "sd21": write_small_sd21, "sd15": write_small_sd}
SIZE, STEPS, SCALE, SEED = 64, 4, 3.0, 5


@pytest.fixture
def run_base(tmp_path, phases):
    """Return a function that generates the base image -> its latents, and the notices."""

    def run(model, **changed):
        listener = Listener()
        values = {"prompt": "a hill", "negative_prompt": "fog", "size": Size(SIZE, SIZE), "steps": (STEPS,)}
        values |= {
            "seed": SEED,
            "guidance_scale": (SCALE,),
            "linfusion": "none",
            "model": str(model),
            "overwrite": True,
        }
        generate(make_request(**values | {"output": tmp_path / "out.png"} | changed), {}, listener)
        return phases[-1][1].latents, [event.text for event in listener.of(Notice)]

    return run


def run_diffusers(folder, **changed):
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").exists() else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changed)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a hill",
        negative_prompt="fog",
        width=SIZE,
        height=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).images


@pytest.mark.parametrize("layout", ["folder", "file", "half", "shards"])
@pytest.mark.parametrize("family", WRITERS)
def test_the_base_image_equals_diffusers(run_base, tmp_path, family, layout):
    """SD 2.1 predicts v: by its config, or by the request for a single file without that in its header."""
    folder = WRITERS[family](tmp_path / "folder")
    wanted, model, more = run_diffusers(folder), folder, {}
    if layout == "file":
        add_to_hub_cache(copy_without_weights(folder, tmp_path / "bare"), FAMILY_BASES[family])
        model = write_original(folder, tmp_path / "one.safetensors", family)
        more = {"prediction_type": "v_prediction" if family == "sd21" else "epsilon"}
    elif layout == "half":
        for file in folder.rglob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    elif layout == "shards":
        split_into_shards(folder / "unet")
    found, _ = run_base(model, **more)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def split_into_shards(part):
    """Split the weights in `part` into three files and an index."""
    file = part / "diffusion_pytorch_model.safetensors"
    tensors, places = load_file(file), {}
    for i in range(3):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        some = dict(list(tensors.items())[i::3])
        save_file(some, part / name, {"format": "pt"})
        places |= dict.fromkeys(some, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def test_the_request_overrides_the_prediction_type(run_base, sd_model):
    found, notices = run_base(sd_model, prediction_type="v_prediction")
    wanted = run_diffusers(sd_model, prediction_type="v_prediction")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - run_base(sd_model)[0]).abs().max() > 0.01 and not any("probe" in text for text in notices)


def copy_demo_without_prediction_type(folder):
    """Copy the demo model without the prediction type in its config."""
    shutil.copytree(DEMO_FOLDER, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    assert config.pop("prediction_type") == "epsilon"
    file.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("linfusion", ["none", "auto"])
def test_a_probe_determines_a_missing_prediction_type(run_base, tmp_path, linfusion):
    size = Size(256, 256) if linfusion == "none" else Size(288, 288)
    how = {"linfusion": linfusion, "size": size, "steps": (2,), "upscaler": "none"}
    found, notices = run_base(copy_demo_without_prediction_type(tmp_path / "model"), **how)
    assert torch.equal(found, run_base(DEMO_FOLDER, **how)[0])
    (notice,) = [text for text in notices if "probe" in text]
    assert re.search(r"epsilon \(correlation.* (0\.9\d|1\.00)\)", notice)


def test_the_probe_of_a_model_that_ignores_noise_gives_v_prediction(run_base, tmp_path):
    folder = copy_demo_without_prediction_type(tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_out.weight": torch.zeros_like(tensors["conv_out.weight"])}, file, {"format": "pt"})
    _, notices = run_base(folder, size=Size(256, 256), steps=(1,))
    assert any("v_prediction" in text for text in notices)

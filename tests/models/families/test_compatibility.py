"""Models that would be sampled with wrong settings are rejected by all commands with the same message."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.locate.model import FAMILY_BASES, find_model
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.small_models import build_scheduler_config
from tests.support.small_single_files import copy_without_weights, write_original

BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
NO_BETAS = dict.fromkeys(BETAS)

UNETS = {
    "time_cond_proj_dim": {"time_cond_proj_dim": 256},
    "class_embed_type": {"class_embed_type": "projection"},
    "num_class_embeds": {"num_class_embeds": 1000},
    "encoder_hid_dim_type": {"encoder_hid_dim_type": "text_image_proj"},
    "encoder_hid_dim": {"encoder_hid_dim": 4096},
    "addition_embed_type": {"addition_embed_type": "image_hint"},
    "addition_embed_type 'text'": {"addition_embed_type": "text"},
    "time_embedding_type": {"time_embedding_type": "fourier"},
    "4 input and 8 output channels": {"out_channels": 8},
}
SCHEDULERS = {
    "EDMEulerScheduler": {"_class_name": "EDMEulerScheduler"},
    "EDMDPMSolverMultistepScheduler": {"_class_name": "EDMDPMSolverMultistepScheduler"} | NO_BETAS,
    "FlowMatchEulerDiscreteScheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"} | NO_BETAS,
    "FlowMatchHeunDiscreteScheduler": {"_class_name": "FlowMatchHeunDiscreteScheduler"},
    "CosineDPMSolverMultistepScheduler": {"_class_name": "CosineDPMSolverMultistepScheduler"},
    "no betas": NO_BETAS,
    "has no betas": {"_class_name": "EulerDiscreteScheduler", "beta_schedule": None},
    "beta_start 0.02 and beta_end 0.01": {"beta_start": 0.02, "beta_end": 0.01},
    "beta_start 'a'": {"beta_start": "a"},
    "beta_end 1.5": {"beta_end": 1.5},
    "beta_end inf": {"beta_end": float("inf")},
    "beta_schedule 'cosine'": {"beta_schedule": "cosine"},
    "trained_betas": {"trained_betas": []},
    "flow-matching": {"use_flow_sigmas": True},
    "continuous": {"timestep_type": "continuous"},
    "num_train_timesteps 0": {"num_train_timesteps": 0},
    "prediction_type 'flow_prediction'": {"prediction_type": "flow_prediction"},
}


@pytest.fixture
def model(xl_model, tmp_path) -> Path:
    return shutil.copytree(xl_model, tmp_path / "model")


def change(config: Path, changes: dict) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def change_unet(model: Path, changes: dict) -> None:
    change(model / "unet" / "config.json", changes)


def change_scheduler(model: Path, changes: dict) -> None:
    change(model / "scheduler" / "scheduler_config.json", changes)


@pytest.mark.parametrize("named", UNETS)
def test_a_unet_with_other_conditioning_is_rejected_by_name(model, named):
    change_unet(model, UNETS[named])
    with pytest.raises(DataError, match=named):
        read_facts(find_model(str(model)))


@pytest.mark.parametrize("named", SCHEDULERS)
def test_another_noise_schedule_is_rejected_by_name(model, named):
    change_scheduler(model, SCHEDULERS[named])
    with pytest.raises(DataError, match=named):
        read_facts(find_model(str(model)))


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "DDIMScheduler"},
        {"_class_name": "LCMScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": False},
        {"trained_betas": [0.001, 0.002], "num_train_timesteps": 2} | dict.fromkeys(BETAS[:3]),
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": None},
    ],
)
def test_common_configs_are_accepted(model, changes):
    change_scheduler(model, changes)
    change_unet(model, {"time_cond_proj_dim": None, "class_embed_type": None, "num_class_embeds": 0})
    assert read_facts(find_model(str(model))).scheduler_config["_class_name"]


@pytest.fixture
def write_file(sd_model, tmp_path):
    """Return a function that writes an SD 1.5 single file with additional tensors and metadata."""
    add_to_hub_cache(copy_without_weights(sd_model, tmp_path / "bare"), FAMILY_BASES["sd15"])

    def write(metadata: dict | None = None, **more: torch.Tensor) -> Path:
        file = write_original(sd_model, tmp_path / "one.safetensors", "sd15", metadata)
        save_file(load_file(file) | more, file, metadata)
        return file

    return write


@pytest.mark.parametrize("marker", ["edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"])
def test_a_single_file_with_edm_markers_is_rejected(write_file, marker):
    with pytest.raises(DataError, match=f"its tensor {marker} marks EDM"):
        read_facts(find_model(str(write_file(**{marker: torch.ones(1)}))))


def test_markers_are_checked_before_the_configs_of_the_family(sd_model, tmp_path):
    file = write_original(sd_model, tmp_path / "one.safetensors", "sd15")
    save_file(load_file(file) | {"edm_mean": torch.zeros(4)}, file)
    with pytest.raises(DataError, match="its tensor edm_mean marks EDM"):
        find_model(str(file))


def test_a_single_file_of_a_whole_lcm_is_rejected(write_file):
    file = write_file(**{"model.diffusion_model.time_embed.cond_proj.weight": torch.ones(8, 256)})
    with pytest.raises(DataError, match="conditioned on the guidance scale"):
        read_facts(find_model(str(file)))


def test_a_single_file_for_inpainting_is_rejected(write_file):
    file = write_file(**{"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)})
    with pytest.raises(DataError, match="9 input channels"):
        read_facts(find_model(str(file)))


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
@pytest.mark.parametrize("markers", [("v_pred",), ("ztsnr",), ("v_pred", "ztsnr")])
def test_marker_tensors_have_priority_over_the_metadata(write_file, markers, key):
    file = write_file({key: "epsilon"}, **{marker: torch.zeros(0) for marker in markers})
    facts = read_facts(find_model(str(file)))
    assert facts.prediction_type == "v_prediction"
    (warning,) = facts.warnings
    assert f"its tensor {markers[0]} marks v_prediction" in warning and "\n" not in warning
    assert facts.with_prediction_type("epsilon").warnings == ()


@pytest.mark.parametrize(("declared", "marker"), [("v", "v_pred"), ("v_prediction", "ztsnr"), ("epsilon", None)])
def test_consistent_markers_give_no_warning(write_file, declared, marker):
    more = {} if marker is None else {marker: torch.zeros(0)}
    assert read_facts(find_model(str(write_file({"modelspec.prediction_type": declared}, **more)))).warnings == ()


@pytest.mark.parametrize("change_model", [change_unet, change_scheduler])
def test_every_command_rejects_a_model_with_the_same_message(cli, model, change_model):
    changes = {change_unet: UNETS["class_embed_type"], change_scheduler: SCHEDULERS["EDMEulerScheduler"]}
    change_model(model, changes[change_model])
    request = ("a hill", "--model", model, "--size", 64, "--steps", 2, "-o", "a.png")
    result = [
        cli(*command) for command in (("generate", *request), ("plan", *request[:-2]), ("models", "check", model))
    ]
    assert [code for code, _, _ in result] == [65] * 3
    assert len({err.splitlines()[-1].split("linfusion: ", 1)[1] for _, _, err in result}) == 1  # without the time
    assert f"{model} is not supported: its " in result[0][2] and not Path("a.png").exists()


def test_every_command_warns_of_a_contradictory_file(cli, write_file):
    file = write_file({"modelspec.prediction_type": "epsilon"}, v_pred=torch.zeros(0))
    request = ("a hill", "--model", file, "--linfusion", "none", "--size", 64, "--steps", 1)
    for command in (("generate", *request, "-o", "a.png"), ("plan", *request), ("models", "check", file)):
        code, out, err = cli(*command)
        assert code == 0 and (out + err).count("contradictory") == 1
    code, out, err = cli("plan", *request, "--prediction-type", "epsilon")
    assert code == 0 and "contradictory" not in out + err


@pytest.mark.parametrize("scheduler", ["euler-a", "pndm"])
def test_a_scheduler_that_cannot_take_a_prediction_of_the_sample_is_usage(cli, model, scheduler):
    change_scheduler(model, {"prediction_type": "sample"})
    code, _, err = cli("generate", "a", "--model", model, "--size", 64, "--steps", 2, "--scheduler", scheduler)
    assert code == 2 and f"--scheduler {scheduler}" in err


def test_the_schedule_of_the_tests_is_supported():
    assert {"beta_start", "beta_end", "beta_schedule"} <= build_scheduler_config().keys()

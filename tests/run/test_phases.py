"""Runs with several phases: the upscalers and their settings."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from linfusion_cli.core.errors import CannotCreateOutput, UsageError
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.mixers.linear.weights import load_weights
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.text.encode import encode_prompts
from linfusion_cli.planning import machine, plan
from linfusion_cli.planning.speed import Speed
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import predictors
from linfusion_cli.sampling.noise import draw_phase_noise
from linfusion_cli.strips.dilation import dilate
from linfusion_cli.strips.ops import StripSize
from tests.sampling.test_demofusion import naive_blur
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_models import write_small_sd


@pytest.fixture
def make(xl_model, tmp_path):
    """generate() with small settings, into tmp_path."""

    def run(output="out.png", observer=None, **changed):
        values = {"prompt": "a hill", "size": Size(256, 256), "model": str(xl_model), "steps": (8,), "strength": (0.5,)}
        values |= {"output": tmp_path / output, "upscaler": "demofusion", "vae_statistics": "exact"}
        return generate(make_request(**values | changed), {}, observer or Listener())

    return run


def list_upscaled_phases(phases):
    """Return the encoded start, the channel statistics of the base and the latents of each phase above the base."""
    states = [state for _, state in phases[1:]]
    return [(state.phase_state.start_latents, state.phase_state.base_statistics, state.latents) for state in states]


def read_pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def max_difference(one, other) -> int:
    """Return the largest difference between two images in 8-bit values."""
    return int(np.abs(read_pixels(one).astype(int) - read_pixels(other)).max())


def list_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run_reference_phase(folder, encoded, channels, index, r, scale=5.0):
    """Return the latents of a DemoFusion phase with Euler steps, implemented from the paper without strips."""
    facts = read_facts(Model(folder))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    text = encode_prompts(Model(folder), facts, "a hill", "", torch.float32, torch.device("cpu"))
    time_ids = torch.tensor([[256.0, 256, 0, 0, 256, 256]])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)
    timesteps = [int(t) for t in np.arange(8)[::-1] * 125 + 1][-4 if index == 1 else -2 :]
    sigmas = [float(((1 - signal[t]) / signal[t]) ** 0.5) for t in timesteps] + [0.0]
    noise = draw_phase_noise(0, index, *encoded.shape[1:])

    def guided(x, sigma, t):
        halves = []
        for half in (text.negative, text.positive):
            added = {"text_embeds": half.pooled, "time_ids": time_ids} if half.pooled is not None else None
            scaled = x / (sigma**2 + 1) ** 0.5
            halves.append(unet(scaled, t, half.hidden, added_cond_kwargs=added).sample)
        return halves[0] + scale * (halves[1] - halves[0])

    x = encoded + sigmas[0] * noise
    with torch.inference_mode(), mount_modules(unet, load_weights(folder / "linfusion", unet, torch.float32)):
        for sigma, after, t in zip(sigmas, sigmas[1:], timesteps, strict=False):
            cf = 0.5 * (1 + np.cos(np.pi * (1000 - t) / 1000))
            x = (1 - cf**3) * x + cf**3 * (encoded + sigma * noise)
            smooth = naive_blur(x, r, 0.8 * (0.99 * cf + 0.01))
            mean, std = smooth.mean((0, 2, 3), keepdim=True), smooth.std((0, 2, 3), keepdim=True)
            smooth = (smooth - mean) / std * x.std((0, 2, 3), keepdim=True) + x.mean((0, 2, 3), keepdim=True)
            plain = guided(x, sigma, t)
            with dilate(unet, r):
                x = x + (after - sigma) * ((1 - cf) * plain + cf * guided(smooth, sigma, t))
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std * channels.deviation + channels.mean


def test_demofusion_in_strips_matches_the_paper_without_strips(make, phases, xl_model):
    """Both upscaled phases, with dilation 2 and 4, from the same encoded image."""
    make(dilated_min=0.0)
    for index, (encoded, channels, latents) in enumerate(list_upscaled_phases(phases), 1):
        expected = run_reference_phase(xl_model, encoded, channels, index, r=2**index)
        assert (latents - expected).norm() / expected.norm() < 1e-4
    assert len(phases) == 3


def test_the_channels_of_every_phase_are_those_of_the_base(make, phases):
    make()
    for _, channels, latents in list_upscaled_phases(phases):
        torch.testing.assert_close(latents.mean((0, 2, 3), keepdim=True), channels.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(latents.std((0, 2, 3), keepdim=True), channels.deviation, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["euler-a", "dpmpp-2m-sde", "lcm"])
def test_the_image_does_not_depend_on_strips_even_where_noise_is_added(make, tmp_path, monkeypatch, scheduler):
    for rows in (16, 3):
        monkeypatch.setitem(plan.STRIP_SIZES, "cpu", (StripSize(rows, 64),))
        make(output=f"{rows}.png", scheduler=scheduler, size=Size(160, 136))
    assert max_difference(tmp_path / "16.png", tmp_path / "3.png") <= 1


def test_the_upscalers_make_different_images_of_the_same_base(make, tmp_path):
    for upscaler in ("demofusion", "sdedit"):
        make(output=f"{upscaler}.png", upscaler=upscaler, save_phases=True)
    assert max_difference(tmp_path / "demofusion-64x64.png", tmp_path / "sdedit-64x64.png") == 0
    assert max_difference(tmp_path / "demofusion.png", tmp_path / "sdedit.png") > 0


def test_without_an_upscaler_there_is_one_phase_at_the_full_size(make):
    report = make(upscaler="none", size=Size(150, 130))
    stages = [(stage["kind"], stage["size"], stage["steps"]) for stage in report.plan["stages"]]
    assert stages == [("denoise", "160x160", 8), ("decode", "160x160", 0)]
    assert report.plan["stages"][0]["strategy"]["attention"] == "linear"  # larger than the model's native size


def test_dilated_passes_are_planned_and_run_as_often_as_their_weight_asks(make, monkeypatch):
    calls, forward = [], plan.CostEstimator.estimate_forward
    monkeypatch.setattr(
        machine, "measure_speed", lambda *_: Speed(1e12, 1e10)
    )  # two measurements on a busy machine differ
    monkeypatch.setattr(
        plan.CostEstimator,
        "estimate_forward",
        lambda self, mode, size, r=1, *more: calls.append(r) or forward(self, mode, size, r, *more),
    )
    always, never = (make(output=f"{least}.png", dilated_min=least) for least in (0.0, 1.0))
    assert set(calls) == {1, 2, 4}
    seconds = [
        [stage["estimate"]["seconds"] for stage in report.plan["stages"] if stage["kind"] == "denoise"]
        for report in (always, never)
    ]
    assert seconds[0][1] > 1.5 * seconds[1][1]


def test_guidance_outside_its_interval_skips_the_unconditional_half(make, monkeypatch):
    halves, predictor = [], predictors.WholeUNet.build_predictor

    def counted(self, text, added):
        predict = predictor(self, text, added)
        return lambda latents, timestep: halves.append(float(timestep)) or predict(latents, timestep)

    monkeypatch.setattr(predictors.WholeUNet, "build_predictor", counted)
    make(size=Size(64, 64), guidance_interval=(1.0, 5.0))
    always = len(set(halves))
    assert always == 8 < len(halves) < 16


def test_every_phase_is_saved_next_to_the_output(make, tmp_path):
    make(output="a.tif", save_phases=True, bits=16)
    assert list_names(tmp_path) == {"a.tif", "a-64x64.tif", "a-128x128.tif"}
    for name, side in (("a-64x64.tif", 64), ("a-128x128.tif", 128), ("a.tif", 256)):
        info = read_info(tmp_path / name)
        assert (info.width_px, info.height_px, info.bits) == (side, side, 16) and info.request["prompt"] == "a hill"


def test_saving_phases_does_not_change_the_image(make, tmp_path):
    make(output="a.png")
    make(output="b.png", save_phases=True)
    assert max_difference(tmp_path / "a.png", tmp_path / "b.png") == 0


def test_an_existing_phase_file_is_refused_before_any_work(make, tmp_path):
    (tmp_path / "a-128x128.tif").write_bytes(b"mine")
    listener = Listener()
    with pytest.raises(CannotCreateOutput, match=r"a-128x128\.tif"):
        make(output="a.tif", save_phases=True, observer=listener)
    assert list_names(tmp_path) == {"a-128x128.tif"}


@pytest.mark.parametrize("save", [False, True])
def test_latents_can_be_enlarged_instead_of_pixels(make, tmp_path, save):
    report = make(output="latent.png", upscale_space="latent", save_phases=save)
    kinds = [stage["kind"] for stage in report.plan["stages"]]
    decodes = ["decode"] if save else []
    assert kinds == ["denoise", *decodes, "denoise", *decodes, "denoise", "decode"]
    make(output="pixel.png")
    assert max_difference(tmp_path / "latent.png", tmp_path / "pixel.png") > 0


def test_the_size_conditioning_can_be_set(make, monkeypatch):
    recorded = []
    monkeypatch.setattr(
        "linfusion_cli.models.text.encode.PromptEmbedding.build_added_conditions",
        lambda self, sizes: (
            recorded.append(sizes.values)
            or {"text_embeds": self.pooled, "time_ids": torch.tensor([sizes.values], dtype=torch.float32)}
        ),
    )
    make(size=Size(100, 70))
    assert recorded[0] == [70, 100, 0, 0, 70, 100]  # the size of the final image in every phase
    recorded.clear()
    sizes = {"original_size": Size(640, 480), "crop_top_left": (8, 16), "target_size": Size(320, 240)}
    make(output="b.png", size=Size(100, 70), **sizes)
    assert recorded and all(numbers == [480, 640, 8, 16, 240, 320] for numbers in recorded)


@pytest.mark.parametrize(("base", "reason"), [(Size(100, 100), "32"), (Size(128, 64), "256x256")])
def test_an_invalid_base_size_is_refused(make, base, reason):
    with pytest.raises(UsageError, match="--base-size") as refused:
        make(base_size=base)
    assert reason in str(refused.value)


def test_phases_start_at_the_given_base_size(make):
    report = make(base_size=Size(96, 96))
    assert [stage["size"] for stage in report.plan["stages"] if stage["kind"] == "denoise"] == [
        "96x96",
        "192x192",
        "256x256",
    ]


def test_v_prediction_works_in_every_phase(tmp_path, phases):
    """A whole run with v_prediction, as in SD 2.1. The scheduler tests check the steps themselves."""
    folder = write_small_sd(tmp_path / "model", prediction_type="v_prediction")
    request = make_request(
        prompt="a hill", size=Size(256, 256), output=tmp_path / "a.png", model=str(folder), linfusion="none",
        steps=(8,), strength=(0.5,), upscaler="demofusion", dilated_min=0.0, vae_statistics="exact",
    )  # fmt: skip
    generate(request, {}, Listener())
    assert len(phases) == 3 and all(state.latents.isfinite().all() for _, state in phases)


def test_a_scheduler_that_cannot_start_in_the_middle_is_refused_for_phases_only(make):
    with pytest.raises(UsageError, match="--scheduler pndm"):
        make(scheduler="pndm")
    make(scheduler="pndm", size=Size(64, 64))

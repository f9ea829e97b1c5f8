"""The pipeline from the request to the file, compared with diffusers, and its failures."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linfusion_cli.core.errors import CannotCreateOutput, DataError, OutOfMemoryBudget, Stopped, UsageError, WriteFailed
from linfusion_cli.core.events import Notice, StageAdvanced, StageFinished, StageStarted
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.planning import plan
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import predictors
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.unet import predict
from linfusion_cli.unet.predict import WholeUNet
from tests.support.fakes import Listener
from tests.support.requests import make_request


@pytest.fixture
def make(xl_model, tmp_path):
    """Return a function that calls generate() with small settings and writes to tmp_path."""

    def run(observer=None, output="out.png", **changed):
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (4,), "strength": (0.5,)}
        request = make_request(**values | {"output": tmp_path / output} | changed)
        return generate(request, {}, observer or Listener())

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("size", [Size(64, 64), Size(128, 128), Size(201, 133), Size(70, 97), Size(64, 300)])
@pytest.mark.parametrize("output", ["a.tif", "a.png", "a.jpg"])
def test_the_file_has_exactly_the_size_asked_for(make, tmp_path, size, output):
    report = make(size=size, output=output)
    info = read_info(tmp_path / output)
    assert (info.width_px, info.height_px) == size.pair
    assert pixels(tmp_path / output).shape == (size.height, size.width, 3)
    assert files(tmp_path) == {output} and report.file_bytes == (tmp_path / output).stat().st_size


def test_the_base_matches_diffusers(make, xl_model, tmp_path):
    """One phase with the model's own attention gives the same pixels as the diffusers pipeline with the same seed."""
    from diffusers import StableDiffusionXLPipeline

    make(size=Size(64, 64), linfusion="none", seed=5, guidance_scale=(3.0,), guidance_rescale=0.3)
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    expected = pipeline(
        "a hill",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        guidance_rescale=0.3,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    np.testing.assert_allclose(pixels(tmp_path / "out.png") / 255, expected, atol=0.6 / 255)


def test_two_phases_match_sdedit_on_the_whole_image(make, xl_model, tmp_path):
    """Two phases match a plain implementation without strips: decode, resize, encode, add noise, denoise, decode."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    from linfusion_cli.sampling.noise import draw_phase_noise

    make(size=Size(128, 128), linfusion="none", guidance_scale=(1.0,))
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model)
    vae: AutoencoderKL = pipeline.vae
    sizes = {"original_size": (128, 128), "target_size": (128, 128), "guidance_scale": 1.0}
    start = pipeline(
        "a hill", width=64, height=64, num_inference_steps=4, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(0), **sizes,
    ).images  # fmt: skip
    with torch.inference_mode():
        image = (vae.decode(start / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        planes = [Image.fromarray(plane.numpy()).resize((128, 128), Image.Resampling.LANCZOS) for plane in image[0]]
        large = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 1)[None]
        encoded = vae.encode(large * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    pipeline.scheduler.set_timesteps(4)
    noised = encoded + pipeline.scheduler.sigmas[2] * draw_phase_noise(0, 1, 4, 16, 16)
    # The pipeline would scale `latents` as initial noise and run all steps, so the last two steps are done by hand.
    hidden, _, pooled, _ = pipeline.encode_prompt("a hill", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
    sigmas, timesteps = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps
    with torch.inference_mode():
        for i in (2, 3):
            scaled = noised / (sigmas[i] ** 2 + 1) ** 0.5
            noise = pipeline.unet(scaled, timesteps[i], hidden, added_cond_kwargs=added).sample
            noised = noised + (sigmas[i + 1] - sigmas[i]) * noise
        expected = (vae.decode(noised / vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(pixels(tmp_path / "out.png") / 255, expected.permute(1, 2, 0), atol=1.1 / 255)


def test_the_same_request_gives_the_same_file(make, tmp_path):
    for name in ("a.tif", "b.tif"):
        make(output=name)
    assert np.array_equal(pixels(tmp_path / "a.tif"), pixels(tmp_path / "b.tif"))
    make(output="c.tif", seed=1)
    assert not np.array_equal(pixels(tmp_path / "a.tif"), pixels(tmp_path / "c.tif"))


def test_linfusion_changes_the_image(make, tmp_path):
    make(output="linear.png")
    make(output="softmax.png", linfusion="none")
    assert not np.array_equal(pixels(tmp_path / "linear.png"), pixels(tmp_path / "softmax.png"))


def test_strips_of_any_height_give_the_same_image(make, tmp_path, monkeypatch):
    """The plan depends on the machine. Different strips change the image only by rounding, here one 8-bit value."""
    for rows in (16, 3):
        monkeypatch.setitem(plan.STRIP_SIZES, "cpu", (StripSize(rows, 64),))
        make(output=f"{rows}.png", attention=("linear",), size=Size(160, 136))
    difference = np.abs(pixels(tmp_path / "16.png").astype(int) - pixels(tmp_path / "3.png"))
    assert difference.max() <= 1


def test_a_phase_in_strips_matches_the_whole_forward_with_linear_attention(make, tmp_path, monkeypatch):
    make(output="strips.png", attention=("linear",), size=Size(160, 136))
    monkeypatch.setattr(
        predictors,
        "build_runners",
        lambda run, unet, strategy, phase, _: [WholeUNet(unet), WholeUNet(unet, phase.dilation)],
    )
    make(output="whole.png", attention=("linear",), size=Size(160, 136))
    difference = np.abs(pixels(tmp_path / "strips.png").astype(int) - pixels(tmp_path / "whole.png"))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("attention", "linfusion", "expected"),
    [
        ("auto", "auto", ["original", "linear"]),
        ("linear", "auto", ["linear", "linear"]),
        ("original", "auto", ["original", "original"]),
        ("linear,original", "auto", ["linear", "original"]),
        ("linear,auto", "auto", ["linear", "linear"]),
        ("auto", "none", ["original", "original"]),
    ],
)
def test_each_phase_has_the_attention_asked_for(make, attention, linfusion, expected):
    report = make(attention=tuple(attention.split(",")), linfusion=linfusion)
    stages = [stage for stage in report.plan["stages"] if stage["kind"] == "denoise"]
    assert [stage["strategy"]["attention"] for stage in stages] == expected
    are_strips = [stage["strategy"]["kind"] == "denoise_strips" for stage in stages]
    assert are_strips == [kind == "linear" for kind in expected]


def test_invalid_attention_is_a_usage_error(make):
    with pytest.raises(UsageError, match="--attention.*3"):
        make(attention=("auto", "linear", "linear"))
    with pytest.raises(UsageError, match="(?i)linfusion"):
        make(attention=("linear",), linfusion="none")
    with pytest.raises(UsageError, match="--attention .*quadratic"):
        make(attention=("quadratic",))


def test_the_report_has_planned_and_measured_figures(make):
    report = make()
    planned = [stage for stage in report.stages if stage.planned_seconds is not None]
    assert [stage.kind for stage in planned] == ["denoise", "decode", "start", "denoise", "decode"]
    assert all(stage.planned_host_bytes > 0 and stage.planned_device_bytes is None for stage in planned)


def test_a_memory_budget_that_is_too_small_is_refused_before_any_work(make, tmp_path):
    listener = Listener()
    with pytest.raises(OutOfMemoryBudget, match=r"memory.*1\.0 MiB"):
        make(listener, ram=1 << 20)
    assert [event.kind for event in listener.of(StageStarted)] == ["resolve", "plan"] and not files(tmp_path)


def test_running_out_of_memory_in_a_step_is_reported_and_repeated(make, tmp_path, monkeypatch):
    make(output="a.png", attention=("linear",))
    run, refused = predict.strip_forward, []

    def scarce(unet, strips, latents, *rest):
        if not refused:
            refused.append(strips.size)
            raise torch.cuda.OutOfMemoryError("out of memory")
        return run(unet, strips, latents, *rest)

    monkeypatch.setattr(predict, "strip_forward", scarce)
    listener = Listener()
    make(listener, output="b.png", attention=("linear",))
    notices = [event.text for event in listener.of(Notice)]
    assert refused and len(notices) == 1 and re.search(r"memory.* strips of \d+ rows", notices[0])
    difference = np.abs(pixels(tmp_path / "a.png").astype(int) - pixels(tmp_path / "b.png"))
    assert difference.max() <= 1


def test_sd15_works_too(make, sd_model, tmp_path):
    make(model=str(sd_model), linfusion="none", size=Size(130, 70))
    assert pixels(tmp_path / "out.png").shape == (70, 130, 3)


def test_the_metadata_have_the_request(make, tmp_path):
    prompt = 'a [cat] 😀 <&>\n"quoted"'
    make(prompt=prompt, negative_prompt="dogs", output="a.tif", dpi=72)
    info = read_info(tmp_path / "a.tif")
    assert info.request["prompt"] == prompt and info.request["steps"] == [4] and info.dpi == 72
    make(prompt=prompt, output="b.tif", prompt_metadata=False)
    assert "😀" not in json.dumps(read_info(tmp_path / "b.tif").request, ensure_ascii=False)


def test_a_preview_is_the_image_in_small(make, tmp_path):
    make(preview=tmp_path / "small.jpg")
    difference = pixels(tmp_path / "small.jpg").astype(int) - pixels(tmp_path / "out.png")
    assert np.abs(difference).mean() < 4


def test_events_and_report_have_the_same_stages(make):
    listener = Listener()
    report = make(listener)
    started, finished = listener.of(StageStarted), listener.of(StageFinished)
    found = [(stage.kind, stage.phase_name) for stage in report.stages]
    assert found == [(event.kind, event.phase_name) for event in started]
    assert [kind for kind, phase in found if phase is None] == [
        *("resolve", "plan", "resolve", "load", "encode_prompts", "load", "write")
    ]
    assert [f"{kind} {phase}" for kind, phase in found if phase] == [
        *("denoise base", "decode base", "start 2x", "denoise 2x", "decode 2x")
    ]
    assert len(started) == len(finished)
    steps = {stage.phase_name: stage.steps for stage in report.stages if stage.kind == "denoise"}
    assert steps == {"base": 4, "2x": 2}
    assert all(stage.peak_host_bytes > 1 << 20 for stage in report.stages if stage.kind in ("denoise", "decode"))
    assert 0 < sum(stage.seconds for stage in report.stages) <= report.total_seconds
    json.dumps(report.to_json(), allow_nan=False)


def test_a_truncated_prompt_is_reported(make):
    listener = Listener()
    make(listener, prompt="x" * 100)
    assert any(
        "prompt" in notice.text and "77" in notice.text and "xxx" in notice.text for notice in listener.of(Notice)
    )


def test_an_existing_file_is_refused_before_any_work_and_kept(make, tmp_path):
    (tmp_path / "out.png").write_text("precious")
    listener = Listener()
    with pytest.raises(CannotCreateOutput, match="--overwrite"):
        make(listener)
    assert (tmp_path / "out.png").read_text() == "precious" and not listener.events
    make(overwrite=True)
    assert pixels(tmp_path / "out.png").shape == (128, 128, 3)


def test_a_disk_without_room_is_refused_before_any_work(make, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(WriteFailed, match=r"1000 B.*128x128.*MiB"):
        make()
    assert files(tmp_path) == set()


def test_an_unknown_suffix_is_refused(make):
    with pytest.raises(UsageError, match="gif"):
        make(output="a.gif")


@pytest.mark.parametrize("event", [StageStarted, StageAdvanced, StageFinished])
@pytest.mark.parametrize("after", [0, 3, 6])
def test_stopping_anywhere_leaves_only_the_checkpoint(make, tmp_path, event, after):
    left = [after]

    def stop(seen):
        if isinstance(seen, event):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped(15)

    with pytest.raises(Stopped):
        make(stop, preview=tmp_path / "small.jpg")
    assert files(tmp_path) <= {"out.png.linfusion"}
    make(preview=tmp_path / "small.jpg")
    assert files(tmp_path) == {"out.png", "small.jpg"}


def test_a_model_that_gives_nan_ends_with_an_error_and_no_file(make, xl_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(xl_model, tmp_path / "nan")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in ("conv_norm_out.weight", "conv_out.weight"):  # numbers themselves, but not what comes of them
        tensors[name] *= 1e20
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"NaN or Inf at step 1 of 4 in phase base \(float32\)"):
        make(model=str(folder))
    assert files(tmp_path) == {"nan"}


def test_a_preview_that_fails_keeps_the_image(make, tmp_path, monkeypatch):
    from linfusion_cli import images

    def fail(self, *rows):
        self.abort()
        raise WriteFailed("No space left for the preview.")

    for method in ("write", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(images.PreviewSink, method, fail)
            with pytest.raises(WriteFailed, match="preview.*No space"):
                make(preview=tmp_path / "small.jpg", overwrite=True)
        assert files(tmp_path) == {"out.png", "out.png.linfusion"} and pixels(tmp_path / "out.png").shape == (
            128,
            128,
            3,
        )


def test_an_image_that_fails_leaves_no_preview(make, tmp_path, monkeypatch):
    def fail(self):
        raise WriteFailed("No space left.")

    monkeypatch.setattr("linfusion_cli.images.write.png.PngSink.close", fail)
    with pytest.raises(WriteFailed):
        make(preview=tmp_path / "small.jpg")
    assert files(tmp_path) == {"out.png.linfusion"}


def test_a_file_that_is_moved_away_at_once_is_still_a_success(make, tmp_path):
    def move(event):
        if isinstance(event, StageFinished) and (tmp_path / "out.png").exists():
            (tmp_path / "out.png").rename(tmp_path / "taken.png")

    report = make(move)
    assert report.file_bytes is None and files(tmp_path) == {"taken.png"}


def test_free_space_is_checked_on_the_disk_of_the_link_target(make, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "out.png").symlink_to(tmp_path / "far" / "real.png")
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return shutil._ntuple_diskusage(1, 1, 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    make()
    assert asked == [tmp_path / "far"] and (tmp_path / "far" / "real.png").exists()

"""Models that stay loaded between jobs change no image and need no more memory; complete images are skipped."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from linfusion_cli.batch.parsers.job_spec import JobSpec
from linfusion_cli.batch.runner import dry_run_job, run_job
from linfusion_cli.core.events import ignore_event
from linfusion_cli.core.geometry import Size
from linfusion_cli.hardware.host_memory import resident_bytes
from linfusion_cli.hardware.peak import release_memory
from linfusion_cli.models.load.networks import Vae
from linfusion_cli.models.text.tokens import load_tokenizer
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import denoise
from linfusion_cli.run.stages import load as stages_load
from tests.batch.helpers import builder, job_specs, run_batch
from tests.support.other_process import lock_in_other_process
from tests.support.small_controlnets import build_small_controlnet, write_controlnet
from tests.support.small_ip_adapters import write_adapter, write_encoder, write_image
from tests.support.small_models import build_small_xl_unet


@pytest.fixture
def batch(tmp_path):
    """`run_batch` in tmp_path/out."""
    return partial(run_batch, tmp_path / "out")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def counted(monkeypatch):
    """Count how often each kind of model is loaded."""
    counts = {"unet": 0, "vae": 0, "text": 0}

    def counting(name, function):
        def load(*arguments):
            counts[name] += 1
            return function(*arguments)

        return load

    monkeypatch.setattr(stages_load, "load_unet", counting("unet", stages_load.load_unet))
    monkeypatch.setattr(stages_load, "load_vae", counting("vae", stages_load.load_vae))
    monkeypatch.setattr("linfusion_cli.models.text.encode.load_tokenizer", counting("text", load_tokenizer))
    return counts


@pytest.fixture(scope="module")
def guides(tmp_path_factory):
    """Write an IP-Adapter, its encoder, a ControlNet for the small SDXL, and an image."""
    folder = tmp_path_factory.mktemp("guides")
    write_encoder(folder / "image_encoder")
    write_adapter(folder / "adapter.safetensors", build_small_xl_unet())
    write_controlnet(folder / "control", build_small_controlnet(build_small_xl_unet(), 1))
    write_image(folder / "a.png", width=64, height=64)
    return folder


def guided(guides: Path) -> dict[str, dict]:
    """Return the settings of jobs that use an image prompt or a ControlNet."""
    image, adapter = (str(guides / "a.png"),), (str(guides / "adapter.safetensors"),)
    return {
        "ip": {"ip_adapter": adapter, "ip_image": image},
        "ip more": {"ip_adapter": adapter, "ip_image": image, "ip_scale": (0.4,)},
        "control": {"controlnet": (str(guides / "control"),), "control_image": image, "control_phases": ("all",)},
    }


def variety(xl: Path, sd: Path, lora: Path, guides: dict[str, dict]) -> list[dict]:
    """Return jobs that share models, parts of models, or nothing."""
    xl, sd = {"model": str(xl)}, {"model": str(sd), "linfusion": "none"}
    return [
        {"prompt": "a hill", "seed": 1, **xl},
        {"prompt": "a sea", "seed": 2, "size": Size(128, 64), **xl},
        {"prompt": "a sea", "seed": 2, **sd},
        {"prompt": "a sea", "seed": 2, "lora": (f"{lora}:0.5",), **xl},
        {"prompt": "a hill", "seed": 1, "attention": ("original",), "clip_skip": 1, **xl},
        {"prompt": "a hill", "seed": 3, "guidance_scale": (1.0,), "vae_statistics": "sampled", **xl},
        {"prompt": "a sea", "seed": 2, "size": Size(72, 64), "upscaler": "demofusion", "dilated_min": 0.0, **xl},
        *({"prompt": "a sea", "size": Size(128, 128), **xl, **guide} for guide in guides.values()),
    ]


@pytest.fixture
def small_lora(tmp_path):
    torch.manual_seed(3)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    shapes = {layer: (16, 16), text: (16, 16)}
    tensors = {f"{name}.lora_{half}.weight": torch.randn(*size) for name, (out, into) in shapes.items()
               for half, size in (("A", (2, into)), ("B", (out, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.mark.slow
def test_a_job_gives_the_image_it_gives_alone_whatever_ran_before(
    batch, tmp_path, xl_model, sd_model, small_lora, guides
):
    jobs = variety(xl_model, sd_model, small_lora, guided(guides))
    alone = []
    for number, values in enumerate(jobs):
        _, request = builder(strength=(0.5,), output=tmp_path / f"{number}.png")(values)
        generate(request, {}, ignore_event)
        alone.append(pixels(tmp_path / f"{number}.png"))
    order = [3, 7, 0, 9, 1, 5, 2, 6, 8, 4, 0, 3]  # some again, after other jobs
    collector, _ = batch(
        [JobSpec(line, jobs[number]) for line, number in enumerate(order, 1)], run_job, build=builder(strength=(0.5,))
    )
    assert set(collector.status().values()) == {"done"}, [result.error for result in collector.results]
    for result in collector.results:
        assert np.array_equal(pixels(Path(result.output)), alone[order[result.line - 1]]), result.line


def test_models_are_loaded_once_for_all_jobs_that_share_them(batch, counted, xl_model, sd_model):
    models = [str(xl_model), str(sd_model), str(xl_model), str(sd_model), str(xl_model)]
    jobs = [JobSpec(line, {"model": model, "prompt": f"hill {line}"}) for line, model in enumerate(models, 1)]
    collector, _ = batch(jobs, run_job, build=builder(linfusion="none"))
    assert set(collector.status().values()) == {"done"} and counted == {"unet": 2, "vae": 2, "text": 3}


def test_a_vae_with_a_changed_dtype_is_loaded_again(batch, counted, xl_model):
    def make(request, origins, observer, model_cache):
        report = run_job(request, origins, observer, model_cache)
        (vae,) = (value for value in model_cache.values() if isinstance(value, Vae))
        vae.to(torch.float64)
        return report

    collector, _ = batch(job_specs(2, model=str(xl_model)), make)
    assert set(collector.status().values()) == {"done"} and counted == {"unet": 1, "vae": 2, "text": 2}


def test_complete_images_are_skipped_by_content_without_loading_models(batch, tmp_path, counted, xl_model):
    jobs = job_specs(3, model=str(xl_model))
    batch(jobs, run_job)
    before = counted.copy()
    (tmp_path / "out/0002-hill-2-0.png").unlink()
    whole = (tmp_path / "out/0003-hill-3-0.png").read_bytes()
    (tmp_path / "out/0003-hill-3-0.png").write_bytes(whole[:-30])
    collector, _ = batch(jobs, dry_run_job)
    assert collector.status() == {1: "skipped", 2: "planned", 3: "failed"} and counted == before
    collector, _ = batch(jobs, run_job, build=builder(overwrite=True, ram=8 << 30))
    assert collector.status() == {1: "skipped", 2: "done", 3: "done"}
    assert len((tmp_path / "out/0003-hill-3-0.png").read_bytes()) > len(whole) - 30


def test_another_request_under_the_same_name_is_refused(batch, tmp_path, xl_model):
    jobs = [JobSpec(1, {"model": str(xl_model), "output": "a.png"})]
    batch(jobs, run_job)
    before = (tmp_path / "out/a.png").read_bytes()
    for changed in ({"seed": 1}, {"prompt": "a sea"}, {"steps": (2,)}, {"linfusion": "none"}, {"dpi": 72.0}):
        collector, _ = batch(jobs, run_job, build=builder(**changed))
        assert collector.results[0].exit_code == 73 and "a.png exists" in collector.results[0].error
    assert (tmp_path / "out/a.png").read_bytes() == before
    collector, _ = batch(jobs, run_job, build=builder(seed=1, overwrite=True))
    assert collector.status() == {1: "done"} and (tmp_path / "out/a.png").read_bytes() != before


def test_other_weights_or_another_image_under_the_same_name_are_another_request(batch, tmp_path, xl_model):
    model = shutil.copytree(xl_model, tmp_path / "model")
    jobs = job_specs(1, model=str(model))
    batch(jobs, run_job)
    assert batch(jobs, run_job)[0].status() == {1: "skipped"}
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"] += 0.5
    save_file(state, weights, {"format": "pt"})
    assert batch(jobs, run_job)[0].results[0].exit_code == 73


@pytest.mark.slow
def test_memory_after_fifty_jobs_is_that_after_two(batch, sd_model):
    """Measure the process with loaded models after freeing unused memory."""
    measured = []

    def make(request, origins, observer, model_cache):
        report = run_job(request, origins, observer, model_cache)
        release_memory(None)
        measured.append(resident_bytes())
        return report

    collector, _ = batch(job_specs(50), make, build=builder(model=str(sd_model), guidance_scale=(1.0,)))
    assert set(collector.status().values()) == {"done"} and len(measured) == 50
    assert measured[-1] - measured[1] < 16 << 20


def test_text_encoders_stay_only_where_there_is_room_for_them(batch, counted, monkeypatch, sd_model):
    jobs = job_specs(3, model=str(sd_model))
    batch(jobs[:2], run_job, build=builder(ram=8 << 30))
    assert counted["text"] == 1
    monkeypatch.setattr("linfusion_cli.run.stages.cache_keys.count_weight_bytes", lambda networks: 8 << 30)
    collector, _ = batch(jobs, run_job, build=builder(ram=8 << 30, seed=1))
    assert set(collector.status().values()) == {"done"} and counted["text"] == 4


def test_a_file_that_another_run_writes_is_locked(batch, tmp_path, sd_model):
    jobs = job_specs(2, model=str(sd_model))
    (tmp_path / "out").mkdir()
    with lock_in_other_process(tmp_path / "out/.0001-hill-1-0.png.part"):
        collector, runner = batch(jobs, run_job)
    assert collector.status() == {1: "locked", 2: "done"} and runner.summary.exit_code == 75
    assert batch(jobs, run_job)[1].summary.exit_code == 0


def test_models_are_loaded_again_after_a_bug(batch, counted, monkeypatch, sd_model):
    real, calls = denoise.probe_prediction_type, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("oops")
        return real(*arguments)

    monkeypatch.setattr(denoise, "probe_prediction_type", fail)
    collector, _ = batch(job_specs(3, model=str(sd_model)), run_job)
    assert collector.status() == {1: "done", 2: "failed", 3: "done"} and counted == {"unet": 2, "vae": 2, "text": 2}

"""`linfusion plan` on a machine without a GPU and without models: all families, all errors, no traceback."""

import json

import pytest
import torch

from linfusion_cli.core.units import parse_bytes
from linfusion_cli.models.locate.published import get_configs
from tests.support.fake_hub import COMMIT

GIB = 1 << 30
RAM = ("--ram", "64GiB")  # so that results do not depend on the memory of the machine that runs the tests

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def plan_json(cli, *options):
    """Plan as JSON -> the values, and the lines on stderr."""
    code, out, err = cli("plan", *options, *RAM, "--json")
    assert code == 0, err
    return json.loads(out), err.splitlines()


def find_seconds(values):
    return [values["plan"]["seconds"], *(stage["estimate"]["seconds"] for stage in values["plan"]["stages"])]


def test_a_budget_alone_gives_memory_but_no_time(cli):
    options = ("--preset", "sdxl", "--size", "16384", "--device", "cuda", "--vram", "24GiB")
    values, (notice,) = plan_json(cli, *options)
    assert "SDXL is not installed: planned from its published configs." in notice
    assert values["estimated"] is True and values["gpu"] == {"name": None, "memory_bytes": None}
    assert set(find_seconds(values)) == {None}
    assert values["plan"]["device_budget_bytes"] == 24 * GIB
    assert 17 * GIB < values["plan"]["device_bytes"] <= 24 * GIB
    code, out, err = cli("plan", *options)
    assert code == 0 and "time is unknown" in out and "nan" not in out and "--ram sets another" in out


def test_a_named_gpu_gives_memory_and_time(cli):
    values, notices = plan_json(cli, "--preset", "sdxl", "--size", "16384", "--gpu", "RTX 4090")
    assert len(notices) == 1 and values["estimated"] is True
    assert values["gpu"] == {"name": "NVIDIA GeForce RTX 4090", "memory_bytes": 24 * GIB}
    assert values["plan"]["device_budget_bytes"] == int(0.9 * 24 * GIB)
    assert (values["execution"]["device"], values["settings"]["device"]) == ("cuda", "--gpu")
    assert all(seconds > 0 for seconds in find_seconds(values))
    code, out, _ = cli("plan", "--preset", "sd15", "--gpu", "rtx4090", *RAM)
    assert code == 0 and "Estimate for one NVIDIA GeForce RTX 4090 (24.0 GiB)" in out


def test_a_faster_gpu_takes_less_time_and_a_larger_one_keeps_maps_on_it(cli):
    small, _ = plan_json(cli, "--preset", "sdxl", "--size", "16384", "--gpu", "rtx3060")
    large, _ = plan_json(cli, "--preset", "sdxl", "--size", "16384", "--gpu", "h200")
    places = [
        next(s for s in v["plan"]["stages"] if (s["kind"], s["phase_name"]) == ("denoise", "16x"))["strategy"]["place"]
        for v in (small, large)
    ]
    assert places[0] != "device" and places[1] == "device"
    assert small["plan"]["seconds"] > 5 * large["plan"]["seconds"]


@pytest.mark.parametrize("preset", ["sd15", "sd21", "sdxl-lcm", "sdxl-hyper", "sdxl-lightning"])
def test_every_preset_is_planned_without_its_weights_and_loras(cli, preset):
    values, notices = plan_json(cli, "--preset", preset, "--gpu", "t4")
    assert values["plan"]["stages"] and len(notices) == (2 if preset.startswith("sdxl-") else 1)
    assert any("is not installed: planned from its published configs." in line for line in notices)
    loras = values["request"]["lora"]
    assert all(any(f"--lora {lora['model']} is not installed" in line for line in notices) for lora in loras)


def test_a_lora_does_not_change_the_plan(cli):
    plans = [
        plan_json(cli, "--preset", "sd15", "--gpu", "t4", *lora)[0]["plan"]["device_bytes"]
        for lora in ((), ("--lora", "someone/lora", "--textual-inversion", "someone/word"))
    ]
    assert plans[0] == plans[1]


def test_the_demo_model_and_no_preset_are_planned_as_before(cli):
    values, notices = plan_json(cli, "--preset", "demo", "--gpu", "h100")
    assert notices == [] and values["gpu"]["name"] == "NVIDIA H100 80 GB"
    values, notices = plan_json(cli, "a hill", "--size", "512")
    assert values["request"]["model"] == "demo" and len(notices) == 1 and "embedded demo model" in notices[0]
    assert values["estimated"] is False and values["gpu"] is None and None not in find_seconds(values)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--device", "cuda"], 69, "Add --vram 24GiB or --gpu rtx4090 to plan for a GPU"),
        (["--device", "cuda:5"], 69, "Add --vram 24GiB or --gpu rtx4090 to plan for a GPU"),
        (["--gpu", "rtx4099"], 2, "Did you mean rtx4090? Known are "),
        (["--gpu", ""], 2, "Known are "),
        (["--gpu", "h100", "--device", "cpu"], 2, "--gpu cannot be combined with --device cpu"),
        (["--gpu", "h100", "--device", "tpu"], 2, "--device 'tpu' is unknown"),
        (["--gpu", "t4", "--vram", "24GiB"], 2, "more than the NVIDIA T4 has"),
        (["--gpu", "t4", "--vram", "0"], 2, "--vram 0"),
        (["--gpu", "t4", "--vram", "lots"], 2, "--vram 'lots'"),
        (["--gpu", "t4", "--dtype", "bfloat16"], 2, "not supported by the NVIDIA T4"),
        (["--gpu", "t4", "--model", "someone/else"], 69, "--model someone/else is not on this machine"),
        (["--gpu", "t4", "--vae", "someone/vae"], 69, "--vae someone/vae is not on this machine"),
        (["--gpu", "t4", "--lora", "missing.safetensors"], 69, "--lora missing.safetensors does not exist"),
        (["--gpu", "t4", "--linfusion", "someone/weights"], 69, "--linfusion someone/weights"),
        (["--device", "cuda", "--vram", "1GiB"], 71, "Use --vram "),
        (["--gpu", "rtx4090", "--attention", "original", "--size", "16384"], 71, "use --attention linear"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line(cli, options, code, text):
    exit_code, out, err = cli("plan", "a hill", "--preset", "sd15", *RAM, *options)
    lines = [line for line in err.splitlines() if "is not installed" not in line]
    assert (exit_code, out) == (code, "") and len(lines) == 1 and text in lines[0]


def test_a_missing_controlnet_stays_an_error(cli, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
    options = ("--controlnet", "someone/canny", "--control-image", "edges.png")
    code, out, err = cli("plan", "--preset", "sd15", "--gpu", "t4", *options, *RAM)
    assert (code, out) == (69, "") and "--controlnet someone/canny is not on this machine" in err


def test_the_budget_that_is_named_is_sufficient(cli):
    options = ("plan", "--preset", "sdxl", "--size", "16384", "--device", "cuda", *RAM)
    code, _, err = cli(*options, "--vram", "3GiB")
    budget = err.split("Use --vram ")[1].split()[0]
    assert code == 71 and parse_bytes(budget) < 8 * GIB
    assert cli(*options, "--vram", budget)[0] == 0


def test_a_size_below_the_base_is_planned(cli):
    values, _ = plan_json(cli, "--preset", "sdxl", "--size", "256", "--gpu", "l4")
    assert [stage["kind"] for stage in values["plan"]["stages"]] == ["denoise", "decode"]


def test_a_budget_of_the_environment_is_not_for_the_named_gpu(cli, monkeypatch):
    monkeypatch.setenv("LINFUSION_VRAM", "100GiB")
    monkeypatch.setenv("LINFUSION_DEVICE", "cpu")
    values, _ = plan_json(cli, "--preset", "sd15", "--gpu", "t4")
    assert values["plan"]["device_budget_bytes"] == int(0.9 * 16 * GIB)
    values, _ = plan_json(cli, "--preset", "sd15", "--gpu", "t4", "--vram", "8GiB")
    assert (values["plan"]["device_budget_bytes"], values["settings"]["vram"]) == (8 * GIB, "flag")


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_other_commands_need_the_model(cli, tmp_path, command):
    (tmp_path / "jobs.txt").write_text("a hill\n")
    given = ["jobs.txt", "--output-dir", "out"] if command == "batch" else ["a hill"]
    code, _, err = cli(command, *given, "--preset", "sd15")
    assert code in (3, 69) and "is not on this machine" in err


def write_to_cache(tmp_path, name, files):
    """Write a snapshot of hub id `name` to the cache of the tests."""
    repository = tmp_path / "hub" / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / COMMIT
    for path, text in files.items():
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).write_text(text)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_an_installed_model_is_planned_from_its_own_files(cli, tmp_path):
    configs = get_configs("sd15")
    files = {path.relative_to(configs): path.read_text() for path in configs.rglob("*.json")}
    own = {path: text for path, text in files.items() if path.parts[0] != "linfusion"}
    vae = next(path for path in own if path.parts[0] == "vae")
    own[vae] = own[vae].replace('"sample_size": 512', '"sample_size": 256').replace("128,", "64,")
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    published, _ = plan_json(cli, "--preset", "sd15", "--gpu", "t4")
    write_to_cache(tmp_path, name, own)
    installed, (notice,) = plan_json(cli, "--preset", "sd15", "--gpu", "t4")
    assert "LinFusion's weights for SD 1.5 are not installed: planned from their published config." in notice
    decode = [plan["plan"]["stages"][-1]["estimate"]["flops"] for plan in (installed, published)]
    assert decode[0] < decode[1]


def test_an_incomplete_model_is_planned_from_the_published_configs(cli, tmp_path):
    configs = get_configs("sd15")
    write_to_cache(
        tmp_path,
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"model_index.json": (configs / "model_index.json").read_text()},
    )
    _, (notice,) = plan_json(cli, "--preset", "sd15", "--gpu", "t4")
    assert "SD 1.5 is not installed: planned from its published configs." in notice

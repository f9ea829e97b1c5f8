"""`linfusion upscale`, and the syntax of values on the command line."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from linfusion_cli.images import read_info
from tests.support.small_controlnets import build_small_controlnet, write_controlnet
from tests.support.small_models import build_small_xl_unet


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(tmp_path / "photo.jpg")
    return "photo.jpg"


@pytest.fixture
def quick(photo, xl_model):
    return ["upscale", photo, "--model", xl_model, "--size", 192, "--steps", 4]


def test_upscale_names_the_file_after_the_image_and_prints_its_path_alone(cli, quick, tmp_path):
    code, out, err = cli(*quick)
    assert (code, out) == (0, "photo-192.tif\n") and "2x 192x128" in err
    info = read_info(tmp_path / "photo-192.tif")
    assert (info.width_px, info.height_px) == (192, 128) and info.request["source"]["image"] == "photo.jpg"


def test_without_a_size_the_image_is_doubled_whatever_the_preset_says(cli, photo, tmp_path):
    assert cli("upscale", photo, "--preset", "demo", "--steps", 2, "--device", "cpu")[:2] == (0, "photo-192.tif\n")
    info = read_info(tmp_path / "photo-192.tif")
    assert (info.width_px, info.height_px) == (192, 128)
    assert cli("upscale", "missing.png", "--preset", "demo")[0] == 66


def test_a_size_smaller_than_the_image_is_rejected(cli, quick, tmp_path):
    Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
    code, out, err = cli("upscale", "large.png", *quick[2:4], "--size", 192)
    assert (code, out) == (2, "") and "--size 192x144 is smaller than large.png, which is 400x300 px." in err


def test_the_size_of_the_image_itself_is_possible(cli, photo, quick):
    planned = json.loads(cli("plan", "--image", photo, *quick[2:4], "--size", 96, "--steps", 4, "--json")[1])
    assert planned["request"]["size"] == "96x64"


def test_the_sample_prompt_of_a_preset_is_not_used(cli, photo, tmp_path):
    assert cli("upscale", photo, "--preset", "demo", "--size", 144, "--steps", 2, "-o", "a.png", "--quiet")[0] == 0
    assert read_info(tmp_path / "a.png").request["prompt"] == ""
    assert (
        cli("upscale", photo, "--preset", "demo", "--size", 144, "--steps", 2, "--prompt", "a hill", "-o", "b.png")[0]
        == 0
    )
    assert read_info(tmp_path / "b.png").request["prompt"] == "a hill"


def test_the_plan_of_an_upscale_is_the_plan_of_the_run(cli, quick):
    planned = json.loads(cli("plan", "--image", *quick[1:], "--json")[1])
    report = json.loads(cli(*quick, "-o", "a.png", "--json")[1])
    assert [stage["kind"] for stage in planned["plan"]["stages"]] == ["start", "denoise", "decode"]
    for one, other in zip(planned["plan"]["stages"], report["plan"]["stages"], strict=True):
        for key in ("kind", "phase_name", "strategy", "steps"):
            assert one[key] == other[key]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["missing.png"], 66, "missing.png"),
        (["photo.jpg", "--size", "144x144x3"], 2, "--size '144x144x3'"),
        (["photo.jpg", "--size", "300x100"], 2, "--size 300x100"),
        (["photo.jpg", "--size", "80"], 2, "--size 80x53 is too small for photo.jpg"),
        (["photo.jpg", "--size", "64x64"], 2, "--size"),
        (["photo.jpg", "--size", "144", "--upscaler", "none"], 2, "--upscaler 'none'"),
        (["photo.jpg", "--size", "144", "--strength", "0.3,0.2"], 2, "--strength 0.3,0.2"),
        (["photo.jpg", "--size", "144", "--background", "beige-ish"], 2, "--background 'beige-ish'"),
        (["photo.jpg", "--size", "144", "-o", "photo.jpg"], 73, "photo.jpg exists"),
        (["text.png", "--size", "144"], 65, "text.png"),
        (["."], 65, "folder"),
    ],
)
def test_an_invalid_option_or_image_is_one_line(cli, photo, tmp_path, xl_model, options, code, text):
    (tmp_path / "text.png").write_text("text")
    more = [] if "--size" in options else ["--size", 144]
    exit_code, out, err = cli("upscale", *options, *more, "--model", xl_model)
    assert (exit_code, out) == (code, "") and text in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"subfiletype": 1}, "reduced-resolution"),
        ({"extratags": [(50706, 1, 4, b"\1\4\0\0", True)]}, "raw.tif is a camera raw file"),
    ],
    ids=["thumbnail", "dng"],
)
def test_camera_raw_files_are_rejected_everywhere(cli, tmp_path, xl_model, options, text):
    write_controlnet(tmp_path / "net", build_small_controlnet(build_small_xl_unet()))
    tifffile.imwrite(tmp_path / "raw.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb", **options)
    for command in (
        ("upscale", "raw.tif"),
        ("plan", "--image", "raw.tif"),
        ("generate", "a hill", "--controlnet", "net", "--control-image", "raw.tif"),
        ("generate", "a hill", "--ip-adapter", "a.safetensors", "--ip-image", "raw.tif"),
    ):
        code, out, err = cli(*command, "--model", xl_model, "--size", 128, "--steps", 2)
        assert (code, out) == (65, "") and text in err.splitlines()[-1], command


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--steps", "4,2"], {"steps": [4, 2]}),
        (["--guidance-scale", "7.5, 5"], {"guidance_scale": [7.5, 5.0]}),
        (["--strength", "0.5"], {"strength": [0.5]}),
        (["--attention", "linear,original"], {"attention": ["linear", "original"]}),
        (["--cosine", "2,1,0.5", "--blur-sigma", 0.5], {"cosine": [2.0, 1.0, 0.5], "blur_sigma": 0.5}),
        (["--guidance-interval", "0.28,5.42"], {"guidance_interval": [0.28, 5.42]}),
        (
            ["--crop-top-left", "8,16", "--original-size", "640x480"],
            {"crop_top_left": [8, 16], "original_size": "640x480"},
        ),
        (
            ["--upscaler", "demofusion", "--upscale-space", "latent"],
            {"upscaler": "demofusion", "upscale_space": "latent"},
        ),
        (["--scheduler", "dpmpp-2m-karras"], {"scheduler": "dpmpp-2m-karras"}),
    ],
)
def test_lists_of_values_are_separated_by_commas(cli, xl_model, options, expected):
    code, out, err = cli("plan", "a hill", "--model", xl_model, "--size", 128, *options, "--json")
    assert code == 0, err
    request = json.loads(out)["request"]
    assert {name: request[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--steps", "many"], "--steps 'many'"),
        (["--steps", "4,,2"], "--steps '4,,2'"),
        (["--steps", ""], "--steps ''"),
        (["--steps", "4,2,1"], "--steps 4,2,1"),
        (["--cosine", "3,1"], "--cosine 3.0,1.0"),
        (["--base-size", "32"], "--base-size '32'"),
        (["--base-size", "70x70"], "--base-size 70x70"),
        (["--scheduler", "heun"], "--scheduler 'heun'"),
        (["--scheduler", "pndm"], "--scheduler pndm"),
        (["--scheduler", "lcm", "--steps", "60"], "--steps 60"),
        (["--lora", "a.safetensors:99"], "--lora 'a.safetensors:99'"),
        (["--textual-inversion", "a.safetensors:"], "--textual-inversion 'a.safetensors:'"),
        (["--clip-skip", "0"], "--clip-skip 0"),
        (["--strict-prompt", "--negative-prompt", "(a:2)"], "'(a:2)'"),
    ],
)
def test_invalid_values_are_named(cli, xl_model, options, text):
    code, out, err = cli("plan", "a hill", "--model", xl_model, "--size", 128, *options)
    assert (code, out) == (2, "") and text in err


def test_presets_can_contain_lists(cli, xl_model, tmp_path):
    (tmp_path / "mine.toml").write_text(f"model = '{xl_model}'\nsteps = [4, 2]\nstrength = 0.5\nattention = 'linear'\n")
    request = json.loads(cli("plan", "a", "--preset", "mine.toml", "--size", 128, "--json")[1])["request"]
    assert (request["steps"], request["strength"], request["attention"]) == ([4, 2], [0.5], ["linear"])
    (tmp_path / "mine.toml").write_text("steps = [4, 'two']\n")
    code, _, err = cli("plan", "a", "--preset", "mine.toml", "--size", 128)
    assert code == 78 and "mine.toml:1" in err and "steps" in err


def test_options_about_prompts_reach_the_request(cli, xl_model, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    twice = ("--textual-inversion", "a.safetensors", "--textual-inversion", "a.safetensors:<b>")
    planned = cli("plan", "a", "--model", xl_model, "--size", 64, *twice, "--clip-skip", 2, "--strict-prompt", "--json")
    values = json.loads(planned[1])
    request = values["request"]
    assert [tuple(one.values()) for one in request["textual_inversion"]] == [
        ("a.safetensors", None),
        ("a.safetensors", "<b>"),
    ]
    assert (request["clip_skip"], values["execution"]["strict_prompt"]) == (2, True)


def test_a_missing_lora_is_not_downloaded_without_the_option(cli, xl_model):
    code, out, err = cli("generate", "a", "--model", xl_model, "--size", 64, "--lora", "nobody/nothing:0.5")
    assert (code, out) == (69, "") and "--lora nobody/nothing" in err and "--download" in err

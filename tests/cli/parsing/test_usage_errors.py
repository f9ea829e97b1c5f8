"""Errors of the command line: one sentence that names what the user probably meant."""

from __future__ import annotations

import pytest

FREE = ("--preset", "demo", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--width", "64"), "There is no option --width. Use --size WIDTHxHEIGHT"),
        (("--height=64",), "There is no option --height. Use --size WIDTHxHEIGHT"),
        (("--cfg", "7"), "There is no option --cfg. Use --guidance-scale."),
        (("--cfg-scale", "7"), "There is no option --cfg-scale. Use --guidance-scale."),
        (("--sampler", "ddim"), "There is no option --sampler. Use --scheduler."),
        (("--negative", "fog"), "There is no option --negative. Use --negative-prompt."),
        (("--num-inference-steps", "4"), "There is no option --num-inference-steps. Use --steps."),
        (("--batch-size", "4"), "There is no option --batch-size. Use --seeds 1-4 of `linfusion batch`"),
        (("--stesp", "4"), "There is no option --stesp. Did you mean --steps?"),
        (("--image", "a.png"), "There is no option --image. It is an option of plan and the argument of upscale."),
        (("--gpu", "h100"), "There is no option --gpu. It is an option of plan."),
        (("--qwertz",), "There is no option --qwertz. See `linfusion generate --help`."),
        (("-s", "4"), "There is no option -s. See `linfusion generate --help`."),
        (("--vram", "12"), "--vram '12' has no unit: use 12GiB or 12MiB."),
        (("--ram", "24576"), "--ram '24576' has no unit: use 24576MiB or 24576B."),
        (("--time-limit", "5"), "--time-limit '5' has no unit: use 5m for minutes or 5s for seconds."),
        (("--size", "1024,768"), "--size '1024,768' is not a size: use 16384 for a square, or 16384x8192"),
        (("--seed", "1.5"), "--seed '1.5' must be a whole number."),
        (("--preset", "sdx"), "There is no preset 'sdx'. Use one of demo, sd15"),
    ],
)
def test_an_option_of_another_tool_or_a_typing_error_gets_a_hint(cli, arguments, expected):
    code, out, err = cli("generate", "a hill", *arguments)
    assert code == 2 and not out and expected in err and err.count("\n") == 1


def test_a_prompt_without_quotes_is_explained(cli):
    code, _, err = cli("generate", "a", "lake", "at", "[dawn]", "--size", "64")
    assert code == 2 and 'Unexpected arguments: lake at [dawn]. Quote the prompt: "a lake at [dawn]".' in err


def test_an_argument_that_is_no_prompt_is_named(cli):
    code, _, err = cli("info", "a.png", "b.png")
    assert code == 2 and "Unexpected argument: b.png." in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("generat",), "Did you mean 'generate'?"), (("models", "pul"), "Did you mean 'pull'?"), (("upscale",), "IMAGE")],
)
def test_unknown_commands_and_missing_arguments(cli, arguments, expected):
    code, out, err = cli(*arguments)
    assert code == 2 and not out and expected in err and "?." not in err and "--help" in err


def test_all_invalid_settings_are_reported_together_whatever_their_source(cli, monkeypatch, tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text("model = 'demo'\nsize = 64\nstepz = 3\ndpi = 0\n")
    monkeypatch.setenv("LINFUSION_BLUR_SIGMA", "none")
    options = ("--preset", preset, "--seed", "x", "--bits", "9", "--controlnet", "a", "--vram", "3")
    code, _, err = cli("generate", "a hill", *options)
    assert code == 2 and err.count("\n") == 1 and "7 settings are invalid: (1)" in err
    for text in (
        "--seed 'x'",
        "--bits 9",
        "--control-image",
        "--vram '3'",
        "LINFUSION_BLUR_SIGMA",
        "mine.toml:3",
        "stepz",
    ):
        assert text in err, text
    assert "mine.toml:4" in err and "(7)" in err


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("steps = 3\nSteps = 4\n", 78, "mine.toml:2: Steps and steps are the same setting. Keep one of them: steps."),
        ("cfg = 3\nguidance_scale = 4\n", 78, "guidance_scale and cfg are the same setting."),
        ("sampler = 'ddim'\nscheduler = 'euler'\n", 78, "scheduler and sampler are the same setting."),
        ("guidence_scale = 4\n", 78, "mine.toml:1: there is no setting 'guidence_scale'. Did you mean guidance_scale?"),
        ("width = 64\n", 78, "mine.toml:1: there is no setting 'width'. Use size"),
        ("steps = [\n", 78, "mine.toml is not TOML"),
        ("vram = 12\n", 78, "mine.toml:1: vram = 12 has no unit: use 12GiB or 12MiB."),
        ("[[controlnet]]\nimage = 'a.png'\n", 78, "controlnet 1 has no model"),
        ("[[controlnet]]\nmodel = 'a'\nimages = 'a.png'\n", 78, "controlnet 1 has the unknown key 'images'."),
        ("steps = 3\nsteps = 4\n", 78, "mine.toml is not TOML"),
    ],
)
def test_a_broken_preset_is_one_sentence_with_its_line(cli, tmp_path, text, code, expected):
    (tmp_path / "mine.toml").write_text(text)
    found, out, err = cli("generate", "a hill", "--size", "64", "--model", "demo", "--preset", "mine.toml")
    assert (found, out) == (code, "") and expected in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LINFUSION_STEP": "3"}, "LINFUSION_STEP is ignored: there is no such setting. Did you mean LINFUSION_STEPS?"),
        ({"LINFUSION_OUTPUT": "a"}, "LINFUSION_OUTPUT is ignored: this setting cannot be a variable. Use --output."),
    ],
)
def test_an_unknown_variable_is_a_warning_with_the_nearest_name(cli, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = cli("plan", "a hill", "--size", "64", *FREE)
    assert code == 0 and out and expected in err


def test_a_job_with_two_spellings_of_a_setting_is_one_sentence(cli, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "CFG Scale": 3, "guidanceScale": 4}\n')
    code, _, err = cli("batch", "jobs.jsonl", "--output-dir", "out", "--dry-run", "--size", "64", *FREE)
    assert code == 3 and "guidanceScale and CFG Scale are the same setting. Keep one of them: guidance_scale." in err

"""Smoke tests of the maintainers' tools: scenes are reproducible and benchmarks run at small sizes."""

import json
import sys

import numpy as np
import pytest

from tools.bench import gpu, unet, vae
from tools.demo_model.evaluate.finetune import KINDS
from tools.demo_model.evaluate.merges import compute_figures
from tools.demo_model.scenes.scene import draw_scene, prepare_scene

pytestmark = pytest.mark.slow


def test_a_scene_is_reproduced_from_its_number():
    first, caption = draw_scene(7, (128, 192))
    again, same_caption = draw_scene(7, (128, 192))
    other, _ = draw_scene(8, (128, 192))
    assert first.shape == (128, 192, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and caption == same_caption
    assert not np.array_equal(first, other) and 3 < len(caption) < 200


def test_a_fine_tune_uses_one_kind_of_scene():
    images = {kind: next(KINDS[kind].scenes(7, 1, 64)) for kind in KINDS}
    mirrored, printed = images["mirror"][0], images["print"][0]
    assert np.array_equal(mirrored, mirrored[:, ::-1]) and set(np.unique(printed)) <= {0, 85, 170, 255}
    number = next(number for number in range(7, 99) if prepare_scene(number)[0].orb in ("moon", "crescent"))
    assert number > 7 and np.array_equal(images["moon"][0], draw_scene(number, (64, 64))[0])


def test_merge_modes_are_compared_by_scene():
    own, published = np.array([0.1, 0.3]), np.array([0.2, 0.5])
    found = compute_figures({"softmax": own, "published": published, "distance published": np.array([0.01, 0.03])})
    to_softmax, to_published = (
        {"above": 0.15, "above, sem": 0.05},
        {"above published": 0.0, "above published, sem": 0.0},
    )
    assert found["published"] == pytest.approx({"error": 0.35, "distance": 0.02} | to_softmax | to_published)
    less = {"above published": -0.15, "above published, sem": 0.05}
    assert found["softmax"] == pytest.approx({"error": 0.2, "above": 0.0, "above, sem": 0.0} | less)


@pytest.mark.parametrize("module", [unet, gpu], ids=["unet", "gpu"])
def test_a_benchmark_prints_and_writes_its_results(module, monkeypatch, tmp_path, capsys):
    options = {
        unet: ["--latents", "32", "--runs", "1"],
        gpu: ["--device", "cpu", "--sizes", "128", "--places", "skips", "--plain", "--vae"],
    }[module]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--divisor", "10", "--json", str(tmp_path / "found.json")])
    module.main()
    out, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    cases = list(found["medians"].values()) if module is unet else found
    assert len(cases) == 3 and "plain" in out
    assert all(case["seconds"] > 0 and case["planned_bytes"] > 0 for case in cases)


def test_the_vae_benchmark_measures_and_compares(monkeypatch, tmp_path, capsys):
    options = ["--size", "512", "--large", "0", "--sdxl", "0", "--runs", "1", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    vae.main()
    out, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert "strips of 3 rows" in out and set(found["medians"]) == {"streamed", "tiled"}
    assert all(case["seconds"] > 0 and case["peak_bytes"] > 0 for case in found["medians"].values())
    differences = found["differences"]
    assert differences["sampled, to exact"]["mean"] < differences["diffusers' tiles, to exact"]["mean"]
    assert differences["flat latents, to their mean"]["max"] < 0.5

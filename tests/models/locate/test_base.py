"""The base of a fine-tune is located or rejected with a hint; only the requested tensors are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.mixers.linear.merge import PROJECTIONS
from linfusion_cli.mixers.linear.mount import find_self_attentions
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.locate.base import BaseWeights, find_base
from linfusion_cli.models.locate.model import DEMO_FOLDER, FAMILY_BASES
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.small_models import build_small_xl_unet

NAME = "diffusion_pytorch_model"
OTHER_LINFUSION = Path("/somewhere/linfusion")


def find(name, model, **options):
    return find_base(name, Model(model), OTHER_LINFUSION, "sdxl", **options)


@pytest.fixture
def copy(xl_model, tmp_path):
    """A copy of the UNet of the small model."""
    return shutil.copytree(xl_model / "unet", tmp_path / "copy" / "unet")


def test_a_folder_of_a_model_and_of_its_unet_are_found(xl_model):
    assert find(str(xl_model), DEMO_FOLDER) == xl_model / "unet"
    assert find(str(xl_model / "unet"), DEMO_FOLDER) == xl_model / "unet"


def test_auto_is_the_model_that_the_weights_were_trained_for(xl_model):
    """Weights in the subfolder of a model belong to that model, all others to the base model of the family."""
    assert find_base("auto", Model(xl_model), xl_model / "linfusion", "sdxl") == xl_model / "unet"
    assert find_base("auto", Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion", "sdxl") == DEMO_FOLDER / "unet"
    assert (
        find_base("auto", Model(DEMO_FOLDER), OTHER_LINFUSION, "sdxl") == find("demo", xl_model) == DEMO_FOLDER / "unet"
    )
    for family, name in FAMILY_BASES.items():
        with pytest.raises(Unavailable, match=f"--linfusion-base {name} is not on this machine") as caught:
            find_base("auto", Model(xl_model), OTHER_LINFUSION, family)
        assert caught.value.exit_code == 69
        assert all(word in caught.value.hint for word in ("--linfusion-base", "--download", "published", "keep"))
        snapshot = add_to_hub_cache(xl_model, name)
        assert find_base("auto", Model(xl_model), OTHER_LINFUSION, family) == snapshot / "unet"


def test_other_files_and_folders_are_no_base(xl_model, tmp_path):
    with pytest.raises(DataError, match="is a file"):
        find(str(xl_model / "model_index.json"), xl_model)
    with pytest.raises(DataError, match="tokenizer has no UNet weights"):
        find(str(xl_model / "vae" / ".." / "tokenizer"), xl_model)
    with pytest.raises(Unavailable, match="no/such/folder"):
        find("no/such/folder", xl_model)
    (tmp_path / f"{NAME}.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="is a pickle"):
        find(str(tmp_path), xl_model)


def test_a_snapshot_without_a_unet_is_no_base(xl_model):
    snapshot = add_to_hub_cache(xl_model / "vae", "someone/part")
    with pytest.raises(Unavailable, match="someone/part is not on this machine"):
        find("someone/part", xl_model)
    assert snapshot.is_dir()


def test_only_the_unet_of_a_base_is_downloaded(xl_model, monkeypatch):
    requested_patterns = []

    def download(name, *, revision, allow_patterns=None, local_files_only=False):
        requested_patterns.append(allow_patterns)
        if local_files_only:
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("not here")
        return str(xl_model)

    parts = ("unet", "vae", "text_encoder")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = [f"{part}/{NAME}{kind}.safetensors" for part in parts for kind in ("", ".fp16")]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: files)
    assert find("someone/base", xl_model, download=True) == xl_model / "unet"
    folders = {pattern.split("/")[0] for pattern in requested_patterns[-1] if "/" in pattern}
    assert folders == {"unet"} and f"unet/{NAME}.fp16.safetensors" in requested_patterns[-1]


def test_a_base_is_read_from_one_file_from_shards_and_in_half_precision(copy):
    whole = load_file(copy / f"{NAME}.safetensors")
    path = list(find_self_attentions(build_small_xl_unet()))[1]
    expected = {f"{path}.{name}": whole[f"{path}.{name}"] for name in PROJECTIONS}

    def check(dtype):
        weights = BaseWeights(find(str(copy), copy))
        weights.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
        result = weights.read(path, PROJECTIONS)
        assert list(result) == list(PROJECTIONS)
        assert all(torch.equal(result[name], expected[f"{path}.{name}"].to(dtype)) for name in PROJECTIONS)

    save_file({name: tensor + 1 for name, tensor in whole.items()}, copy / f"{NAME}.non_ema.safetensors")
    check(torch.float32)
    save_file({name: tensor.half() for name, tensor in whole.items()}, copy / f"{NAME}.fp16.safetensors")
    check(torch.float32)
    (copy / f"{NAME}.safetensors").unlink()
    (copy / f"{NAME}.non_ema.safetensors").unlink()
    check(torch.float16)
    (copy / f"{NAME}.fp16.safetensors").unlink()
    names = sorted(whole)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: whole[name] for name in part}, copy / f"{NAME}-0000{i}-of-00002.safetensors")
    places = {name: f"{NAME}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (copy / f"{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    check(torch.float32)


def test_a_base_of_another_shape_names_the_layer_and_both_shapes(xl_model):
    weights = BaseWeights(xl_model / "unet")
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    with pytest.raises(DataError, match=rf"{path} is \(16, 16\) .*\(16, 32\)") as caught:
        weights.check({path: (16, 32)})
    assert "--linfusion-base" in caught.value.hint
    with pytest.raises(DataError, match=r"x.to_q.weight is missing .*\(1, 1\)"):
        weights.check({"x.to_q.weight": (1, 1)})


def test_a_damaged_base_is_refused(copy):
    file = copy / f"{NAME}.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        BaseWeights(copy)

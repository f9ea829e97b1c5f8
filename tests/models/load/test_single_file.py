"""A single file in the original layout gives the same model as diffusers' folder layout."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.networks import load_meta, load_part, load_unet, load_vae
from linfusion_cli.models.locate.model import FAMILY_BASES, find_model, find_vae
from linfusion_cli.models.text.encode import encode_prompts
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.small_models import build_small_xl_unet, write_small_sd, write_small_xl
from tests.support.small_single_files import (
    copy_without_weights,
    load_part_state,
    to_original_unet,
    to_original_vae,
    without_default_marks,
    write_original,
    write_small_sd21,
)

CPU = torch.device("cpu")
WRITERS = {"sdxl": write_small_xl, "sd21": write_small_sd21, "sd15": write_small_sd}


@pytest.fixture(scope="module", params=WRITERS)
def family(request, tmp_path_factory):
    """Family, a model in diffusers' folder layout, and the same model as a single file."""
    home = tmp_path_factory.mktemp(request.param)
    folder = WRITERS[request.param](home / "folder")
    return request.param, folder, write_original(folder, home / "one.safetensors", request.param)


@pytest.fixture
def result(family, tmp_path):
    """Family, folder, and the located single file; the configs of the family are in the hub cache."""
    name, folder, file = family
    add_to_hub_cache(copy_without_weights(folder, tmp_path / "bare"), FAMILY_BASES[name])
    return name, folder, find_model(str(file))


def assert_same(module, other):
    for (name, one), (other_name, two) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, two), name


def test_all_parts_of_a_file_are_those_of_the_folder(result):
    name, folder, model = result
    assert read_facts(model).family == name
    assert_same(load_unet(model, torch.float32), load_unet(Model(folder), torch.float32))
    assert_same(
        load_vae(model.get_part("vae"), torch.float32, CPU), load_vae(Model(folder).get_part("vae"), torch.float32, CPU)
    )


def test_a_file_and_its_folder_give_equal_embeddings(result):
    name, folder, model = result
    outputs = [
        encode_prompts(one, read_facts(one), "a hill", "fog", torch.float32, CPU) for one in (model, Model(folder))
    ]
    for one, two in zip(
        (outputs[0].positive, outputs[0].negative), (outputs[1].positive, outputs[1].negative), strict=True
    ):
        assert torch.equal(one.hidden, two.hidden)
        assert name != "sdxl" or torch.equal(one.pooled, two.pooled)


def test_diffusers_reads_the_file_with_equal_weights(result):
    """Check the files that the tests write: diffusers reads them as original files."""
    name, folder, model = result
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_single_file(str(model.file), config=str(model.folder), local_files_only=True)
    assert_same(load_unet(model, torch.float32), pipeline.unet)
    assert_same(
        load_part(type(pipeline.text_encoder), model.get_part("text_encoder"), torch.float32, CPU),
        pipeline.text_encoder,
    )


def test_a_file_in_a_hub_repository_is_found_under_its_name_there(family, tmp_path):
    name, folder, file = family
    add_to_hub_cache(copy_without_weights(folder, tmp_path / "bare"), FAMILY_BASES[name])
    (tmp_path / "repository").mkdir()
    shutil.copy(file, tmp_path / "repository")
    snapshot = add_to_hub_cache(tmp_path / "repository", "someone/files")
    assert find_model("someone/files/one.safetensors").file == snapshot / "one.safetensors"
    with pytest.raises(Unavailable, match="--model someone/files/two.safetensors is not on this machine"):
        find_model("someone/files/two.safetensors")


def test_weights_with_scales_beside_them_are_refused(xl_model, tmp_path):
    add_to_hub_cache(copy_without_weights(xl_model, tmp_path / "bare"), FAMILY_BASES["sdxl"])
    file = write_original(xl_model, tmp_path / "one.safetensors", "sdxl")
    save_file(load_file(file) | {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, file)
    with pytest.raises(DataError, match="scale_weight"):
        load_unet(find_model(str(file)), torch.float32)


def test_the_error_for_missing_family_configs_has_a_pull_command(family):
    name, _, file = family
    with pytest.raises(Unavailable, match="configs and tokenizers") as caught:
        find_model(str(file))
    assert f"linfusion models pull {FAMILY_BASES[name]} --configs" in caught.value.hint


def test_with_download_only_configs_are_fetched(family, monkeypatch):
    downloads = []
    monkeypatch.setattr(
        "linfusion_cli.models.locate.model.download_repository",
        lambda *args, **options: downloads.append((args, options)),
    )
    find_model(str(family[2]), download=True)
    assert downloads == [((FAMILY_BASES[family[0]], "--model"), {"configs_only": True})]


@pytest.mark.parametrize(
    ("metadata", "more", "type_"),
    [
        (None, {}, None),
        ({"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
        ({"modelspec.prediction_type": "v"}, {}, "v_prediction"),
        ({"modelspec.prediction_type": "nonsense"}, {}, None),
        (None, {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, "v_prediction"),
    ],
)
def test_the_prediction_type_of_a_file_is_read_from_its_header(sd_model, tmp_path, metadata, more, type_):
    add_to_hub_cache(copy_without_weights(sd_model, tmp_path / "bare"), FAMILY_BASES["sd15"])
    file = write_original(sd_model, tmp_path / "one.safetensors", "sd15")
    save_file(load_file(file) | more, file, metadata)
    facts = read_facts(find_model(str(file)))
    assert facts.prediction_type == type_
    assert facts.scheduler_config.get("rescale_betas_zero_snr", False) == ("ztsnr" in more)


def build_distilled_xl():
    """Build a UNet like SSD-1B, distilled from SDXL: fewer transformer blocks, in different numbers per layer."""
    config = without_default_marks(dict(build_small_xl_unet().config)) | {
        "layers_per_block": 2,
        "transformer_layers_per_block": [[0, 0], [2, 1], [1, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], [1, 1, 2], [0, 0, 0]],
    }
    return UNet2DConditionModel.from_config(config)


def test_a_cut_down_unet_in_a_file_is_built_as_deep_as_it_is(tmp_path):
    torch.manual_seed(0)
    folder = write_small_xl(tmp_path / "folder")
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"layers_per_block": 2}
    unet = build_distilled_xl()
    file = write_original(folder, tmp_path / "one.safetensors", "sdxl")
    others = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("model.diffusion_model.")}
    save_file(others | to_original_unet(unet, unet.state_dict()), file)
    (folder / "unet" / "config.json").write_text(
        json.dumps(config)
    )  # config of the family: two layers per level, one block each
    model = Model(folder, file)
    assert_same(load_unet(model, torch.float32), unet)
    assert len(list(load_meta(UNet2DConditionModel, model.get_part("unet")).parameters())) == len(
        list(unet.parameters())
    )


@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
def test_a_vae_of_its_own_file(xl_model, tmp_path, layout):
    state = load_part_state(xl_model, "vae")
    vae = load_meta(AutoencoderKL, Model(xl_model).get_part("vae"))
    prefixes = {"original": "first_stage_model.", "bare": ""}
    tensors = state if layout == "diffusers" else to_original_vae(vae, state, prefixes[layout])
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    part = find_vae(str(tmp_path / "vae.safetensors"), Model(xl_model))
    read = load_vae(part, torch.float32, CPU)
    assert all(torch.equal(parameter, 2 * state[name]) for name, parameter in read.named_parameters())


def drop_prefix(tensors, prefix):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: drop_prefix(tensors, "first_stage_model."), "AutoencoderKL.*--vae"),
        (lambda tensors: drop_prefix(tensors, "conditioner.embedders.0"), "CLIPTextModel"),
        (lambda tensors: drop_prefix(tensors, "model.diffusion_model."), "not a complete model"),
        (lambda tensors: {"conditioner.embedders.0.model.x": torch.zeros(1)} | tensors, "refiner"),
        (lambda tensors: drop_prefix(tensors, "model.diffusion_model.out.2.bias"), "conv_out.bias is missing"),
        (lambda tensors: drop_prefix(tensors, "model.diffusion_model.input_blocks.1.0.in"), "input_blocks|norm1"),
        (
            lambda tensors: tensors | {"model.diffusion_model.out.2.bias": torch.zeros(5)},
            r"conv_out.bias is \(5,\) .*\(4,\)",
        ),
        (
            lambda tensors: tensors | {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int64)},
            "out.2.bias .*I64",
        ),
        (
            lambda tensors: tensors | {"model.diffusion_model.out.2.bias": torch.full((4,), float("nan"))},
            "conv_out.bias contains NaN",
        ),
    ],
)
def test_a_file_with_wrong_tensors_is_rejected_by_name(xl_model, tmp_path, change, named):
    add_to_hub_cache(copy_without_weights(xl_model, tmp_path / "bare"), FAMILY_BASES["sdxl"])
    file = write_original(xl_model, tmp_path / "one.safetensors", "sdxl")
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file)
    with pytest.raises(DataError, match=named):
        model = find_model(str(file))
        load_vae(model.get_part("vae"), torch.float32, CPU)
        encode_prompts(model, read_facts(model), "a", "b", torch.float32, CPU)
        load_unet(model, torch.float32)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
@pytest.mark.parametrize("find", [find_model, lambda name: find_vae(name, Model("nowhere"))])
def test_pickles_are_refused_by_name_with_the_way_to_convert(tmp_path, suffix, find):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="pickle") as caught:
        find(str(file))
    assert "safetensors" in caught.value.hint

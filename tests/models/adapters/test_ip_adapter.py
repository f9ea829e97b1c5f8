"""IP-Adapters are located with a fitting encoder and loaded into the UNet; those that do not fit are rejected."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError, Unavailable
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.mixers.linear.weights import load_weights
from linfusion_cli.models.adapters.ip_adapter import list_expected_shapes, load_adapters
from linfusion_cli.models.adapters.lora import merge_lora
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.locate.files import FileLocation
from linfusion_cli.models.locate.ip_adapter import Adapter, AdapterFile, find_adapter, find_encoder, read_adapter
from linfusion_cli.planning.meta_model import MetaModel, count_parameters
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.unet.estimate import ForwardSettings, estimate_unet
from tests.mixers.test_weights import build_meta_sdxl_unet
from tests.models.adapters.test_lora import build_factors, find_layers, to_kohya_layout, write_lora
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.small_ip_adapters import (
    HIDDEN,
    PROJECTION,
    TOKENS,
    build_adapter_tensors,
    write_adapter,
    write_encoder,
)
from tests.support.small_models import build_small_sd_unet, build_small_xl_unet, write_linfusion

SDXL = "sdxl_models/ip-adapter_sdxl.safetensors"


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return build_small_xl_unet().eval().requires_grad_(False)


def build_adapter(file, scale=1.0):
    """Build the adapter in `file` without an image, which is not needed to load it."""
    return Adapter(read_adapter(file), file.parent / "image_encoder", None, scale)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A repository in the layout of h94/IP-Adapter: two encoders with adapters for each."""
    folder = tmp_path_factory.mktemp("published")
    write_encoder(folder / "models" / "image_encoder")
    write_encoder(folder / "sdxl_models" / "image_encoder", hidden=HIDDEN + 8, projection=PROJECTION + 4)
    write_adapter(folder / "models" / "ip-adapter_sd15.safetensors", build_small_sd_unet())
    write_adapter(folder / "sdxl_models" / "ip-adapter-plus_sdxl_vit-h.safetensors", build_small_xl_unet(), "plus")
    tensors = build_adapter_tensors(build_small_xl_unet(), "plain")
    tensors["image_proj.proj.weight"] = torch.randn(len(tensors["image_proj.proj.bias"]), PROJECTION + 4)
    save_file(tensors, folder / SDXL)
    return folder


@pytest.mark.parametrize(
    ("file", "family", "encoder"),
    [
        ("", "sd15", "models/image_encoder"),
        ("", "sdxl", "sdxl_models/image_encoder"),
        ("sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", "sdxl", "models/image_encoder"),
    ],
)
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_published_layout(published, place, file, family, encoder):
    root = add_to_hub_cache(published, "h94/IP-Adapter") if place == "hub" else published
    name = "h94/IP-Adapter" if place == "hub" else str(published)
    location = find_adapter(f"{name}/{file}" if file else name, family)
    assert location.path == root / (file or {"sdxl": SDXL, "sd15": "models/ip-adapter_sd15.safetensors"}[family])
    assert find_encoder("auto", read_adapter(location.path), location) == root / encoder


@pytest.fixture
def hub(published, monkeypatch, tmp_path):
    """Replace the hub by the published repository; return the list of downloaded files."""
    downloads, root = [], tmp_path / "downloads"

    def download(repository, file, revision):
        assert repository == "h94/IP-Adapter"
        downloads.append(file)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copyfile(published / file, root / file))

    files = [path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, revision: files)
    return downloads


def test_only_required_files_are_downloaded(hub):
    with pytest.raises(Unavailable, match="--ip-adapter h94/IP-Adapter .*--download"):
        find_adapter("h94/IP-Adapter", "sdxl")
    assert not hub
    location = find_adapter("h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", "sdxl", download=True)
    encoder = find_encoder("auto", read_adapter(location.path), location, download=True)
    assert encoder.parts[-2:] == ("models", "image_encoder") and (encoder / "model.safetensors").is_file()
    assert hub.count("models/image_encoder/model.safetensors") == 1
    assert "sdxl_models/image_encoder/model.safetensors" not in hub


def test_the_error_without_a_fitting_encoder_lists_the_folders(published, tmp_path):
    (tmp_path / "one").mkdir()
    file = Path(shutil.copy(published / SDXL, tmp_path / "one" / "a.safetensors"))
    write_encoder(tmp_path / "image_encoder")
    with pytest.raises(Unavailable, match=r"one/image_encoder \(does not exist\), .*image_encoder") as caught:
        find_encoder("auto", read_adapter(file), FileLocation(file))
    assert "--ip-image-encoder" in caught.value.hint
    named = published / "sdxl_models"
    assert find_encoder(str(named), read_adapter(file), FileLocation(file)) == named / "image_encoder"
    with pytest.raises(DataError, match=f"projection_dim {PROJECTION + 4}"):
        find_encoder(str(tmp_path / "image_encoder"), read_adapter(file), FileLocation(file))
    with pytest.raises(Unavailable, match="--ip-image-encoder nowhere"):
        find_encoder("nowhere", read_adapter(file), FileLocation(file))


@pytest.mark.parametrize("name", ["ip-adapter_sd15.bin", "h94/IP-Adapter/models/ip-adapter_sd15.bin"])
def test_pickles_are_refused(name):
    with pytest.raises(DataError, match="is a pickle") as caught:
        find_adapter(name, "sd15", download=True)
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize("name", ["h94/IP-Adapter-FaceID", "h94/IP-Adapter-FaceID/ip-adapter-faceid_sd15.bin"])
def test_face_id_is_refused_by_its_name(name):
    with pytest.raises(DataError, match="is a FaceID adapter"):
        find_adapter(name, "sd15")


@pytest.mark.parametrize("tensor", ["perceiver_resampler.proj_in.weight", "norm.weight"])
def test_face_id_is_refused_by_its_header(tmp_path, tensor):
    names = (f"image_proj.{tensor}", "image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="FaceID"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["unet.a.lora_A.weight"], "not an IP-Adapter: .*unet.a.lora_A.weight"),
        (["image_proj.proj.weight"], "not an IP-Adapter"),
        (["image_proj.first.weight", "ip_adapter.1.to_k_ip.weight"], "unknown kind: .*image_proj.first"),
    ],
)
def test_other_files_are_refused(tmp_path, names, named):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=named):
        read_adapter(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-5])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        read_adapter(tmp_path / "a.safetensors")


def test_an_adapter_of_another_family_names_the_first_layer_and_both_shapes(tmp_path, unet):
    file = write_adapter(tmp_path / "a.safetensors", build_small_sd_unet())
    with pytest.raises(DataError, match=r"ip_adapter.1.to_k_ip.weight is \(8, 16\) .*\(16, 32\)"):
        load_adapters(unet, [build_adapter(file)])
    assert unet.encoder_hid_proj is None


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_missing_and_unknown_tensors_are_named(tmp_path, unet, kind):
    def load_changed(change):
        tensors = build_adapter_tensors(unet, kind)
        change(tensors)
        save_file(tensors, tmp_path / "a.safetensors")
        load_adapters(copy.deepcopy(unet), [build_adapter(tmp_path / "a.safetensors")])

    with pytest.raises(DataError, match=r"ip_adapter.3.to_v_ip.weight is missing"):
        load_changed(lambda tensors: tensors.pop("ip_adapter.3.to_v_ip.weight"))
    with pytest.raises(DataError, match=r"ip_adapter.99.to_k_ip.weight is \(2,\) .*missing"):
        load_changed(lambda tensors: tensors.update({"ip_adapter.99.to_k_ip.weight": torch.zeros(2)}))
    bias = {"plain": "norm.bias", "plus": "layers.2.1.0.bias", "full": "proj.2.bias"}[kind]
    with pytest.raises(DataError, match="could not be loaded"):
        load_changed(lambda tensors: tensors.pop(f"image_proj.{bias}"))
    with pytest.raises(DataError, match="could not be loaded"):
        load_changed(lambda tensors: tensors.update({f"image_proj.{bias}": torch.zeros(3)}))
    with pytest.raises(DataError, match="image projection .* parameters"):
        load_changed(lambda tensors: tensors.update({"image_proj.zzz": torch.zeros(3)}))


def test_half_precision_files_take_the_unet_s_precision(tmp_path, unet):
    halves = {name: tensor.half() for name, tensor in build_adapter_tensors(unet, "plus").items()}
    save_file(halves, tmp_path / "a.safetensors")
    load_adapters(unet, [build_adapter(tmp_path / "a.safetensors")])
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_a_plan_counts_the_adapter_s_weights_and_tokens(tmp_path, xl_model, unet, kind):
    file = write_adapter(tmp_path / "a.safetensors", unet, kind)
    meta_model = MetaModel.read(
        Model(xl_model), xl_model / "linfusion", None, [build_adapter(file), build_adapter(file)]
    )
    without = MetaModel.read(Model(xl_model), xl_model / "linfusion")
    own = sum(tensor.numel() for tensor in load_file(file).values())
    assert {parameter.device.type for parameter in meta_model.unet.parameters()} == {"meta"}
    assert count_parameters(meta_model.unet) - count_parameters(without.unet) == 2 * own
    assert meta_model.count_unet_parameters("linear") - without.count_unet_parameters("linear") == 2 * own
    more = 2 * {**TOKENS, "full": 257}[kind]  # a Full Face adapter has one token per patch of the published encoder
    settings = [ForwardSettings(StripSize(), "device", 1, 37, 53, 4, text_tokens=tokens) for tokens in (7, 7 + more)]
    assert estimate_unet(meta_model.unet, settings[0]).flops == estimate_unet(without.unet, settings[1]).flops


def test_a_lora_changes_the_same_weights_before_and_after(tmp_path, unet):
    """Merge before or after loading the adapter: linear attention changes, the layers of the adapter do not."""
    folder = write_linfusion(tmp_path / "linfusion", unet)
    linear = load_weights(folder, unet, torch.float32)
    lora = write_lora(tmp_path, to_kohya_layout(build_factors(find_layers(unet))))
    file = write_adapter(tmp_path / "a.safetensors", unet, "plus")
    other, other_linear = copy.deepcopy(unet), copy.deepcopy(linear)
    merge_lora(unet, linear, lora, 0.8)
    load_adapters(unet, [build_adapter(file)])
    load_adapters(other, [build_adapter(file)])
    merged = merge_lora(other, other_linear, lora, 0.8)
    assert merged.linear_layers > 0
    with mount_modules(unet, linear), mount_modules(other, other_linear):
        one, two = unet.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_encoder_s_config_may_be_that_of_a_whole_clip(published, tmp_path):
    config = json.loads((published / "models" / "image_encoder" / "config.json").read_text())
    weights = read_adapter(published / "models" / "ip-adapter_sd15.safetensors")
    assert weights.fits({"vision_config": config, "projection_dim": 1})
    assert not weights.fits({"vision_config": {**config, "projection_dim": 1}})


def test_sdxl_s_own_layers_are_counted_as_published():
    """The published file for SDXL has 70 cross-attentions at odd indices up to 139, and 351 million parameters."""
    with torch.device("meta"):
        unet = build_meta_sdxl_unet()
    plain = AdapterFile(Path("a"), {"image_proj.proj.weight": (4 * 2048, 1280)})
    shapes = dict(list_expected_shapes(plain, unet))
    places = [int(name.split(".")[1]) for name in shapes if name.endswith("to_k_ip.weight")]
    assert places == list(range(1, 140, 2))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 351_272_960

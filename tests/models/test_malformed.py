"""Damaged and malicious files: exit code 65, a one-line message, and never random weights."""

import json
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from linfusion_cli.core.errors import DataError, LinfusionError
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.header import read_header
from linfusion_cli.models.files.layout import Model, Part
from linfusion_cli.models.load.networks import load_unet, load_vae
from linfusion_cli.models.locate.model import FAMILY_BASES, find_model
from tests.models.locate.test_model import add_to_hub_cache
from tests.support.requests import make_request
from tests.support.small_single_files import copy_without_weights, write_original

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"


def split_file(data):
    """Split a safetensors file into its JSON header and its data."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(header, numbers, length=None):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def find_tensor_name(header):
    """Return the name of a tensor that all layouts have."""
    return next(name for name in header if name.endswith("conv_in.weight"))


def change_entry(data, **changed):
    """Change the header entry of one tensor."""
    header, numbers = split_file(data)
    header[find_tensor_name(header)] |= changed
    return join_file(header, numbers)


def overlap_offsets(data):
    header, numbers = split_file(data)
    one, two = [name for name in header if name != "__metadata__"][:2]
    header[two]["data_offsets"] = header[one]["data_offsets"]
    return join_file(header, numbers)


DAMAGE = {
    "empty": lambda data: b"",
    "short": lambda data: data[:5],
    "header cut off": lambda data: data[:100],
    "header longer than the file": lambda data: join_file(*split_file(data), length=1 << 40),
    "header length of 2^64 - 1": lambda data: join_file(*split_file(data), length=(1 << 64) - 1),
    "header length of 0": lambda data: join_file(*split_file(data), length=0),
    "header no JSON": lambda data: join_file(b"{" * 64, split_file(data)[1]),
    "header a list": lambda data: join_file(b"[1, 2]", split_file(data)[1]),
    "header no UTF-8": lambda data: join_file(b'{"\xff": 1}', split_file(data)[1]),
    "numbers cut off": lambda data: data[:-10],
    "numbers too many": lambda data: data + b"1234",
    "unknown type": lambda data: change_entry(data, dtype="F99"),
    "wrong type": lambda data: change_entry(data, dtype="I32"),
    "type of another size": lambda data: change_entry(data, dtype="F64"),
    "shape too large": lambda data: change_entry(data, shape=[1 << 62, 1 << 62]),
    "shape negative": lambda data: change_entry(data, shape=[-1]),
    "shape of another rank": lambda data: change_entry(data, shape=[2, 2]),
    "offsets backwards": lambda data: change_entry(data, data_offsets=[32, 0]),
    "offsets beyond the end": lambda data: change_entry(data, data_offsets=[0, 1 << 40]),
    "offsets overlap": overlap_offsets,
    "a pickle of torch": lambda data: b"PK\x03\x04" + data,
    "a bare pickle": lambda data: b"\x80\x02}q\x00." + data,
    "a web page": lambda data: b"<!DOCTYPE html><html>404</html>" * 9,
    "a pointer of git": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}


@pytest.fixture
def copy(sd_model, tmp_path):
    return shutil.copytree(sd_model, tmp_path / "copy")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_65_and_one_line(copy, kind):
    file = copy / UNET
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    with pytest.raises(DataError, match="unet") as caught:
        load_unet(Model(copy), torch.float32)
    assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    assert "pickle" not in kind or "is a pickle" in str(caught.value)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_single_file_too(sd_model, tmp_path, kind):
    add_to_hub_cache(copy_without_weights(sd_model, tmp_path / "bare"), FAMILY_BASES["sd15"])
    file = write_original(sd_model, tmp_path / "one.safetensors", "sd15")
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    with pytest.raises(DataError, match=r"one\.safetensors") as caught:
        model = find_model(str(file))
        read_facts(model)
        load_vae(model.get_part("vae"), torch.float32, CPU)
        load_unet(model, torch.float32)
    assert "\n" not in str(caught.value)


def mutate(data, seed):
    """Change a few bytes of the header or its length."""
    rng, data = random.Random(seed), bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(0, 8 + length) if rng.random() < 0.9 else rng.randrange(0, 8)
        what = rng.random()
        if what < 0.5:
            data[place] = rng.randrange(256)
        elif what < 0.75:
            del data[place : place + rng.randint(1, 9)]
        else:
            data[place:place] = bytes(rng.choice(b'0123456789[]{},:"F') for _ in range(rng.randint(1, 9)))
    return bytes(data)


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_300_mutated_headers_are_read_or_rejected(copy, start):
    """Either all weights are read, or DataError is raised."""
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    whole, rejected = file.read_bytes(), 0
    names = {name for name, _ in load_vae(Part(copy / "vae"), torch.float32, CPU).named_parameters()}
    for seed in range(start, start + 50):
        file.write_bytes(mutate(whole, seed))
        try:
            result = load_vae(Part(copy / "vae"), torch.float32, CPU)
        except DataError as error:
            rejected += 1
            assert "\n" not in str(error)
        else:
            assert {name for name, _ in result.named_parameters()} == names <= set(read_header(file).shapes)
    assert rejected >= 45  # the other mutations change metadata or white space


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_with_nan_or_inf_are_named(copy, part, value):
    file = copy / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=f"{name} contains NaN"):
        load_unet(Model(copy), torch.float32)
        load_vae(Part(copy / "vae"), torch.float32, CPU)


SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (
            {"weight_map": {"a": SHARD, "b": SHARD.replace("00001", "00002", 1)}},
            "00002-of-00002.safetensors is missing",
        ),
        (
            {"weight_map": {"a": "../../vae/diffusion_pytorch_model.safetensors"}},
            "index.json must list safetensors files",
        ),
        ({"weight_map": {"a": "model.bin"}}, "index.json must list safetensors files"),
        ({"weight_map": {}}, "index.json must list safetensors files"),
        ({"weight_map": {"a": 7}}, "not a valid shard index"),
        ([], "not a valid shard index"),
        ("{", "not a valid shard index"),
    ],
)
def test_a_broken_index_of_shards_is_refused(copy, index, named):
    (copy / UNET).rename(copy / "unet" / SHARD)
    text = index if isinstance(index, str) else json.dumps(index)
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=named):
        load_unet(Model(copy), torch.float32)


def test_a_run_with_a_damaged_file_ends_with_65_and_no_image(copy, tmp_path):
    from linfusion_cli.core.geometry import Size
    from linfusion_cli.run.pipeline import generate

    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:-1])
    values = {"prompt": "a", "size": Size(64, 64), "model": str(copy), "linfusion": "none", "steps": (1,)}
    with pytest.raises(LinfusionError) as caught:
        generate(make_request(**values, output=tmp_path / "out.png"), {})
    assert caught.value.exit_code == 65 and not (tmp_path / "out.png").exists()

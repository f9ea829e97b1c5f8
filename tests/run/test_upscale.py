"""Upscaling an image: sizes, phases, source formats and invalid input."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from linfusion_cli.core.errors import DataError, InputNotFound, UsageError
from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.planning import plan
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages import convert
from tests.support.fakes import Listener
from tests.support.requests import make_request


@pytest.fixture
def photo(tmp_path):
    """Write an image of 96 x 64 px with a different colour in each pixel."""
    down, across = np.mgrid[0:64, 0:96]
    values = np.stack([across * 2.5, down * 3.5, (across + down) * 1.5], -1).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def make(xl_model, tmp_path, photo):
    """Return a function that calls generate() on the photo with small settings and writes to tmp_path."""

    def run(output="out.png", observer=None, **changed):
        values = {"image": photo, "size": Size(192, 192), "model": str(xl_model), "steps": (4,), "strength": (0.5,)}
        values |= {"output": tmp_path / output}
        return generate(make_request(**values | changed), {}, observer or Listener())

    return run


def read_pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_single_number_is_the_longer_side(make, tmp_path):
    report = make()
    assert report.size == Size(192, 128) and read_pixels(tmp_path / "out.png").shape == (128, 192, 3)
    assert report.request["source"]["image"].endswith("photo.png") and report.request["size"] == "192x128"
    assert [stage.kind for stage in report.stages][6:] == ["start", "start", "denoise", "decode", "write"]
    assert [stage.phase_name for stage in report.stages if stage.kind == "denoise"] == ["2x"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(192, 128), (192, 128)),
        (Size(300, 200), (300, 200)),
        (Size(500, 333), (500, 333)),
        (Size(97, 97), (97, 65)),
        (Size(99, 66), (99, 66)),
    ],
)
def test_the_file_has_exactly_the_size_asked_for(make, tmp_path, size, expected):
    make(size=size)
    assert Image.open(tmp_path / "out.png").size == expected


def test_a_side_that_would_be_too_small_is_refused(make):
    with pytest.raises(UsageError, match="--size 70x47"):
        make(size=Size(70, 70))


def test_a_size_of_other_proportions_is_refused_with_those_that_match(make, tmp_path):
    with pytest.raises(UsageError, match=r"192x100.*photo\.png.*96x64") as refused:
        make(size=Size(192, 100))
    assert "--size 192" in refused.value.hint and "192x128" in refused.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png"}


def test_with_no_steps_to_run_it_is_a_resize_through_the_vae(make, tmp_path, monkeypatch):
    """The encoded image is the source, resized to exactly the requested size."""
    encoded = []

    def spy(vae, read, size, *more):
        encoded.append(read(0, size.height, 0, size.width).numpy())
        return real(vae, read, size, *more)

    real = convert.encode_rows
    monkeypatch.setattr(convert, "encode_rows", spy)
    make(size=Size(201, 134), strength=(0.0,))
    planes = Image.open(tmp_path / "photo.png").split()
    expected = [np.asarray(plane.convert("F").resize((201, 134), Image.Resampling.LANCZOS)) / 255 for plane in planes]
    assert encoded[-1].shape == (160, 224, 3)
    np.testing.assert_allclose(encoded[-1][:134, :201], np.stack(expected, -1).clip(0, 1), atol=1e-4)


def test_the_source_image_takes_the_place_of_the_base(make, phases):
    """DemoFusion restores the channel statistics of the encoded source image."""
    make(size=Size(576, 384), upscaler="demofusion")
    first, *others = [start.phase_state for start, _ in phases]
    height, width = first.start_latents.shape[2:]
    sizes = [tuple(phase_state.start_latents.shape[2:]) for phase_state in others]
    assert width == 1.5 * height and sizes == [(2 * height, 2 * width), (3 * height, 3 * width)]
    np.testing.assert_allclose(first.base_statistics.mean, first.start_latents.mean((0, 2, 3), keepdim=True), atol=1e-6)
    assert all(other.base_statistics is first.base_statistics for other in others)


def test_a_small_image_is_upscaled_to_the_native_size_first_and_a_large_one_has_one_phase(make, tmp_path):
    for name, side in (("small.png", 32), ("large.png", 400)):
        Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(tmp_path / name)
    small = make(output="a.png", image=tmp_path / "small.png", size=Size(192, 192))
    large = make(output="b.png", image=tmp_path / "large.png", size=Size(448, 448))
    sizes = [
        [stage["size"] for stage in report.plan["stages"] if stage["kind"] == "denoise"] for report in (small, large)
    ]
    assert sizes == [["64x64", "128x128", "192x192"], ["448x448"]]


def test_the_image_is_buffered_in_memory_if_there_is_room_and_is_the_same_from_disk(make, tmp_path, monkeypatch):
    folders, real = [], ScratchImage.__init__
    monkeypatch.setattr(
        ScratchImage, "__init__", lambda self, folder, *size: folders.append(folder) or real(self, folder, *size)
    )
    make("a.png")
    monkeypatch.setattr(plan, "keep_images_in_memory", lambda stages, image, machine: stages)
    make("b.png")
    assert folders == [None, tmp_path] and (read_pixels(tmp_path / "a.png") == read_pixels(tmp_path / "b.png")).all()


def test_orientation_is_honoured(make, tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    Image.open(photo).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    make("a.png", image=tmp_path / "turned.png")
    make("b.png", image=tmp_path / "upright.png")
    assert read_pixels(tmp_path / "a.png").shape == (192, 128, 3)
    assert (read_pixels(tmp_path / "a.png") == read_pixels(tmp_path / "b.png")).all()


def test_sixteen_bits_are_not_cut_to_eight(make, tmp_path):
    """Two images that differ only in their lower eight bits give different results."""
    values = np.full((64, 64, 3), 30_000, np.uint16)
    for name, change in (("a", 0), ("b", 90)):
        tifffile.imwrite(tmp_path / f"{name}.tif", values + np.uint16(change), photometric="rgb")
        make(f"{name}-16.tif", image=tmp_path / f"{name}.tif", size=Size(128, 128), bits=16)
    assert (tifffile.imread(tmp_path / "a-16.tif") != tifffile.imread(tmp_path / "b-16.tif")).any()


def test_transparency_needs_a_background(make, tmp_path):
    Image.fromarray(np.full((64, 64, 4), 100, np.uint8)).save(tmp_path / "glass.png")
    with pytest.raises(DataError, match=r"glass\.png") as refused:
        make(image=tmp_path / "glass.png")
    assert "--background white" in refused.value.hint
    for colour in ("white", "#102030"):
        make(f"{colour}.png", image=tmp_path / "glass.png", background=colour, size=Size(128, 128))
    assert (read_pixels(tmp_path / "white.png") != read_pixels(tmp_path / "#102030.png")).any()
    with pytest.raises(UsageError, match="--background .*beige-ish"):
        make("c.png", image=tmp_path / "glass.png", background="beige-ish")


def test_invalid_images_are_refused_before_any_work(make, tmp_path, photo):
    (tmp_path / "text.png").write_text("no picture")
    content = photo.read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputNotFound):
        make(image=tmp_path / "none.png")
    for name in ("text.png", "cut.png"):
        with pytest.raises(DataError, match=name):
            make(image=tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_upscaler_none_is_for_images_from_noise(make):
    with pytest.raises(UsageError, match="--upscaler .*none"):
        make(upscaler="none")


def test_the_source_image_is_only_replaced_with_overwrite(make, photo):
    before = photo.read_bytes()
    with pytest.raises(Exception, match="exists"):
        make(output="photo.png")
    assert photo.read_bytes() == before
    make(output="photo.png", overwrite=True)
    assert read_pixels(photo).shape == (128, 192, 3)


def test_an_invalid_colour_profile_is_reported(make, tmp_path):
    Image.open(tmp_path / "photo.png").save(tmp_path / "odd.png", icc_profile=b"no profile")
    listener = Listener()
    make(image=tmp_path / "odd.png", observer=listener)
    assert any("profile" in notice.text for notice in listener.of(Notice))


def test_the_metadata_name_the_source_image(make, tmp_path):
    make("a.tif", upscaler="demofusion", prompt="a hill")
    request = read_info(tmp_path / "a.tif").request
    assert request["source"]["image"] == str(tmp_path / "photo.png") and request["prompt"] == "a hill"

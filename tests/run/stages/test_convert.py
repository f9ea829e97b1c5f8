"""Conversion between latents and images: the VAE, its statistics, bit depths, dithering and buffered images."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from linfusion_cli.core.errors import DataError, UsageError, WriteFailed
from linfusion_cli.core.events import Notice
from linfusion_cli.core.geometry import Size
from linfusion_cli.images import read_info
from linfusion_cli.images.process.scratch import ScratchImage
from linfusion_cli.run.outputs.async_writer import AsyncWriter
from linfusion_cli.run.pipeline import generate
from linfusion_cli.run.stages.convert import build_resized_reader
from tests.support.fakes import Listener
from tests.support.requests import make_request
from tests.support.small_models import build_small_vae


@pytest.fixture
def make(xl_model, tmp_path):
    """Return a function that calls generate() with small settings and writes to tmp_path."""

    def run(output="out.png", observer=None, **changed):
        values = {"prompt": "a hill", "size": Size(128, 128), "model": str(xl_model), "steps": (4,), "strength": (0.5,)}
        request = make_request(**values | {"output": tmp_path / output} | changed)
        return generate(request, {}, observer or Listener())

    return run


@pytest.fixture
def tiny_folder(tmp_path):
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_sixteen_bits_are_the_image_in_finer_steps(make, tmp_path):
    make("a.tif")
    make("b.tif", bits=16)
    make("c.png", bits=16)
    assert [read_info(tmp_path / name).bits for name in ("a.tif", "b.tif", "c.png")] == [8, 16, 16]
    coarse, fine = tifffile.imread(tmp_path / "a.tif"), tifffile.imread(tmp_path / "b.tif")
    assert fine.dtype == np.uint16 and (np.rint(fine / 257) == coarse).mean() > 0.999
    assert len(np.unique(fine)) > len(np.unique(coarse))


def test_sixteen_bits_in_a_jpeg_are_refused_before_any_work(make, tmp_path):
    with pytest.raises(UsageError, match="(?i)16.*jpe?g"):
        make("a.jpg", bits=16)
    with pytest.raises(UsageError, match="--bits 12"):
        make("a.png", bits=12)
    assert not list(tmp_path.iterdir())


def test_dithering_moves_no_pixel_by_more_than_a_step_and_is_repeatable(make, tmp_path):
    make("a.png")
    make("b.png", dither=True)
    make("c.png", dither=True)
    plain, dithered = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert (plain != dithered).any() and np.abs(plain - dithered).max() <= 1
    assert (dithered == pixels(tmp_path / "c.png")).all()


def test_another_vae_decodes_the_same_latents(make, tmp_path, tiny_folder):
    make("a.png")
    report = make("b.png", vae=str(tiny_folder))
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()
    strategies = [stage["strategy"] for stage in report.plan["stages"] if stage["kind"] == "decode"]
    assert all(strategy["start"] == strategy["patches"] == 0 for strategy in strategies)


def test_vae_accepts_the_folder_of_a_model(make, tmp_path, sd_model, xl_model):
    make("a.png", vae=str(sd_model))
    make("b.png", vae=str(sd_model / "vae"))
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_an_incompatible_vae_is_refused(make, tmp_path, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    for changes, says in (
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"latent_channels": 16}, r"\b4\b.*\b16\b"),
        ({"decoder_block_out_channels": [64, 64], "block_out_channels": [64, 64]}, r"\b2\b"),
    ):
        (tiny_folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(DataError, match=says):
            make(vae=str(tiny_folder))
    shutil.rmtree(tiny_folder)
    assert not list(tmp_path.iterdir())


def test_the_plan_has_the_requested_vae_statistics(make, tmp_path):
    uses = {}
    for name in ("auto", "exact", "sampled"):
        report = make(f"{name}.png", vae_statistics=name, size=Size(512, 512))
        last = report.plan["stages"][-1]["strategy"]
        uses[name] = (last["start"] > 0, last["patches"] > 0)
    assert uses == {"auto": (True, False), "exact": (True, False), "sampled": (False, True)}
    exact, sampled = pixels(tmp_path / "exact.png"), pixels(tmp_path / "sampled.png")
    assert (exact == pixels(tmp_path / "auto.png")).all()
    assert (exact != sampled).any()
    with pytest.raises(UsageError, match="--vae-statistics .*guessed"):
        make(vae_statistics="guessed")


def test_sampled_latents_change_the_image_and_are_repeatable(make, tmp_path):
    for name, latents in (("a", "mean"), ("b", "sample"), ("c", "sample")):
        make(f"{name}.png", vae_latents=latents)
    mean, draw, again = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert (mean != draw).any() and (draw == again).all()


def test_an_image_between_phases_is_buffered_in_memory_if_there_is_room(make, tmp_path, monkeypatch):
    folders, real = [], ScratchImage.__init__

    def spy(self, folder, *size):
        folders.append(folder)
        real(self, folder, *size)

    monkeypatch.setattr(ScratchImage, "__init__", spy)
    report = make("a.png")
    assert folders == [None]
    stages = {(stage["kind"], stage["phase"]): stage["image_buffer_bytes"] for stage in report.plan["stages"]}
    assert stages["decode", 0] == stages["start", 1] == 64 * 64 * 6 and stages["decode", 1] == 0

    monkeypatch.setattr("linfusion_cli.planning.plan.keep_images_in_memory", lambda stages, image, machine: stages)
    make("b.png")
    assert folders == [None, tmp_path] and (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_a_vae_that_gives_nan_ends_with_an_error_and_no_file(make, tmp_path, xl_model):
    vae = AutoencoderKL(**build_small_vae().config)
    for layer in (vae.decoder.conv_norm_out, vae.decoder.conv_out):  # finite weights that overflow in the forward pass
        layer.weight.data.mul_(1e25)
    vae.save_pretrained(tmp_path / "nan")
    with pytest.raises(DataError, match="NaN.*float32"):
        make(vae=str(tmp_path / "nan"))
    assert {path.name for path in tmp_path.iterdir()} == {"nan", "out.png.linfusion"}  # the latents are kept


def test_running_out_of_memory_in_the_last_decode_is_reported_and_the_file_is_complete(make, tmp_path, monkeypatch):
    from linfusion_cli.vae import streaming

    make("a.png")
    real, failed = streaming.stream, []

    def scarce(stages, read, length, height, step=None):
        for i, rows in enumerate(real(stages, read, length, height, step)):
            if i == 9 and not failed:
                failed.append(height)
                raise MemoryError
            yield rows

    monkeypatch.setattr(streaming, "stream", scarce)
    listener = Listener()
    make("b.png", listener)
    notices = [event.text for event in listener.of(Notice)]
    assert failed and len(notices) == 1 and "memory" in notices[0] and "from row" in notices[0]
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


class Sink:
    """A RowSink that fails at its third strip."""

    def __init__(self):
        self.written = []

    def write(self, rows):
        if len(self.written) == 2:
            raise WriteFailed("No space left.")
        self.written.append(rows)


def test_an_error_of_the_sink_thread_is_raised_by_the_next_call():
    sink = Sink()
    with pytest.raises(WriteFailed, match="No space"), AsyncWriter(sink) as writer:
        for number in range(10):
            writer.write(np.full((1, 1, 3), number))
    assert [int(rows[0, 0, 0]) for rows in sink.written] == [0, 1]

    sink = Sink()
    with pytest.raises(WriteFailed, match="No space"), AsyncWriter(sink) as writer:
        for number in range(3):
            writer.write(np.full((1, 1, 3), number))
        writer.finish()


def test_a_full_disk_while_writing_leaves_nothing(make, tmp_path, monkeypatch):
    def fail(self, rows):
        self.abort()
        raise WriteFailed("No space left.")

    monkeypatch.setattr("linfusion_cli.images.write.png.PngSink.write", fail)
    with pytest.raises(WriteFailed):
        make()
    assert [path.name for path in tmp_path.iterdir()] == ["out.png.linfusion"]


def test_a_resized_image_is_padded_with_its_last_row_and_column():
    rows = np.random.default_rng(0).random((40, 30, 3), np.float32)
    read = build_resized_reader(
        lambda top, bottom, left, right: rows[top:bottom, left:right], Size(30, 40), Size(70, 90)
    )
    whole = read(0, 96, 0, 96)
    planes = [Image.fromarray(rows[..., i]).resize((70, 90), Image.Resampling.LANCZOS) for i in range(3)]
    np.testing.assert_allclose(whole[:90, :70], np.stack(planes, -1).clip(0, 1), atol=1e-5)
    assert (whole[90:, :70] == whole[89, :70]).all() and (whole[:, 70:] == whole[:, 69:70]).all()
    for region in ((0, 10, 0, 96), (85, 96, 60, 96), (91, 96, 72, 96), (91, 96, 0, 20)):
        np.testing.assert_allclose(read(*region), whole[region[0] : region[1], region[2] : region[3]], atol=1e-6)

"""Copies between host and device, executed as late as their streams allow."""

import pytest
import torch

from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.copies import create_streams
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.unet.forward import strip_forward
from tests.strips.late_card import late_card
from tests.unet.test_forward import (
    FAMILIES,
    TIMESTEP,
    random_condition,
    relative_error,
    run_plain,
    with_linear_attention,
)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", ["skips", "host"])
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_a_forward_waits_for_its_copies(family, place, dilation, monkeypatch):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet, late_card(monkeypatch) as card:
        latents, condition = torch.randn(1, 4, 37, 53, dtype=torch.float64), random_condition(unet)
        expected = run_plain(unet, latents, condition, dilation)
        context = StripContext(StripSize(3, 55), card.storage(place, torch.float64), SingleDevice(), dilation)
        result = strip_forward(unet, context, latents, TIMESTEP, condition)
        assert relative_error(result, expected) <= 1e-12
    assert card.freed_early == 0


def test_rows_written_through_one_view_are_awaited_by_a_read_through_another(monkeypatch):
    rows = torch.randn(1, 6, 4, 3)
    with late_card(monkeypatch) as card:
        host_map = fill_host_map(card, torch.zeros_like(rows))
        host_map.flatten().write(0, rows.flatten(1, 2).unsqueeze(2))
        assert torch.equal(host_map.read(0, 6), rows)
    assert card.freed_early == 0


def test_a_pending_upload_is_waited_for_when_its_map_is_deleted(monkeypatch):
    with late_card(monkeypatch) as card:
        host_map = fill_host_map(card, torch.ones(1, 8, 2, 3))
        host_map.read(0, 2)  # starts the upload of rows 2 to 4
        upload = host_map._prefetched
        del host_map
        assert upload.rows.sum() == 12
    assert card.freed_early == 0


def fill_host_map(card, rows: torch.Tensor):
    """Return a map on the host that contains `rows`."""
    host_map = card.storage("host", rows.dtype).new(*rows.shape)
    host_map.write(0, rows)
    return host_map


def test_prefetched_rows_are_waited_for_and_can_be_read_in_parts(monkeypatch):
    rows = torch.randn(1, 12, 2, 3)
    with late_card(monkeypatch) as card:
        host_map = fill_host_map(card, rows)
        for top, bottom in [(0, 5), (5, 9), (9, 12), (2, 4), (3, 6), (6, 7), (7, 8)]:
            assert torch.equal(host_map.read(top, bottom), rows[:, top:bottom])
    assert card.freed_early == 0


def test_a_stale_upload_is_waited_for_before_its_memory_is_reused(monkeypatch):
    with late_card(monkeypatch) as card:
        host_map = fill_host_map(card, torch.zeros(1, 12, 2, 3))
        assert host_map.read(0, 4).sum() == 0  # starts the upload of rows 4 to 8
        host_map.write(6, torch.ones(1, 2, 2, 3))
        assert host_map.read(4, 8).sum() == 12
    assert card.freed_early == 0


def test_a_skip_connection_releases_the_device_memory_of_its_copy(monkeypatch):
    with late_card(monkeypatch) as card:
        storage = card.storage("skips", torch.float32)
        source = storage.new(1, 4, 4, 2)
        source.write(0, torch.ones(1, 4, 4, 2))
        skip = storage.store_skip(source)
        assert len(storage.copies._pending_downloads) == 1
        skip.release()
        assert len(storage.copies._pending_downloads) == 0
        assert torch.equal(skip.read(0, 4), torch.ones(1, 4, 4, 2))


def test_a_card_has_a_stream_for_each_direction(monkeypatch):
    """The bus is full duplex: on a single stream, uploads would wait for downloads."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    up, down = create_streams(torch.device("cuda", 0))
    assert up is not None
    assert up is not down
    assert create_streams(torch.device("cpu")) == (None, None)

"""Copies between host and device in the worst order that their streams allow, as no card is at hand to run into it."""

import pytest
import torch

from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.copies import streams
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.unet.forward import strip_forward
from tests.strips.late_card import late_card
from tests.unet.test_forward import FAMILIES, TIMESTEP, error, plain, random_condition, with_linear_attention


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("place", ["skips", "host"])
@pytest.mark.parametrize("family", ["xl", "sd15"])
def test_a_forward_waits_for_its_copies(family, place, dilation, monkeypatch):
    with with_linear_attention(FAMILIES[family], torch.float64) as unet, late_card(monkeypatch) as card:
        latents, condition = torch.randn(1, 4, 37, 53, dtype=torch.float64), random_condition(unet)
        expected = plain(unet, latents, condition, dilation)
        run = Strips(StripSize(3, 55), card.storage(place, torch.float64), SingleDevice(), dilation)
        found = strip_forward(unet, run, latents, TIMESTEP, condition)
        assert error(found, expected) <= 1e-12
    assert card.freed_early == 0


def test_rows_written_through_one_view_are_awaited_by_a_read_through_another(monkeypatch):
    rows = torch.randn(1, 6, 4, 3)
    with late_card(monkeypatch) as card:
        found = filled(card, torch.zeros_like(rows))
        found.flattened().write(0, rows.flatten(1, 2).unsqueeze(2))
        assert torch.equal(found.read(0, 6), rows)
    assert card.freed_early == 0


def test_rows_under_way_when_a_map_goes_are_awaited(monkeypatch):
    with late_card(monkeypatch) as card:
        found = filled(card, torch.ones(1, 8, 2, 3))
        found.read(0, 2)  # and rows 2 to 4 are on their way
        upload = found._ahead
        del found
        assert upload.rows.sum() == 12
    assert card.freed_early == 0


def filled(card, rows: torch.Tensor):
    """A map on the host that holds `rows`."""
    found = card.storage("host", rows.dtype).new(*rows.shape)
    found.write(0, rows)
    return found


def test_rows_under_way_are_taken_in_part_and_waited_for(monkeypatch):
    rows = torch.randn(1, 12, 2, 3)
    with late_card(monkeypatch) as card:
        found = filled(card, rows)
        for top, bottom in [(0, 5), (5, 9), (9, 12), (2, 4), (3, 6), (6, 7), (7, 8)]:
            assert torch.equal(found.read(top, bottom), rows[:, top:bottom])
    assert card.freed_early == 0


def test_rows_that_were_under_way_too_early_are_waited_for_before_their_memory_serves_others(monkeypatch):
    with late_card(monkeypatch) as card:
        found = filled(card, torch.zeros(1, 12, 2, 3))
        assert found.read(0, 4).sum() == 0  # and rows 4 to 8 are on their way
        found.write(6, torch.ones(1, 2, 2, 3))
        assert found.read(4, 8).sum() == 12
    assert card.freed_early == 0


def test_a_skip_connection_no_longer_holds_its_original_once_it_is_taken(monkeypatch):
    with late_card(monkeypatch) as card:
        storage = card.storage("skips", torch.float32)
        source = storage.new(1, 4, 4, 2)
        source.write(0, torch.ones(1, 4, 4, 2))
        kept = storage.keep(source)
        assert len(storage.copies._going_down) == 1
        kept.release()
        assert len(storage.copies._going_down) == 0
        assert torch.equal(kept.read(0, 4), torch.ones(1, 4, 4, 2))


def test_a_card_has_a_stream_for_each_direction(monkeypatch):
    """A bus carries both at a time: on one stream, uploads would wait for downloads."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    up, down = streams(torch.device("cuda", 0))
    assert up is not None
    assert up is not down
    assert streams(torch.device("cpu")) == (None, None)

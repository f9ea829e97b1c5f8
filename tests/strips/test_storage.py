"""Maps give back what was written, wherever they wait, and their memory goes back to the system."""

import pytest
import torch

from linfusion_cli.hardware.device import resident_bytes
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.feature_map import HostFeatureMap
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import PLACES, Storage, mapped

CPU, MIB = torch.device("cpu"), 1 << 20


def storage(place: str) -> Storage:
    return Storage(place, CPU, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_rows_come_back_in_any_order(place):
    rows = torch.randn(2, 23, 5, 3)
    found = storage(place).new(*rows.shape)
    for top in (0, 7, 14, 21):
        found.write(top, rows[:, top : top + 7])
    for top, bottom in [(0, 4), (4, 8), (8, 12), (3, 5), (5, 7), (20, 23), (0, 23), (22, 23)]:
        assert torch.equal(found.read(top, bottom), rows[:, top:bottom])
    pixels = found.flattened()
    assert pixels.shape == (2, 115, 1, 3) and torch.equal(pixels.read(5, 17).squeeze(2), rows.flatten(1, 2)[:, 5:17])


def test_rows_that_were_read_ahead_are_not_stale():
    found = storage("host").new(1, 12, 2, 1)
    found.write(0, torch.zeros(1, 12, 2, 1))
    assert found.read(0, 4).sum() == 0  # and rows 4 to 8 are on their way
    found.write(6, torch.ones(1, 2, 2, 1))
    assert found.read(4, 8).sum() == 4
    assert found.read(8, 12).sum() == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_skip_connection_is_the_map_or_its_copy_on_the_host(place):
    made = storage(place)
    source = made.new(1, 4, 4, 2)
    source.write(0, torch.ones(1, 4, 4, 2))
    kept = made.keep(source)
    assert (kept is source) == (place != "skips") and isinstance(kept, HostFeatureMap) == (place != "device")
    assert torch.equal(kept.read(0, 4), torch.ones(1, 4, 4, 2))
    kept.release()
    assert not kept.kept


def test_a_map_s_memory_goes_back_to_the_system():
    before = resident_bytes()
    held = mapped((200, MIB), torch.uint8).fill_(1)
    assert resident_bytes() - before > 180 * MIB
    view = held[:10]
    del held
    assert resident_bytes() - before > 180 * MIB and view.min() == 1  # a sum would copy it, as int64
    del view
    assert resident_bytes() - before < 20 * MIB


def test_memory_that_is_not_there_is_a_memory_error():
    with pytest.raises(MemoryError):
        mapped((1 << 30, 1 << 30), torch.float32)


def test_where_memory_runs_out_strips_shrink_then_maps_move_out_then_strips_shrink_to_a_row(monkeypatch):
    """On a card; on a CPU the host's memory is the same, and maps stay where they are."""
    seen, run = [], Strips(StripSize(64, 32768), storage("device"), SingleDevice())
    assert run.storage.move_to_host() is None
    run.storage.device = torch.device("meta")  # none that is the host
    while run := run.smaller():
        seen.append((run.size.rows, run.storage.place))
    assert seen[:5] == [(32, "device"), (16, "device"), (16, "skips"), (16, "host"), (8, "host")]
    assert seen[-1] == (1, "host")

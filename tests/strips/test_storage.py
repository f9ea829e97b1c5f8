"""Maps return the data that was written, in every place, and free their memory."""

import pytest
import torch

from linfusion_cli.hardware.host_memory import resident_bytes
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.feature_map import HostFeatureMap
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES, Storage, allocate_mapped

CPU, MIB = torch.device("cpu"), 1 << 20


def create_storage(place: str) -> Storage:
    return Storage(place, CPU, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_rows_come_back_in_any_order(place):
    rows = torch.randn(2, 23, 5, 3)
    feature_map = create_storage(place).new(*rows.shape)
    for top in (0, 7, 14, 21):
        feature_map.write(top, rows[:, top : top + 7])
    for top, bottom in [(0, 4), (4, 8), (8, 12), (3, 5), (5, 7), (20, 23), (0, 23), (22, 23)]:
        assert torch.equal(feature_map.read(top, bottom), rows[:, top:bottom])
    pixels = feature_map.flatten()
    assert pixels.shape == (2, 115, 1, 3) and torch.equal(pixels.read(5, 17).squeeze(2), rows.flatten(1, 2)[:, 5:17])


def test_rows_that_were_read_ahead_are_not_stale():
    host_map = create_storage("host").new(1, 12, 2, 1)
    host_map.write(0, torch.zeros(1, 12, 2, 1))
    assert host_map.read(0, 4).sum() == 0  # starts the prefetch of rows 4 to 8
    host_map.write(6, torch.ones(1, 2, 2, 1))
    assert host_map.read(4, 8).sum() == 4
    assert host_map.read(8, 12).sum() == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_skip_connection_is_the_map_or_its_copy_on_the_host(place):
    storage = create_storage(place)
    source = storage.new(1, 4, 4, 2)
    source.write(0, torch.ones(1, 4, 4, 2))
    skip = storage.store_skip(source)
    assert (skip is source) == (place != "skips") and isinstance(skip, HostFeatureMap) == (place != "device")
    assert torch.equal(skip.read(0, 4), torch.ones(1, 4, 4, 2))
    skip.release()
    assert not skip.is_read_only


def test_the_memory_of_a_map_is_returned_to_the_system():
    initial_bytes = resident_bytes()
    tensor = allocate_mapped((200, MIB), torch.uint8).fill_(1)
    assert resident_bytes() - initial_bytes > 180 * MIB
    view = tensor[:10]
    del tensor
    assert resident_bytes() - initial_bytes > 180 * MIB and view.min() == 1  # a sum would copy it to int64
    del view
    assert resident_bytes() - initial_bytes < 20 * MIB


def test_a_failed_allocation_raises_memory_error():
    with pytest.raises(MemoryError):
        allocate_mapped((1 << 30, 1 << 30), torch.float32)


def test_memory_is_reduced_by_smaller_strips_then_host_maps_then_single_rows(monkeypatch):
    """This holds for GPUs. On the CPU, host memory is device memory and maps are not moved."""
    settings, context = [], StripContext(StripSize(64, 32768), create_storage("device"), SingleDevice())
    assert context.storage.move_to_host() is None
    context.storage.device = torch.device("meta")  # any device but the CPU
    while context := context.reduce_memory():
        settings.append((context.size.rows, context.storage.place))
    assert settings[:5] == [(32, "device"), (16, "device"), (16, "skips"), (16, "host"), (8, "host")]
    assert settings[-1] == (1, "host")

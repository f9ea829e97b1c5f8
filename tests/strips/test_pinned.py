"""Pinned memory in exact sizes: first-fit blocks, one region of the planned size, freed when it is unreferenced."""

import gc
import random
from types import SimpleNamespace

import pytest
import torch

from linfusion_cli.strips import pinned
from linfusion_cli.strips.copies import Copies, Download
from linfusion_cli.strips.pinned import ALIGNMENT, AddressSpace, PinnedMemory
from tests.strips.late_card import late_card

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def test_blocks_never_overlap_and_have_the_lowest_possible_address():
    rng, space, live = random.Random(0), AddressSpace(), {}
    for _ in range(2000):
        if live and rng.random() < 0.5:
            offset = rng.choice(list(live))
            space.free(offset)
            del live[offset]
        else:
            size = rng.randrange(1, 40 * ALIGNMENT)
            rounded = -(-size // ALIGNMENT) * ALIGNMENT
            offset = space.allocate(size)
            taken = sorted(live.items())
            gaps = [0, *(begin + length for begin, length in taken)]
            ends = [*(begin for begin, _ in taken), float("inf")]
            assert offset == next(gap for gap, end in zip(gaps, ends, strict=True) if end - gap >= rounded)
            live[offset] = rounded
        assert space.peak >= max((begin + length for begin, length in live.items()), default=0)
    for offset in live:
        space.free(offset)
    assert space.is_empty
    assert space.allocate(1 << 40) == 0


def test_a_space_of_the_planned_size_has_room_for_the_same_sequence():
    rng, sequence = random.Random(1), []
    for _ in range(500):
        sequence.append(rng.randrange(1, 1 << 20) if rng.random() < 0.55 else None)

    def allocate_all(space):
        live, offsets = [], []
        for size in sequence:
            if size is None:
                if live:
                    space.free(live.pop(choices[len(offsets)] % len(live)))
            else:
                offsets.append(space.allocate(size))
                live.append(offsets[-1])
        return offsets

    choices = [rng.randrange(1 << 30) for _ in range(len(sequence) + 1)]
    planned = AddressSpace()
    assert allocate_all(AddressSpace(allocate_all(planned) and planned.peak)) == allocate_all(AddressSpace())


@pytest.fixture
def driver(monkeypatch):
    """A driver that records pinned memory, address -> bytes, up to a limit."""
    driver = SimpleNamespace(pinned={}, limit=1 << 40, synchronized=0)

    def register(address, size, flags):
        if sum(driver.pinned.values()) + size > driver.limit:
            return 2
        driver.pinned[address] = size
        return 0

    def synchronize(device):
        driver.synchronized += 1

    calls = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=driver.pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return driver


def test_one_region_of_exactly_the_expected_size_is_pinned(driver):
    memory = PinnedMemory(CARD, expected=10 * ALIGNMENT)
    first = memory.empty((4 * ALIGNMENT,), torch.uint8)
    second = memory.empty((3 * ALIGNMENT,), torch.float16)
    assert list(driver.pinned.values()) == [10 * ALIGNMENT]
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()


def test_memory_is_reused_when_no_view_of_it_is_left(driver):
    memory = PinnedMemory(CARD, expected=2 * ALIGNMENT)
    place = (first := memory.empty((2 * ALIGNMENT,), torch.uint8)).data_ptr()
    view = first[5:]
    del first
    other = memory.empty((ALIGNMENT,), torch.uint8)
    assert other.data_ptr() != place
    del view
    assert memory.empty((2 * ALIGNMENT,), torch.uint8).data_ptr() == place


def test_unexpected_tensors_get_separate_regions_and_empty_regions_are_freed(driver):
    memory = PinnedMemory(CARD)
    first = memory.empty((3 * ALIGNMENT,), torch.uint8)
    second = memory.empty((5 * ALIGNMENT,), torch.uint8)
    assert sorted(driver.pinned.values()) == [3 * ALIGNMENT, 5 * ALIGNMENT]
    del first
    third = memory.empty((4 * ALIGNMENT,), torch.uint8)
    assert sorted(driver.pinned.values()) == [4 * ALIGNMENT, 5 * ALIGNMENT]
    del second, third


def test_memory_is_unpinned_after_synchronisation_with_the_device(driver):
    memory = PinnedMemory(CARD)
    rows = memory.empty((1, 2, 3), torch.float32)
    del memory
    gc.collect()
    assert driver.pinned
    assert not driver.synchronized
    del rows
    assert not driver.pinned
    assert driver.synchronized == 1


def test_memory_that_cannot_be_pinned_raises_memory_error(driver):
    driver.limit = ALIGNMENT
    with pytest.raises(MemoryError, match=str(2 * ALIGNMENT)):
        PinnedMemory(CARD).empty((2 * ALIGNMENT,), torch.uint8)


def test_a_lost_device_does_not_keep_memory(driver, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    rows = PinnedMemory(CARD).empty((1, 2, 3), torch.float32)
    del rows
    gc.collect()


class HostMemory:
    """Pinned memory of a LateCard, in CPU memory."""

    def __init__(self, card):
        self.card = card

    def empty(self, shape, dtype):
        tensor = torch.empty(shape, dtype=dtype)
        self.card._on_host.add(tensor.untyped_storage().data_ptr())
        return tensor


def test_downloads_of_rows_are_waited_for(monkeypatch):
    rows = torch.randn(3, 4, 3)
    with late_card(monkeypatch) as card:
        copies = build_late_copies(card)
        download = Download.start(rows, torch.tensor(True), copies, 5)
        assert torch.equal(download.wait(), rows)
        assert Download.start(rows, torch.tensor(False), copies, 5).wait() is None
    assert card.freed_early == 0


def test_staged_tensors_are_copied_before_their_memory_is_reused(monkeypatch):
    parts = [torch.randn(2, 3) for _ in range(6)]
    with late_card(monkeypatch) as card:
        copies = build_late_copies(card)
        uploaded = [copies.to_device(part, torch.float32) for part in parts]
        assert all(torch.equal(one, other) for one, other in zip(uploaded, parts, strict=True))
        assert len(copies._staged) == 2


def build_late_copies(card) -> Copies:
    copies = card.storage("host", torch.float32).copies
    copies.pinned = HostMemory(card)
    return copies


def test_memory_is_registered_as_portable(driver, monkeypatch):
    flags = []
    calls = SimpleNamespace(cudaHostRegister=lambda *call: flags.append(call[2]) or 0, cudaHostUnregister=int)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    pinned.PinnedRegion(CARD, ALIGNMENT)
    assert flags == [1]

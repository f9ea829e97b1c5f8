"""Pinned memory in exact sizes: blocks at the lowest place, one region as planned, given back when nothing needs it."""

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


def test_blocks_never_overlap_and_lie_as_low_as_they_can():
    chance, space, live = random.Random(0), AddressSpace(), {}
    for _ in range(2000):
        if live and chance.random() < 0.5:
            offset = chance.choice(list(live))
            space.free(offset)
            del live[offset]
        else:
            size = chance.randrange(1, 40 * ALIGNMENT)
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


def test_a_space_that_is_as_large_as_planned_has_room_for_the_same_sequence():
    chance, sequence = random.Random(1), []
    for _ in range(500):
        sequence.append(chance.randrange(1, 1 << 20) if chance.random() < 0.55 else None)

    def placed(space):
        live, offsets = [], []
        for size in sequence:
            if size is None:
                if live:
                    space.free(live.pop(chance_of[len(offsets)] % len(live)))
            else:
                offsets.append(space.allocate(size))
                live.append(offsets[-1])
        return offsets

    chance_of = [chance.randrange(1 << 30) for _ in range(len(sequence) + 1)]
    planned = AddressSpace()
    assert placed(AddressSpace(placed(planned) and planned.peak)) == placed(AddressSpace())


@pytest.fixture
def driver(monkeypatch):
    """A driver that pins what it is asked to: address -> bytes; it may have a limit."""
    found = SimpleNamespace(pinned={}, limit=1 << 40, synchronized=0)

    def register(address, size, flags):
        if sum(found.pinned.values()) + size > found.limit:
            return 2
        found.pinned[address] = size
        return 0

    def synchronize(device):
        found.synchronized += 1

    calls = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=found.pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return found


def test_one_region_is_pinned_of_exactly_the_size_that_is_expected(driver):
    memory = PinnedMemory(CARD, expected=10 * ALIGNMENT)
    first = memory.empty((4 * ALIGNMENT,), torch.uint8)
    second = memory.empty((3 * ALIGNMENT,), torch.float16)
    assert list(driver.pinned.values()) == [10 * ALIGNMENT]
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()


def test_memory_serves_again_when_no_view_of_it_is_left(driver):
    memory = PinnedMemory(CARD, expected=2 * ALIGNMENT)
    place = (first := memory.empty((2 * ALIGNMENT,), torch.uint8)).data_ptr()
    view = first[5:]
    del first
    other = memory.empty((ALIGNMENT,), torch.uint8)
    assert other.data_ptr() != place
    del view
    assert memory.empty((2 * ALIGNMENT,), torch.uint8).data_ptr() == place


def test_what_is_not_expected_has_regions_of_its_own_and_empty_ones_go_first(driver):
    memory = PinnedMemory(CARD)
    first = memory.empty((3 * ALIGNMENT,), torch.uint8)
    second = memory.empty((5 * ALIGNMENT,), torch.uint8)
    assert sorted(driver.pinned.values()) == [3 * ALIGNMENT, 5 * ALIGNMENT]
    del first
    third = memory.empty((4 * ALIGNMENT,), torch.uint8)
    assert sorted(driver.pinned.values()) == [4 * ALIGNMENT, 5 * ALIGNMENT]
    del second, third


def test_all_is_given_back_after_the_card_is_done(driver):
    memory = PinnedMemory(CARD)
    rows = memory.empty((1, 2, 3), torch.float32)
    del memory
    gc.collect()
    assert driver.pinned
    assert not driver.synchronized
    del rows
    assert not driver.pinned
    assert driver.synchronized == 1


def test_memory_that_cannot_be_pinned_is_memory_that_has_run_out(driver):
    driver.limit = ALIGNMENT
    with pytest.raises(MemoryError, match="cannot be pinned"):
        PinnedMemory(CARD).empty((2 * ALIGNMENT,), torch.uint8)


def test_a_lost_device_does_not_keep_memory(driver, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    rows = PinnedMemory(CARD).empty((1, 2, 3), torch.float32)
    del rows
    gc.collect()


class OnHost:
    """Pinned memory for a late card, which is the CPU."""

    def __init__(self, card):
        self.card = card

    def empty(self, shape, dtype):
        found = torch.empty(shape, dtype=dtype)
        self.card._on_host.add(found.untyped_storage().data_ptr())
        return found


def test_rows_that_leave_the_card_are_waited_for(monkeypatch):
    rows = torch.randn(3, 4, 3)
    with late_card(monkeypatch) as card:
        copies = late_copies(card)
        download = Download.of(rows, torch.tensor(True), copies, 5)
        assert torch.equal(download.wait(), rows)
        assert Download.of(rows, torch.tensor(False), copies, 5).wait() is None
    assert card.freed_early == 0


def test_tensors_that_go_to_the_card_are_whole_when_their_memory_serves_the_next(monkeypatch):
    parts = [torch.randn(2, 3) for _ in range(6)]
    with late_card(monkeypatch) as card:
        copies = late_copies(card)
        arrived = [copies.to_device(part, torch.float32) for part in parts]
        assert all(torch.equal(one, other) for one, other in zip(arrived, parts, strict=True))
        assert len(copies._staged) == 2


def late_copies(card) -> Copies:
    copies = card.storage("host", torch.float32).copies
    copies.pinned = OnHost(card)
    return copies


def test_a_driver_is_asked_for_memory_that_all_contexts_know(driver, monkeypatch):
    asked = []
    calls = SimpleNamespace(cudaHostRegister=lambda *call: asked.append(call[2]) or 0, cudaHostUnregister=int)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    pinned.Region(CARD, ALIGNMENT)
    assert asked == [1]

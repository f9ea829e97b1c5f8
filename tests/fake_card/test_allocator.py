"""The simulated allocator behaves like torch's."""

import random

import pytest

from tests.fake_card.device.allocator import LARGE_SEGMENT, MIB, SMALL_SEGMENT, CachingAllocator, OutOfMemory


@pytest.mark.parametrize(
    ("size", "native", "expandable"),
    [
        (1, SMALL_SEGMENT, SMALL_SEGMENT),
        (MIB, SMALL_SEGMENT, SMALL_SEGMENT),
        (MIB + 1, LARGE_SEGMENT, LARGE_SEGMENT),
        (9 * MIB, LARGE_SEGMENT, LARGE_SEGMENT),
        (11 * MIB, 12 * MIB, LARGE_SEGMENT),
        (63 * MIB, 64 * MIB, 80 * MIB),
    ],
)
def test_segments_have_the_sizes_of_torch(size, native, expandable):
    for is_expandable, reserved in ((False, native), (True, expandable)):
        allocator = CachingAllocator(is_expandable)
        allocator.allocate(size)
        assert allocator.reserved == reserved
        assert allocator.allocated >= size


def test_a_freed_block_is_reused():
    for expandable in (False, True):
        allocator = CachingAllocator(expandable)
        allocator.free(allocator.allocate(64 * MIB))
        allocator.allocate(40 * MIB)
        assert allocator.reserved == allocator.peak_reserved <= 80 * MIB


def test_only_expandable_segments_grow_for_a_larger_block():
    reserved = []
    for expandable in (False, True):
        allocator = CachingAllocator(expandable)
        allocator.free(allocator.allocate(100 * MIB))
        allocator.allocate(120 * MIB)
        reserved.append(allocator.reserved)
    assert reserved == [220 * MIB, 120 * MIB]


def test_streams_do_not_share_blocks():
    allocator = CachingAllocator(expandable=True)
    allocator.free(allocator.allocate(20 * MIB, "copies"))
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 40 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_cached_memory_is_freed_before_out_of_memory(expandable):
    allocator = CachingAllocator(expandable, limit=100 * MIB)
    blocks = [allocator.allocate(40 * MIB), allocator.allocate(40 * MIB)]
    with pytest.raises(OutOfMemory):
        allocator.allocate(60 * MIB)
    allocator.free(blocks.pop())
    allocator.allocate(60 * MIB)
    assert allocator.reserved == 100 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_the_sums_are_right_after_any_sequence(expandable):
    rng = random.Random(0)
    allocator, live = CachingAllocator(expandable), []
    for _ in range(3000):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        elif rng.random() < 0.01:
            allocator.empty_cache()
        else:
            live.append(allocator.allocate(int(2 ** rng.uniform(0, 27)), rng.choice(["main", "side"])))
        assert allocator.allocated == sum(block.size for block in live)
        spans = sorted((id(block.pool), block.address, block.address + block.size) for block in live)
        assert all(one[0] != other[0] or one[2] <= other[1] for one, other in zip(spans, spans[1:], strict=False))
        assert allocator.reserved >= allocator.allocated
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (0, 0)

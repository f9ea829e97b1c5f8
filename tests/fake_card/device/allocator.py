"""A simulation of torch's CUDA caching allocator: the memory reserved for a sequence of allocations.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in torch 2.13, with its default options and with
`expandable_segments:True`.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable
from dataclasses import dataclass

MIB = 1 << 20
ROUNDING = 512  # each allocation is a multiple of this
SMALL_BYTES = MIB  # up to this size, allocations share the small pool
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB  # larger native allocations have their own segment
OWN_SEGMENT_ROUNDING = 2 * MIB
ADDRESS_SPACE = 1 << 50  # of an expandable segment; more than the memory of any device


class OutOfMemory(Exception):
    """The allocation exceeds the limit, even without cached memory."""


@dataclass(eq=False)
class Block:
    """A range of addresses in a segment: allocated, free (mapped, cached) or unmapped."""

    pool: Pool
    address: int
    size: int
    state: str  # "allocated", "free" or "unmapped"
    previous: Block | None = None
    next: Block | None = None

    def is_usable(self) -> bool:
        """Return whether the block is free or unmapped."""
        return self.state != "allocated"


class Pool:
    """The blocks of one kind (small or large) on one stream."""

    def __init__(self, is_small: bool):
        self.is_small = is_small
        self.page = SMALL_SEGMENT if is_small else LARGE_SEGMENT
        self.free: list[tuple[int, int, Block]] = []  # by size, then by address
        self.unmapped: list[tuple[int, Block]] = []  # by address

    def insert(self, block: Block) -> None:
        if block.state == "free":
            bisect.insort(self.free, (block.size, block.address, block))
        elif block.state == "unmapped":
            bisect.insort(self.unmapped, (block.address, block))

    def remove(self, block: Block) -> None:
        if block.state == "free":
            self.free.pop(bisect.bisect_left(self.free, (block.size, block.address)))
        elif block.state == "unmapped":
            self.unmapped.pop(bisect.bisect_left(self.unmapped, (block.address,)))


class CachingAllocator:
    """Allocates and frees blocks like torch, and counts reserved and allocated bytes with their peaks."""

    def __init__(self, expandable: bool, limit: int | None = None):
        self.expandable, self.limit = expandable, limit
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._pools: dict[tuple[bool, Hashable], Pool] = {}
        self._next_address = 0

    def reset_peaks(self) -> None:
        """Restart the peaks at the current values."""
        self.peak_reserved, self.peak_allocated = self.reserved, self.allocated

    def allocate(self, size: int, stream: Hashable = None) -> Block | None:
        """Return a block of at least `size` bytes, None for 0 bytes; raises OutOfMemory."""
        if size == 0:
            return None
        size = -(-size // ROUNDING) * ROUNDING
        pool = self._get_pool(size <= SMALL_BYTES, stream)
        block = self._find_best_fit(pool, size) or self._grow(pool, size)
        if block is None:
            self.empty_cache()
            block = self._grow(pool, size)
        if block is None:
            raise OutOfMemory(f"{size} bytes beyond {self.reserved} of {self.limit}")
        self._allocate_from(block, size)
        return block

    def free(self, block: Block | None) -> None:
        """Return `block` to its pool, merged with free neighbours."""
        if block is None:
            return
        self.allocated -= block.size
        block.state = "free"
        self._insert_merged(block)

    def empty_cache(self) -> None:
        """Return free memory to the device: whole segments, or whole pages of expandable segments."""
        for pool in self._pools.values():
            for _, _, block in list(pool.free):
                if self.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _get_pool(self, is_small: bool, stream: Hashable) -> Pool:
        key = is_small, stream
        if key not in self._pools:
            self._pools[key] = pool = Pool(is_small)
            if self.expandable:
                pool.insert(Block(pool, 0, ADDRESS_SPACE, "unmapped"))
        return self._pools[key]

    def _find_best_fit(self, pool: Pool, size: int) -> Block | None:
        """Return the smallest free block that is large enough, measured by the size to which it can grow."""
        index = bisect.bisect_left(pool.free, (size,))
        if index == len(pool.free):
            return None
        while index + 1 < len(pool.free) and max_size(pool.free[index + 1][2]) < max_size(pool.free[index][2]):
            index += 1
        return pool.free[index][2]

    def _grow(self, pool: Pool, size: int) -> Block | None:
        """Return a free block of new memory, or None beyond the limit."""
        return self._extend(pool, size) if self.expandable else self._new_segment(pool, size)

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        large = LARGE_SEGMENT if size < OWN_SEGMENT_BYTES else round_up(size, OWN_SEGMENT_ROUNDING)
        segment = SMALL_SEGMENT if pool.is_small else large
        if not self._reserve(segment):
            return None
        block = Block(pool, self._next_address, segment, "free")
        self._next_address += ADDRESS_SPACE
        pool.insert(block)
        return block

    def _extend(self, pool: Pool, size: int) -> Block | None:
        """Map pages at the lowest address where `size` bytes fit, including a free block directly before them."""
        for _, unmapped in pool.unmapped:
            first = unmapped
            if first.previous is not None and first.previous.is_usable():
                first = first.previous
            if count_usable_bytes(first, size) >= size:
                return self._map_pages(first, size)
        return None

    def _map_pages(self, block: Block, size: int) -> Block | None:
        while block.state == "unmapped" or block.size < size:
            unmapped = block if block.state == "unmapped" else block.next
            missing = size if block is unmapped else size - block.size
            pages = min(round_up(missing, block.pool.page), unmapped.size)
            if not self._reserve(pages):
                return None
            block = self._map(unmapped, pages)
        return block

    def _map(self, block: Block, pages: int) -> Block:
        """Map the first `pages` bytes of an unmapped block -> a free block, merged with free neighbours."""
        block.pool.remove(block)
        if block.size > pages:
            block.pool.insert(split(block, pages, "unmapped"))
        block.state = "free"
        return self._insert_merged(block)

    def _unmap(self, block: Block) -> None:
        pool, page = block.pool, block.pool.page
        start, stop = round_up(block.address, page), (block.address + block.size) // page * page
        if stop <= start:
            return
        pool.remove(block)
        if start > block.address:
            middle = split(block, start - block.address, "free")
            pool.insert(block)
            block = middle
        if block.address + block.size > stop:
            pool.insert(split(block, stop - block.address, "free"))
        self.reserved -= block.size
        block.state = "unmapped"
        self._insert_merged(block)

    def _allocate_from(self, block: Block, size: int) -> None:
        block.pool.remove(block)
        remaining = block.size - size
        if remaining >= ROUNDING if block.pool.is_small or self.expandable else remaining > SMALL_BYTES:
            block.pool.insert(split(block, size, "free"))
        block.state = "allocated"
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def _insert_merged(self, block: Block) -> Block:
        """Insert a free or unmapped block into its pool, merged with neighbours of the same state."""
        for neighbour in (block.next, block.previous):
            if neighbour is not None and neighbour.state == block.state:
                block.pool.remove(neighbour)
                block = merge(*sorted((block, neighbour), key=lambda each: each.address))
        block.pool.insert(block)
        return block

    def _reserve(self, size: int) -> bool:
        if self.limit is not None and self.reserved + size > self.limit:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True


def split(block: Block, size: int, state: str) -> Block:
    """Split `block` at `size` -> the rest, in this state, not yet in a list of the pool."""
    rest = Block(block.pool, block.address + size, block.size - size, state, block, block.next)
    if block.next is not None:
        block.next.previous = rest
    block.next, block.size = rest, size
    return rest


def merge(block: Block, following: Block) -> Block:
    """Merge `block` with the block that follows it."""
    block.size, block.next = block.size + following.size, following.next
    if following.next is not None:
        following.next.previous = block
    return block


def max_size(block: Block) -> int:
    """Return the size to which a block can grow."""
    can_grow = block.next is not None and block.next.state == "unmapped"
    return block.size + (block.next.size if can_grow else 0)


def count_usable_bytes(block: Block | None, required: int) -> int:
    """Return the bytes in `block` and the usable blocks after it; stop counting at `required`."""
    total = 0
    while block is not None and block.is_usable() and total < required:
        total, block = total + block.size, block.next
    return total


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

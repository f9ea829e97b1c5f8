"""Deflate for images: ISA-L if it is installed, else zlib with the Z_RLE strategy.

Measured on photographs after a PNG filter or a TIFF predictor: ISA-L level 1 has the compression ratio of libdeflate
level 1 in half its time, and takes a third of the time of Z_RLE. Z_RLE makes files a sixth smaller, which is smaller
than with zlib level 6.
"""

import zlib
from typing import Any

import numpy as np

try:
    from isal import isal_zlib
except ImportError:  # there is no wheel for this platform
    isal_zlib = None

ADLER_BASE = 65521

adler32 = isal_zlib.adler32 if isal_zlib else zlib.adler32
crc32 = isal_zlib.crc32 if isal_zlib else zlib.crc32
# The class of incremental zlib decompressors, which verify the Adler-32 of the stream.
Inflater = isal_zlib.decompressobj if isal_zlib else zlib.decompressobj
INFLATE_ERRORS: tuple[type[Exception], ...] = (zlib.error,)
if isal_zlib:
    INFLATE_ERRORS += (isal_zlib.error,)  # pyright: ignore[reportAssignmentType]  # declared as an instance


def deflate_part(data: np.ndarray) -> bytes:
    """Compress C-contiguous `data` to raw deflate (RFC 1951) that ends at a byte boundary without a final block.

    Parts can be concatenated.
    """
    codec = _create_compressor(-15)
    return codec.compress(data) + codec.flush(zlib.Z_SYNC_FLUSH)


def compress_zlib(data: np.ndarray) -> bytes:
    """Compress C-contiguous `data` to a complete zlib stream (RFC 1950)."""
    codec = _create_compressor(15)
    return codec.compress(data) + codec.flush()


def combine_adler32(first: int, second: int, second_bytes: int) -> int:
    """Return the Adler-32 of two concatenated pieces, like zlib's adler32_combine."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + second_bytes * ((first & 0xFFFF) - 1)
    return (high % ADLER_BASE) << 16 | low % ADLER_BASE


def _create_compressor(window_bits: int) -> Any:
    if isal_zlib:
        return isal_zlib.compressobj(1, zlib.DEFLATED, window_bits)
    return zlib.compressobj(1, zlib.DEFLATED, window_bits, 9, zlib.Z_RLE)

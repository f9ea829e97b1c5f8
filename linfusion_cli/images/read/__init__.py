"""Readers: file information without decoding, and the rows of input images in sRGB."""

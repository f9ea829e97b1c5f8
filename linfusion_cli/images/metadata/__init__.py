"""Metadata of output files: the request as JSON, A1111 parameters, XMP and the sRGB profile."""

"""Sinks: writers of TIFF, PNG, JPEG and preview files that take an image from top to bottom."""

"""Verification of image files: decode all data and compare the checksum."""

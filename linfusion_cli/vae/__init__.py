"""Decode and encode images with a VAE, a strip of rows at a time."""

"""Resolve and check the inputs of a run before it loads any model: files, images, prompts, disk space."""

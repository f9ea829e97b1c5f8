"""Checkpoint folders on disk: their format, locking, integrity checks and atomic replacement.

The content of a checkpoint (run state, metadata, resume rules) belongs in `linfusion_cli.run.checkpoint`.
"""

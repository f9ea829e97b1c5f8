"""Draws the scenes, trains and exports the small embedded model; `python -m tools.demo_model`."""

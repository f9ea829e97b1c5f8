"""Saving and resuming a run: its state, when to save it, and which saved runs a request can resume."""

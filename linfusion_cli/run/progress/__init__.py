"""Progress of a run: its stages, events and measurements."""

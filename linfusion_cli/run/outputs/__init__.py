"""The files that a run writes: which exist already, opening and completing them, and the report."""

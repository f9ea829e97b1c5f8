"""Small wrong edits of the program, each of which a test must notice; `python -m tools.mutants`."""

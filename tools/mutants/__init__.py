"""Mutation testing: small wrong edits of the code, each of which a test must detect; `python -m tools.mutants`."""

"""Commands `linfusion models list`, `pull` and `check`."""

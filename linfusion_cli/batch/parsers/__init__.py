"""Read job lists in JSONL, CSV, TOML and plain text, one job at a time; an invalid job does not affect the others."""

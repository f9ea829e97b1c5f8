"""Basics without torch: errors and exit codes, events, sizes, signals, files, and parsing and formatting of values."""

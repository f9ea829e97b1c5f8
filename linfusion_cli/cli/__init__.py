"""The command line: parses options, runs commands, and shows progress, results and errors."""

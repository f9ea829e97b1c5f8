"""The command line: options in, requests out, events and errors on the terminal."""

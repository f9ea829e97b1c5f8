"""Parsing of the command line: the options that commands share, and the requests built from them."""

"""Output of the command line: results on stdout; progress, messages and tables on stderr; log files and reports."""

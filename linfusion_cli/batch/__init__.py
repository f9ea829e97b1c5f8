"""Run many jobs from a list: parse lists, name files, order and run the jobs, and log their results."""

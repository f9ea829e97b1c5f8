"""The two numbers that decide which checkpoints this program resumes. The version of the program decides nothing.

Checkpoints of these numbers are stored in `tests/golden/checkpoints`. A change must read them, or raise a number and
mention it in CHANGELOG.md.
"""

# The format of checkpoints. Raise it if this program cannot read earlier checkpoints, or earlier programs of the same
# numbers would misread those of this one. Additional keys do not need that: they are preserved and ignored.
SCHEMA = 3

# The values that a run computes. Raise it with every change after which the same request on the same machine gives
# other latents, for example another order of sums, noise, schedule, default strategy or precision.
NUMERICS = 1

"""Measure the shipped demo model and generate the sample images of the documentation."""

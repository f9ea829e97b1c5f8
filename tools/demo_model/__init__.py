"""Draw the training images of the embedded demo model, train it and export it; `python -m tools.demo_model`."""

"""The stages of a run, in the order of the pipeline: plan, load, denoise, convert, write. Needs torch."""

"""The commands of the program, one module each; `run_command` has the steps that generate, upscale and decode share."""

"""Where settings come from: the command line, the environment, the config file, presets and jobs."""

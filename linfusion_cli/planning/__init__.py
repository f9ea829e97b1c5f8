"""Plan a run before models are loaded: the strategy of each stage on this machine, its memory and its time."""

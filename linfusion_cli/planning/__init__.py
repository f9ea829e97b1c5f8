"""Before anything is loaded: how each phase will run on this machine, and what it will take."""

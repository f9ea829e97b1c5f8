"""Models: locate and download them, detect their family, load and check their networks and adapters."""

"""Devices and memory: choose and start a GPU, configure torch's allocator, measure memory, interpret torch's errors."""

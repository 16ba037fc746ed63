"""T steps of N environments, written into buffers that are allocated once."""

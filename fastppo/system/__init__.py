"""The machine and the process: processors, paths, files, signals, torch's global settings."""

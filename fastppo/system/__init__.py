"""The machine and the process: processors, folders, signals of the platform, torch's global settings."""

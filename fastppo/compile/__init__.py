"""Compiled programs: choosing between eager and compiled, building, caching and calling."""

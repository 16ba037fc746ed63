"""Read runs from disk: policies, curves, statistics, videos."""

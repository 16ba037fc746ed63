"""What finished runs are read for: policies, curves, statistics, videos."""

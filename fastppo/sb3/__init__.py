"""Policies of Stable-Baselines3, read as data and written as ours. Knows nothing of training."""

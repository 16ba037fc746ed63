"""What a run keeps and shows: directory, checkpoints, logs, episode statistics, display. Knows nothing of PPO."""

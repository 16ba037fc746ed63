"""The maths of PPO as pure functions of tensors. Knows nothing of environments, configuration, networks or files."""

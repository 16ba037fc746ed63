"""fastppo: a fast, correct, readable PPO trainer for any Gymnasium environment."""

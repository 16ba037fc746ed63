"""PPO's update and acting for multi-layer perceptrons, written by hand in C++. Each run compares them with the eager form."""

"""From observations to actions: networks, distributions, normalisation. Knows nothing of environments' stepping or of files."""

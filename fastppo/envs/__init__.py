"""Environments: made, adapted and checked at the border. Knows nothing of policies or learning."""

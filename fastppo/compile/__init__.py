"""Which form of a program a run uses, and how the compiled forms are made, kept and called."""

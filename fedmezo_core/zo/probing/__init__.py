"""Measures a few losses before a run, and says which eps and learning rate suit it."""

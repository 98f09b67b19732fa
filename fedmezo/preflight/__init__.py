"""Checks that a program makes before it takes part in a run, and the report about them."""

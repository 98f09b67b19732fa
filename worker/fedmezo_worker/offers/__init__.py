"""Runs that a coordinator offers: which of them a worker serves, and what it needs for that."""

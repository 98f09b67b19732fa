"""Limits on what callers cost: calls, connections, lines of the log."""

"""The coordinator's own weights, in a process of their own."""

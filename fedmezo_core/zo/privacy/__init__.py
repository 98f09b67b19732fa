"""Differential privacy for a worker's rows: it clips, samples, adds noise and keeps the account."""

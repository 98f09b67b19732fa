"""What every party of a run computes alike, whether it has torch or not: nothing imports torch."""

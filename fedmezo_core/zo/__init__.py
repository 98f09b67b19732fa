"""Zeroth-order numerics: the only folder of the core that imports torch, numba or transformers."""

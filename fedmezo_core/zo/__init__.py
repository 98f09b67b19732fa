"""Zeroth-order numerics: the only folder that imports torch, numba, triton or transformers."""

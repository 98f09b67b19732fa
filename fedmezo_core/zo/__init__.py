"""Zeroth-order numerics: noise, materialize, manifest, estimator. torch and numba live only below here."""

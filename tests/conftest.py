"""What must be set before anything is imported."""

from __future__ import annotations

import os

# Triton's interpreter runs the CUDA kernels without a GPU, and reads this once, when Triton is imported.
# `make test-gpu` says 0: it runs them on one.
os.environ.setdefault("TRITON_INTERPRET", "1")

"""The plain torch ways of doing what is measured, as existing systems do it.

- A direction is one `normal_` (or `random_`) per tensor from a generator seeded for the pair: MeZO,
  FedMeZO, FedKSeed and DeComFL all do so. The scratch tensor is kept between calls, which is kinder
  than they are.
- Replay adds one direction after the other.
- A measurement perturbs the weights in place by +eps, runs, by -2 eps, runs, and by +eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.noise import Distribution


class PlainTorch:
    """Directions added to `tensors` in place; tensors that have one size share their scratch."""

    def __init__(self, tensors: Sequence[torch.Tensor], distribution: Distribution) -> None:
        self._tensors = tensors
        self._distribution = distribution
        largest = max(tensor.numel() for tensor in tensors)
        # Touched at once: page faults are not what is measured.
        self._scratch = torch.zeros(largest, dtype=tensors[0].dtype, device=tensors[0].device)
        self._generator = torch.Generator(tensors[0].device)

    @torch.inference_mode()
    def add(self, seed: int, coefficient: float) -> None:
        """tensors += coefficient * z(seed)."""
        self._generator.manual_seed(seed >> 1)  # torch takes signed seeds
        for tensor in self._tensors:
            if self._distribution.rank and tensor.dim() == 2:
                self._add_product(tensor, coefficient)
                continue
            z = self._scratch[: tensor.numel()].view_as(tensor)
            if self._distribution is Distribution.GAUSSIAN:
                z.normal_(generator=self._generator)
            else:
                self._signs(z)
            tensor.add_(z, alpha=coefficient)

    def _add_product(self, tensor: torch.Tensor, coefficient: float) -> None:
        rank = self._distribution.rank
        rows, columns = (
            self._signs(torch.empty(length, rank, dtype=tensor.dtype, device=tensor.device))
            for length in tensor.shape
        )
        tensor.addmm_(rows, columns.t(), alpha=coefficient / rank**0.5)

    def _signs(self, z: torch.Tensor) -> torch.Tensor:
        return z.random_(0, 2, generator=self._generator).mul_(2).sub_(1)

    def replay(self, commits: Iterable[Commit], pairs: int) -> None:
        """The first `pairs` pairs of the journal, one at a time."""
        done = 0
        for commit in commits:
            for seed, coefficient in zip(commit.seeds, commit.coefficients, strict=True):
                if done == pairs:
                    return
                self.add(int(seed), float(coefficient))
                done += 1

    def measure(self, loss: Callable[[], float], seed: int, eps: float) -> float:
        """MeZO's two-sided projected gradient."""
        self.add(seed, eps)
        plus = loss()
        self.add(seed, -2.0 * eps)
        minus = loss()
        self.add(seed, eps)
        return (plus - minus) / (2.0 * eps)

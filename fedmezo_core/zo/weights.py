"""The trained weights of one party: which round they are at, and how they move to the next."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedmezo_core.errors import DivergedError
from fedmezo_core.zo.digest import weights_digest
from fedmezo_core.zo.manifest import Manifest, trained_tensors
from fedmezo_core.zo.materialize import Commit, Rounding, materialize
from fedmezo_core.zo.noise import Distribution


class Weights:
    """A model's trained tensors and the round whose commit was applied last.

    Invariant: the tensors hold the base with the commits of rounds 1 to `round`, in order, and
    nothing else ever writes to them.
    """

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        *,
        distribution: Distribution,
        rounding: Rounding,
        threads: int | None = None,
    ) -> None:
        """Take `model` at its base weights, that is at round 0.

        `threads` is how many apply and digest (default: as `materialize` chooses, and one for each
        core). Raises `MismatchError` if the model isn't the manifest's.
        """
        self.model = model
        self.manifest = manifest
        self.round = 0
        self._distribution = distribution
        self._rounding = rounding
        self._threads = threads
        self._damaged = False
        trained_tensors(model, manifest)

    def apply(self, first_round: int, commits: Sequence[Commit]) -> None:
        """Apply the commits of rounds `first_round`, `first_round` + 1, ... in place, in one pass.

        Many at once give the same bits as one at a time. Raises `DivergedError` if `first_round`
        isn't the round after `round`, and `NumericError` if a coefficient or a resulting weight is
        NaN or infinite; after the latter these weights are of no more use.
        """
        self._check()
        if first_round != self.round + 1:
            raise DivergedError(
                f"The commit of round {first_round} cannot be applied to weights at round "
                f"{self.round}; replay the journal from round {self.round + 1}."
            )
        tensors = trained_tensors(self.model, self.manifest)
        self._damaged = True
        for entry, tensor in zip(self.manifest, tensors, strict=True):
            materialize(
                tensor,
                tensor,
                commits,
                tensor_id=entry.tensor_id,
                distribution=self._distribution,
                rounding=self._rounding,
                columns=entry.columns,
                threads=self._threads,
                name=entry.name,
            )
        self._damaged = False
        self.round += len(commits)

    def digest(self) -> bytes:
        """Digest of the weights after `round` (see `weights_digest`), 32 bytes."""
        self._check()
        return weights_digest(self.model, self.manifest, threads=self._threads)

    def _check(self) -> None:
        if self._damaged:
            raise DivergedError(
                f"An error interrupted the commit of round {self.round + 1}, so these weights are no "
                "round's; start again from the base checkpoint."
            )

"""Fit a LoRA adapter to rows before it is trained: what stays frozen; what is trained is zero.

The rows of A are the principal components of a module's inputs, whitened: each is scaled so that
the inputs have unit size along it (as EVA initialises LoRA, Paischer et al. 2024). If A stays as it
is (`freeze_a`, LoRA-FA, Zhang et al. 2023), the inputs of the trained B are equal in size and
nearly uncorrelated. A step along random directions needs that, because it cannot adapt to the
curvature of each parameter as AdamW does. This uses no labels.

If B is P C (`lora.output_rank`), A and P are those directions of a module's inputs and outputs in
which the rows' gradients are largest (as LoRA-SB begins from one gradient, Ponkshe et al. 2024):
the main eigenvectors of the sums over rows of G^T G and of G G^T, with G the gradient of a row's
loss with respect to the module's weights. So the fit does not depend on the rows' order. A is
scaled to inputs of unit size over all tokens of the rows, P is orthonormal. This uses the rows'
labels. The classes' logits are first moved to equal means, because the gradients of a model that
always prefers one class have only one direction. If the responses are texts, A, P and with them the
modules are then weighted by their part of C's gradient (`_weights`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.program import long_step
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample
from fedmezo_core.zo.data.rows import Example, read_fit_rows
from fedmezo_core.zo.export import write_adapter
from fedmezo_core.zo.model.loading import SharedBases
from fedmezo_core.zo.model.model_card import ModelCard
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.party import Party, open_party

BATCH_ROWS = 32
GRADIENT_ROWS = 16
"""Rows of a pass backward, which needs more memory than a pass forward."""

_Seen = tuple[str, torch.Tensor, torch.Tensor]
"""A module's name, and one input and output of it."""


class _Use(NamedTuple):
    inputs: torch.Tensor
    """[rows, positions, inputs]."""
    gradients: torch.Tensor
    """[rows, positions, outputs]."""
    is_token: torch.Tensor
    """[rows, positions]: False for padding."""


class _Moments(NamedTuple):
    of_inputs: torch.Tensor
    of_outputs: torch.Tensor
    of_tokens: torch.Tensor


ROWS_MAX = 1000
"""Most rows that an adapter is fitted to, unless its user says more."""


def write_fitted_adapter(
    config: RunConfig,
    model: str,
    data: str | Path,
    folder: str | Path,
    *,
    rows_max: int = ROWS_MAX,
    threads: int | None = None,
    bases: SharedBases | None = None,
) -> int:
    """Fit the adapter of a run to rows, and write the folder that the run begins from.

    `model` is a hub name or folder, `data` as for a worker, `bases` as for `open_party`. Returns
    the count of rows. Raises as `open_party`, `read_fit_rows` and `fit_adapter` do.
    """
    if config.lora is None:
        raise ConfigError("The run has no adapter to fit; give it a [run.lora].")
    party = open_party(config, model, threads=threads, bases=bases)
    party.check_can_begin()
    rows = read_fit_rows(data, config)[:rows_max]
    fit_adapter(party, rows)
    facts = {"Round": f"0: fitted to {len(rows)} rows, for the run to begin from"}
    write_adapter(party.loaded, folder, ModelCard(config.model, config.run_id, facts))
    return len(rows)


def fit_adapter(party: Party, rows: Sequence[Example]) -> None:
    """Replace what is frozen of a LoRA run's adapter by fitted matrices, in place.

    Inputs count at the positions of each row that a loss depends on directly: the last one of the
    prompt (classification), or those of the response (instruction). Raises `ConfigError` for a run
    without an adapter, or with one on a module that does not see whole rows, `DataError` if there
    are fewer positions, or fewer directions of inputs or gradients, than the adapter's ranks.
    """
    lora = party.config.lora
    if lora is None:
        raise ConfigError("The run has no adapter to fit; give it a [run.lora].")
    dataset = party.task.encode(rows)
    if lora.output_rank is not None:
        # One order, so that the fit has the same bits for every order of the rows.
        by_tokens = sorted(dataset.examples, key=_content)
        dataset = replace(dataset, examples=tuple(by_tokens))
    layers = _layers(party.loaded.model)
    inputs, mean_scores = _seen_inputs(party, dataset, layers)
    if lora.output_rank is not None:
        gradients = _Gradients(party, dataset, layers, mean_scores)
        # Weights harm classes, whose loss curves most where it is steepest (decision 0064).
        is_weighted = party.config.task.kind != "classification"
        _fit_factors(gradients, lora.rank, lora.output_rank, is_weighted=is_weighted)
        return
    with long_step("choosing the adapter's directions", len(layers), "modules") as step:
        for name, layer in layers.items():
            [a] = layer.lora_A.values()
            with torch.inference_mode():
                a.weight.copy_(_whitening(inputs[name], lora.rank, name))
            step.advance()


def _fit_factors(gradients: _Gradients, rank: int, output_rank: int, *, is_weighted: bool) -> None:
    """Replace A and P of each module."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, own in _gradient_moments(gradients).items():
        directions = _main_directions(own.of_inputs, rank, name).T
        factors[name] = (
            _scaled(directions, own.of_tokens),
            _main_directions(own.of_outputs, output_rank, name).double(),
        )
    if is_weighted:
        for name, (of_inputs, of_outputs) in _weights(_core_energies(gradients, factors)).items():
            a, p = factors[name]
            factors[name] = a * of_inputs[:, None], p * of_outputs
    for name, layer in gradients.layers.items():
        [own_a], [own_b] = layer.lora_A.values(), layer.lora_B.values()
        a, p = factors[name]
        with torch.inference_mode():
            own_a.weight.copy_(a.float())
            own_b.outputs.weight.copy_(p.float())


@torch.inference_mode()
def _seen_inputs(
    party: Party, dataset: Dataset, layers: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What each module sees, [positions, inputs], and the mean of the rows' scores."""
    model: Any = party.loaded.model
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    scores = []
    with long_step("fitting the adapter", len(dataset), "rows") as step:
        for first in range(0, len(dataset), BATCH_ROWS):
            examples = dataset.examples[first : first + BATCH_ROWS]
            batch = party.task.collate(examples, "fitting", execution_device(model))
            ends = max(1, batch.targets.shape[1])
            counts = (
                batch.targets != -100
                if batch.targets.shape[1]
                else torch.ones_like(batch.input_ids[:, :1], dtype=torch.bool)
            )
            handles = [
                layer.register_forward_pre_hook(_collector(name, seen[name], ends, counts))
                for name, layer in layers.items()
            ]
            try:
                scores.append(party.task.scores(model, batch))
            finally:
                for handle in handles:
                    handle.remove()
            for name, parts in seen.items():
                if not parts:
                    raise _unfit(name)
            step.advance(len(examples))
    return {name: torch.cat(parts) for name, parts in seen.items()}, torch.cat(scores).mean(dim=0)


class _Gradients:
    """Gradients of rows with respect to modules' outputs, a batch at a time."""

    def __init__(
        self,
        party: Party,
        dataset: Dataset,
        layers: Mapping[str, Any],
        mean_scores: torch.Tensor,
    ) -> None:
        self.layers = layers
        self._party = party
        self._dataset = dataset
        self._mean_scores = mean_scores

    def each(self, what: str) -> Iterator[tuple[str, _Use]]:
        """Each module's name with each batch: inputs, gradients of its outputs, and padding."""
        party, layers = self._party, self.layers
        model: Any = party.loaded.model
        with long_step(what, len(self._dataset), "rows") as step:
            for first in range(0, len(self._dataset), GRADIENT_ROWS):
                examples = self._dataset.examples[first : first + GRADIENT_ROWS]
                batch = party.task.collate(examples, "fitting", execution_device(model))
                seen: list[_Seen] = []
                handles = [
                    layer.register_forward_hook(_watcher(seen, name))
                    for name, layer in layers.items()
                ]
                try:
                    with torch.enable_grad():
                        loss = party.task.loss_of_scores(
                            party.task.scores(model, batch), batch, self._mean_scores
                        )
                finally:
                    for handle in handles:
                        handle.remove()
                grads = torch.autograd.grad(loss, [output for _, _, output in seen])
                for name in layers:
                    # A module may be used several times in a pass.
                    own = [index for index, use in enumerate(seen) if use[0] == name]
                    masks = [batch.attention_mask[:, -seen[index][1].shape[1] :] for index in own]
                    yield (
                        name,
                        _Use(
                            torch.cat([seen[index][1] for index in own], dim=1).double(),
                            torch.cat([grads[index] for index in own], dim=1).double(),
                            torch.cat(masks, dim=1).bool(),
                        ),
                    )
                step.advance(len(examples))


def _gradient_moments(gradients: _Gradients) -> dict[str, _Moments]:
    """Three moments of each module.

    They are the sums over rows of G^T G [inputs, inputs] and of G G^T [outputs, outputs], with G
    the gradient of a row's loss, and the mean over tokens of x x^T [inputs, inputs].
    """
    sums: dict[str, tuple[Any, Any, Any, int]] = dict.fromkeys(gradients.layers, (0.0, 0.0, 0.0, 0))
    for name, (x, d, is_token) in gradients.each("taking gradients for the adapter"):
        tokens = x[is_token]
        of_inputs, of_outputs, of_tokens, count = sums[name]
        # A row's gradient is d^T x, which may be larger than the products of positions.
        sums[name] = (
            of_inputs + _flat(x).T @ _flat((d @ d.mT) @ x),
            of_outputs + _flat(d).T @ _flat((x @ x.mT) @ d),
            of_tokens + tokens.T @ tokens,
            count + len(tokens),
        )
    return {
        name: _Moments(of_inputs, of_outputs, of_tokens / count)
        for name, (of_inputs, of_outputs, of_tokens, count) in sums.items()
    }


def _core_energies(
    gradients: _Gradients, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Sums over rows of the squared gradient of each module's C, [output_rank, rank]."""
    sums: dict[str, Any] = dict.fromkeys(gradients.layers, 0.0)
    for name, (x, d, _) in gradients.each("weighting the adapter's directions"):
        a, p = factors[name]
        sums[name] = sums[name] + ((d @ p).mT @ (x @ a.T)).square().sum(dim=0)
    return sums


def _weights(
    energies: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights of each module's rows of A [rank] and columns of P [output_rank].

    Random directions spend their noise on all parameters alike. So a parameter with a larger
    gradient gets more of it: the fourth root of the gradient's mean square, as the product of a
    module's, an input's and an output's part. Over all parameters their mean square is 1.
    """
    found = {
        name: (_part(energy.mean(dim=0), energy.mean()), _part(energy.mean(dim=1), energy.mean()))
        for name, energy in energies.items()
    }
    squares = [float(i.square().mean() * o.square().mean()) for i, o in found.values()]
    whole = (sum(squares) / len(squares)) ** 0.5
    return {name: (i / whole, o) for name, (i, o) in found.items()}


def _part(energies: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    # What these rows do not move may still be trained.
    return (energies.clamp_min(1e-6 * float(mean)) / mean.sqrt()) ** 0.25


def _flat(rows: torch.Tensor) -> torch.Tensor:
    """[rows, positions, width] as [rows * positions, width]."""
    return rows.flatten(0, 1)


def _content(example: EncodedExample) -> tuple[Any, ...]:
    """What orders rows, the short ones first."""
    return example.token_count, example.prompt, example.response, example.label


def _layers(model: Any) -> dict[str, Any]:
    """The modules that have an adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and layer.lora_A
    }


def _watcher(into: list[_Seen], name: str) -> Any:
    """A hook that makes a module's output one that gradients are taken with respect to."""

    def watch(
        _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        watched = output if output.requires_grad else output.detach().clone().requires_grad_()
        into.append((name, inputs[0].detach(), watched))
        return watched

    return watch


def _main_directions(moments: torch.Tensor, rank: int, name: str) -> torch.Tensor:
    """The `rank` main eigenvectors of `moments` [width, width]: [width, rank], orthonormal."""
    sizes, directions = torch.linalg.eigh(moments.double())
    if len(sizes) < rank or not bool(sizes[-rank] > 1e-12 * sizes[-1]):
        raise DataError(
            f"The rows' gradients at {name} lie in fewer than {rank} directions; give more "
            "different rows, or smaller ranks."
        )
    main: torch.Tensor = directions[:, -rank:].flip(1).float()
    return main


def _scaled(directions: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The rows of `directions`, each over the root mean square of the inputs along it."""
    rows = directions.double()
    sizes = ((rows @ moments) * rows).sum(dim=1, keepdim=True).sqrt()
    # A direction that the inputs never take must not become infinitely long.
    return rows / sizes.clamp_min(1e-6 * float(sizes.max()))


def _collector(name: str, into: list[torch.Tensor], ends: int, counts: torch.Tensor) -> Any:
    def collect(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].ndim != 3 or len(inputs[0]) != len(counts):
            raise _unfit(name)
        into.append(inputs[0][:, -ends:][counts].float())

    return collect


def _unfit(name: str) -> ConfigError:
    return ConfigError(
        f"{name} does not see every token of each row, as routers and experts don't, so its "
        "adapter can't be fitted; leave it out of lora.target_modules, or begin without fitting."
    )


def _whitening(inputs: torch.Tensor, rank: int, name: str) -> torch.Tensor:
    """The main right singular vectors over the root mean square along them: [rank, inputs]."""
    count, width = inputs.shape
    if count < rank or width < rank:
        raise DataError(
            f"{count} positions of {width} inputs at {name} can't fit an adapter of rank {rank}; "
            "give more rows, or a smaller rank."
        )
    _, sizes, directions = torch.linalg.svd(inputs.double(), full_matrices=False)
    sizes = sizes[:rank, None] / count**0.5
    if not bool((sizes > 1e-6 * sizes[0]).all()):
        raise DataError(
            f"What {name} sees varies in fewer than {rank} directions; give more different rows, "
            "or a smaller rank."
        )
    fitted: torch.Tensor = (directions[:rank] / sizes).float()
    return fitted

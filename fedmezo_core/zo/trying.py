"""A finished model in use: an exported folder, what it answers, and how well."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, DataError, ModelError
from fedmezo_core.program import long_step
from fedmezo_core.zo.data.held_out import Evaluation, evaluate
from fedmezo_core.zo.data.rows import Example, read_rows
from fedmezo_core.zo.data.task import Task
from fedmezo_core.zo.model.adapter_layout import CONFIG_FILE
from fedmezo_core.zo.model.loading import LoadedModel, folder_of_hub_name, load_model, quiet
from fedmezo_core.zo.model.offload import execution_device
from fedmezo_core.zo.model.placement import Placement
from fedmezo_core.zo.model.run_file import RUN_FILE, RunFile, read_run_file
from fedmezo_core.zo.party import positions_of


@dataclass(frozen=True)
class FinishedModel:
    """A model that a run has made, or its base, and the run's way of writing rows."""

    loaded: LoadedModel
    task: Task
    run: RunFile | None
    """What the folder remembers of its run; None for a folder that no export wrote."""

    def evaluate(self, data: Path, batch_size: int) -> Evaluation:
        """Loss and accuracy on the rows of `data`, computed as the run's coordinator does.

        Raises as `read_rows`, `Task.encode` and `held_out.evaluate` do.
        """
        rows = read_rows(data, self.task.config)
        with long_step(f"turning the rows of {data} into tokens"):
            dataset = self.task.encode(rows)
        return evaluate(self.task, self.loaded.model, dataset, batch_size)

    def likelihoods(self, row: Example) -> dict[str, float]:
        """What a classification answers to a row: the probability of each class."""
        [example] = self.task.encode([row]).examples
        device = execution_device(self.loaded.model)
        batch = self.task.collate([example], row.location, device)
        logits = self.task.outcome(self.loaded.model, batch).class_logits[0].astype(np.float64)
        if not np.isfinite(logits).all():
            raise ModelError("The model computes NaN or infinity; export an earlier round.")
        powers = np.exp(logits - logits.max())
        labels = self.task.config.verbalizers
        return dict(zip(labels, map(float, powers / powers.sum()), strict=True))

    def generated(self, row: Example, tokens_max: int) -> str:
        """The text that the model writes after a row's prompt: the likeliest token each time."""
        [example] = self.task.encode([row]).examples
        return self._continued(example.prompt, tokens_max)

    def continued(self, text: str, tokens_max: int) -> str:
        """The text that the model writes after `text`, which no template changes."""
        tokenizer: Any = self.loaded.tokenizer
        tokens = tokenizer(text).input_ids
        if not tokens:
            raise DataError("The text is empty; give the words that the model should go on from.")
        return self._continued(tokens, tokens_max)

    def _continued(self, tokens: Sequence[int], tokens_max: int) -> str:
        model: Any = self.loaded.model
        tokenizer: Any = self.loaded.tokenizer
        positions = positions_of(model)
        if positions is not None:
            tokens_max = min(tokens_max, positions - len(tokens))
        if tokens_max < 1:
            raise DataError(
                f"The text has {len(tokens)} tokens, and the model knows {positions} positions, so "
                "there is no place for an answer; shorten the text."
            )
        ids = torch.tensor([list(tokens)], device=execution_device(model))
        with quiet(), torch.inference_mode(), long_step("generating"):
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens_max,
                do_sample=False,
                num_beams=1,
                # None where they mean nothing, or greedy search would warn of them.
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.eos_token_id or 0,
            )[0, ids.shape[1] :]
        return str(
            tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def open_finished(
    folder: Path,
    *,
    base: str = "",
    contract: RunConfig | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> FinishedModel:
    """Load an exported model, or an exported adapter on its base.

    base: hub name or folder of an adapter's base; the contract's name for it by default. contract:
    what says how rows are written, if the folder has no run file or another contract should.
    device: as in `Placement`. Raises `ModelError` for a folder that holds no model, and
    `ConfigError` for one that does not say how rows are written, or a device that is not there.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}; name one that fedmezo export wrote.")
    run = read_run_file(folder)
    contract = contract or (None if run is None else run.contract)
    if contract is None:
        raise ConfigError(
            f"{folder} has no {RUN_FILE}, so nothing says how its rows are written; name a folder "
            "that fedmezo export wrote, or the coordinator's file with --config."
        )
    lora = None
    if (folder / CONFIG_FILE).is_file():
        if contract.lora is None:
            raise ConfigError(f"{folder} holds an adapter, and run {contract.run_id} trains none.")
        # In an export, B is one matrix.
        lora = contract.lora.model_copy(update={"output_rank": None})
    elif base:
        raise ConfigError(
            f"--model is for an exported adapter, and {folder} is none; leave it out."
        )
    placement = Placement(device)
    placement.torch_device()
    if threads is not None:
        torch.set_num_threads(threads)
    name = str(folder) if lora is None else base or str(folder_of_hub_name(contract.model))
    with long_step(f"loading {folder}"):
        loaded = load_model(
            name,
            dtype=contract.dtype,
            lora=lora,
            adapter=None if lora is None else folder,
            placement=placement,
        )
    embeddings: Any = loaded.model.get_input_embeddings()  # type: ignore[operator]
    task = Task(contract.task, loaded.tokenizer, int(embeddings.weight.shape[0]))
    return FinishedModel(loaded, task, run)


def row_of(task: TaskConfig, text: str) -> Example:
    """A row whose prompt is made of `text`: the value of the template's column.

    For a template of several columns `text` is a JSON object with a string for each. Raises
    `ConfigError` if it is none.
    """
    columns = task.columns()
    values: Any = {columns[0]: text}
    if len(columns) > 1:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not all(
            isinstance(values.get(column), str) for column in columns
        ):
            raise ConfigError(
                f"The run's template has the columns {', '.join(columns)}; give a JSON object with "
                "a string for each, or --raw for a text that no template changes."
            )
    # The answer is what the model should say; a row must have one.
    answer = next(iter(task.verbalizers), "-")
    given = {column: values[column] for column in columns}
    return Example({task.answer_column: answer} | given, "the command line", 1)

"""A Hugging Face `Trainer` whose training is a worker's part in a federated run.

    python examples/huggingface_trainer.py MODEL_FOLDER ROWS.jsonl ROWS.jsonl ...

`FedMezoTrainer` takes `TrainingArguments` and a `datasets.Dataset`, or anything else that iterates
over rows as dicts. A step is a round of the run. `logging_steps`, `eval_steps`, `save_steps`,
`report_to` and callbacks do what they do in any `Trainer`; `resume_from_checkpoint` takes a file
that a save wrote. What all parties must agree on is the run's contract, which `contract_of` makes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType, TrainOutput

import fedmezo
from fedmezo import Coordinator, Measure, Measured, Session, TorchEngine

Rows = Iterable[Mapping[str, Any]]


def contract_of(args: TrainingArguments, **values: Any) -> dict[str, Any]:
    """The contract of a run with the steps, batch, seed and schedule of `args`, and `values`.

    `learning_rate` is not among them: one that suits gradients does not suit directions. Without
    one in `values`, the run takes the rate that its model and length call for.
    """
    if args.max_steps < 1:
        raise ValueError("A run has a number of rounds; set max_steps in TrainingArguments.")
    return {
        "rounds": args.max_steps,
        "batch_size": args.per_device_train_batch_size,
        "seed": args.seed,
        "schedule": SchedulerType(args.lr_scheduler_type).value,
    } | values


class LossKeepingEngine(TorchEngine):
    """A torch engine that remembers its losses, which stay with this worker."""

    losses: list[float]

    def measure(self, order: Measure) -> Measured:
        """Measure, and remember the mean loss."""
        measured = super().measure(order)
        self.losses.append(measured.scalars.mean_loss or 0.0)
        return measured


class FedMezoTrainer(Trainer):
    """Trains by taking part in a run as one of its workers."""

    def __init__(
        self,
        model: str,
        args: TrainingArguments,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        *,
        genesis: fedmezo.Genesis | bytes,
        worker: str,
        exchange: Callable[[bytes], bytes],
        **more: Any,
    ) -> None:
        """`exchange` carries bytes to `Coordinator.exchange` and returns what that returned.

        It may return nothing if something was lost. `more` goes to `Trainer`.
        """
        self.engine = LossKeepingEngine(
            genesis,
            worker,
            model,
            train_dataset,
            heldout=eval_dataset,
            device="cpu" if args.use_cpu else "auto",
        )
        self.engine.losses = []
        self.session = Session(genesis, worker, self.engine)
        self._exchange = exchange
        super().__init__(
            self.engine.model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.engine.tokenizer,
            **more,
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *_: Any, **__: Any
    ) -> TrainOutput:
        """Take part in the run until it is finished, or until a callback stops the training."""
        if resume_from_checkpoint is True:
            raise ValueError("Name the file to go on from in resume_from_checkpoint.")
        if resume_from_checkpoint:
            self.session.restore(Path(resume_from_checkpoint))
        rounds = self.session.config.rounds
        self.state.max_steps, self.state.global_step = rounds, self.session.round
        self.state.compute_steps(self.args, rounds)  # type: ignore[no-untyped-call]
        handler, given = self.callback_handler, (self.args, self.state)
        self.control = handler.on_train_begin(*given, self.control)
        down = b""
        while not self.session.finished and not self.control.should_training_stop:
            up = self.session.exchange(down)
            if self.session.round > self.state.global_step:
                self._end_round()
            down = self._exchange(up)
            if self.session.idle:
                time.sleep(0.05)
        self.control = handler.on_train_end(*given, self.control)
        losses = self.engine.losses
        return TrainOutput(self.session.round, sum(losses) / max(len(losses), 1), {})

    def _end_round(self) -> None:
        handler, given = self.callback_handler, (self.args, self.state)
        self.state.global_step = self.session.round
        self.control = handler.on_step_end(*given, self.control)
        if self.control.should_log:
            losses = self.engine.losses[-self.state.logging_steps :]
            self.log({"loss": sum(losses) / max(len(losses), 1), "round": self.session.round})
            self.control.should_log = False
        if self.control.should_evaluate:
            self.evaluate()
            self.control.should_evaluate = False
        if self.control.should_save:
            self.session.save(Path(self.args.output_dir or "."))
            self.control = handler.on_save(*given, self.control)

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and accuracy on `eval_dataset` with the weights as they are."""
        found = self.engine.evaluate()
        names = {"loss": found.loss, "accuracy": found.accuracy}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in names.items()}
        self.log(metrics)
        return metrics

    def _move_model_to_device(self, model: Any, device: Any) -> Any:
        return model  # The engine has placed it.


def main(model: str, *files: str) -> None:
    """Train with one trainer for each file of rows, which share a coordinator in this process."""
    datasets = [
        [json.loads(line) for line in Path(file).read_text().splitlines()] for file in files
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            TrainingArguments(
                output_dir=f"{folder}/w{k}",
                max_steps=4,
                per_device_train_batch_size=4,
                logging_steps=2,
                eval_strategy="steps",
                eval_steps=4,
                save_steps=2,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            )
            for k in range(len(files))
        ]
        task = {
            "template": "{text} It was",
            "verbalizers": {"negative": " terrible", "positive": " great"},
            "tokens_max": 64,
        }
        contract = contract_of(arguments[0], run_id="trainer", model=model, task=task)
        contract |= {"workers_min": len(files), "quorum": len(files)}
        genesis = fedmezo.begin_run(contract, model)
        coordinator, one_at_a_time = Coordinator(genesis), threading.Lock()

        def exchange(up: bytes) -> bytes:
            with one_at_a_time:
                coordinator.tick(int(time.monotonic() * 1000))
                return coordinator.exchange(up)

        trainers = [
            FedMezoTrainer(
                model, args, rows, rows[:8], genesis=genesis, worker=f"w{k}", exchange=exchange
            )
            for k, (args, rows) in enumerate(zip(arguments, datasets, strict=True))
        ]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trainers[0].save_model(f"{folder}/final")
        saved = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*.safetensors"))
        digests = {digest.hex() for digest in coordinator.digests.values()}
        print(f"round {coordinator.round}, {len(coordinator.digests)} workers, saved {saved}")
        print(f"{len(digests)} digest: {digests}")


if __name__ == "__main__":
    main(*sys.argv[1:])

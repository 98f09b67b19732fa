"""Objectives: what they are given at each point, what they may return, and where they come from."""

from __future__ import annotations

import copy
import logging
import math
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedmezo.run_policy import READY_MADE
from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.errors import ConfigError, MeasurementError
from fedmezo_core.events import Work
from fedmezo_core.zo import estimator as estimator_module
from fedmezo_core.zo import objectives
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.data.task import Batch, Task
from fedmezo_core.zo.estimator import Estimator
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.noise import Distribution, Operands, Rounding
from fedmezo_core.zo.objectives import SCORE_ABS_MAX, Objective, Predictions, load_objective
from fedmezo_core.zo.plain.measurements import Pair, local_steps
from fedmezo_core.zo.weights import Weights
from tests.core.zo.conftest import SENTENCES
from tests.core.zo.forward.frozen_parts import last_layer
from tests.integration.support.parties import TEXTS
from tests.integration.support.scoring import write_package

EPS = 3e-2
LOCAL: list[Pair] = [(11, 0.02), (12, -0.03)]
ROOT = Path(__file__).parents[3]
NAME = "fedmezo_core.zo.objectives:error_rate"
PREDICTIONS = Predictions(
    rows=[{}] * 4,
    wanted=["a", "a", "a", "b"],
    classes=["a", "b", "c"],
    logits=np.zeros((4, 3), dtype=np.float32),
    predicted=["a", "a", "b", "c"],
    log_likelihoods=np.zeros(4),
    texts=[" a\n", "A", "a b", "b"],
)


def _task(
    tokenizer: PreTrainedTokenizerBase, kind: str, generated_tokens_max: int
) -> tuple[Task, Batch]:
    config = TaskConfig(
        kind="classification" if kind == "classification" else "instruction",
        template="{text} All in all, it was",
        verbalizers={"bad": " terrible", "good": " great"},
        tokens_max=64,
        objective=NAME,
        generated_tokens_max=generated_tokens_max,
    )
    task = Task(config, tokenizer, 384)
    rows = [
        Example(
            {"text": text[: 20 + 9 * i], "label": ("bad", "good")[i % 2], "response": text[9 * i :]}
            | {"source": f"page {i}"},
            "data.jsonl",
            i + 1,
        )
        for i, text in enumerate(SENTENCES)
    ]
    return task, task.collate(task.encode(rows).examples, "the test")


def _predictions(
    model: nn.Module,
    task: Task,
    batch: Batch,
    seeds: Sequence[int] = (99,),
    train: Sequence[str] = (),
    eps: float = EPS,
) -> list[Predictions]:
    """What the objective is given at each point of one measurement."""
    seen: list[Predictions] = []

    def objective(predictions: Predictions) -> float:
        seen.append(predictions)
        return float(len(seen))

    estimator = Estimator(
        model,
        manifest_of(model, train=train),
        task,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        threads=1,
        objective=objective,
    )
    measured = estimator.measure(batch, LOCAL, seeds, eps)
    assert [m.loss_plus for m in measured] == [1.0 + 2 * k for k in range(len(seeds))]
    assert measured[0].projected_grad == np.float32(-1 / (2 * eps))
    return seen


def _moved(
    model: nn.Module, pairs: Sequence[Pair], rounding_seed: int, train: Sequence[str] = ()
) -> nn.Module:
    """A copy whose weights really are the base plus `pairs`."""
    moved, manifest = copy.deepcopy(model), manifest_of(model, train=train)
    commit = Commit(
        np.array([seed for seed, _ in pairs], dtype=np.uint64),
        np.array([coefficient for _, coefficient in pairs], dtype=np.float32),
        rounding_seed,
    )
    for entry, tensor in zip(manifest, trained_tensors(moved, manifest), strict=True):
        operands = Operands(entry.tensor_id, Distribution.RADEMACHER, Rounding.STOCHASTIC)
        materialize(tensor, tensor, [commit], operands)
    return moved


def _written(model: Any, prompt: Sequence[int], count: int, end: int) -> list[int]:
    """What a model writes greedily, a row at a time and without padding."""
    tokens: list[int] = list(prompt)
    with torch.inference_mode():
        while len(tokens) < len(prompt) + count:
            likeliest = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            if likeliest == end:
                break
            tokens.append(likeliest)
    return tokens[len(prompt) :]


# ---------------------------------------------------------------------- what it is given


@pytest.mark.slow
@pytest.mark.parametrize("task_kind", ["classification", "instruction"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "gemma3", "mixtral", "opt"])
def test_predictions_and_texts_are_those_of_really_perturbed_weights(
    kind: str,
    task_kind: str,
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = model_of(kind)
    task, batch = _task(tokenizer, task_kind, 6)
    seen = _predictions(model, task, batch)
    assert len(seen) == 2
    for predictions, step in zip(seen, (EPS, -EPS), strict=True):
        moved = _moved(model, [*LOCAL, (99, step)], 99)
        texts = [
            tokenizer.decode(_written(moved, example.prompt, 6, 0)) for example in batch.examples
        ]
        assert predictions.texts == texts
        if task_kind == "classification":
            loss = functional.cross_entropy(
                torch.from_numpy(predictions.logits), batch.labels
            ).item()
            assert loss == pytest.approx(-predictions.log_likelihoods.mean(), rel=1e-5)
            count = len(batch.labels)
        else:
            count = int((batch.targets != -100).sum())
        assert -predictions.log_likelihoods.sum() / count == pytest.approx(
            task.loss(moved, batch), rel=2e-5
        )
    assert seen[0].texts != seen[1].texts, "the perturbation shows"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba"])
def test_texts_of_points_that_go_apart_are_their_own_where_most_is_frozen(
    kind: str, model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model, train, eps = model_of(kind), [last_layer(kind)], 0.5
    task, batch = _task(tokenizer, "instruction", 6)
    seen = _predictions(model, task, batch, (99, 100), train, eps)
    points = [(seed, step) for seed in (99, 100) for step in (eps, -eps)]
    for predictions, point in zip(seen, points, strict=True):
        moved = _moved(model, [*LOCAL, point], 99, train)
        assert predictions.texts == [
            tokenizer.decode(_written(moved, example.prompt, 6, 0)) for example in batch.examples
        ]
    assert len({tuple(predictions.texts) for predictions in seen}) == 4


def test_rows_labels_and_classes_are_as_in_the_data(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    task, batch = _task(tokenizer, "classification", 0)
    seen = _predictions(model_of("gpt2"), task, batch)[0]
    assert [row["source"] for row in seen.rows] == [f"page {i}" for i in range(4)]
    assert seen.wanted == ["bad", "good"] * 2
    assert seen.classes == ["bad", "good"]
    assert seen.logits.shape == (4, 2)
    assert seen.logits.dtype == np.float32
    assert seen.predicted == [seen.classes[k] for k in seen.logits.argmax(axis=1)]
    assert seen.texts == []
    task, batch = _task(tokenizer, "instruction", 0)
    seen = _predictions(model_of("gpt2"), task, batch)[0]
    assert seen.wanted == [text[9 * i :] for i, text in enumerate(SENTENCES)]
    assert (seen.classes, seen.predicted, seen.logits.shape) == ([], [], (4, 0))


def test_many_points_and_one_at_a_time_give_the_same_texts(
    model_of: Callable[[str], nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, batch = _task(tokenizer, "classification", 4)
    together = _predictions(model_of("llama"), task, batch, (99, 100, 101))
    monkeypatch.setattr(estimator_module, "POINTS_MAX", 1)
    alone = _predictions(model_of("llama"), task, batch, (99, 100, 101))
    assert [p.texts for p in together] == [p.texts for p in alone]
    assert [p.predicted for p in together] == [p.predicted for p in alone]


def test_a_text_ends_before_the_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    task, batch = _task(tokenizer, "instruction", 5)
    words = tokenizer(" great", add_special_tokens=False)["input_ids"]
    passes: list[Batch] = []

    def next_tokens(rows: Batch) -> torch.Tensor:
        """The first row ends after one token, the second at once, the others after two."""
        passes.append(rows)
        script = [[words[0], 0, 0], [0, 5, 5], [words[0], words[0], 0], [words[0], words[0], 0]]
        return torch.tensor([row[len(passes) - 1] for row in script])

    word = tokenizer.decode(words[:1])
    assert task.generated(batch, 5, next_tokens) == [word, "", word * 2, word * 2]
    assert len(passes) == 3, "nobody waits for rows that have ended"
    first, last = passes[0], passes[-1]
    assert last.input_ids.shape[1] == first.input_ids.shape[1] + 2
    assert last.attention_mask[:, -2:].min() == 1
    assert torch.equal(last.position_ids[2:, -1], first.position_ids[2:, -1] + 2)
    prompt = batch.examples[2].prompt
    assert [row.prompt[: len(prompt)] for row in last.examples[:3]] == [prompt] * 3, (
        "a row that has ended is not computed again"
    )


def test_the_largest_scores_are_clipped(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    task, batch = _task(tokenizer, "classification", 0)
    model, scores = model_of("gpt2"), iter([SCORE_ABS_MAX, -SCORE_ABS_MAX])
    estimator = Estimator(
        model,
        manifest_of(model),
        task,
        distribution=Distribution.RADEMACHER,
        rounding=Rounding.STOCHASTIC,
        objective=lambda _: next(scores),
    )
    [measured] = local_steps(
        estimator,
        lambda _: batch,
        Work((99,), learning_rate=1e-6, eps=1e-3, want_digest=False),
        RunConfig(run_id="clip", model="none", task=task.config),
    )
    assert measured.projected_grad == 1e4
    assert measured.loss == 0.0


def test_a_diverged_model_is_not_scored(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = model_of("gpt2")
    model.transformer.wte.weight.mul_(1e38)
    for generated in (0, 2):
        task, batch = _task(tokenizer, "classification", generated)
        with pytest.raises(MeasurementError, match="computes NaN or infinity on the batch of the"):
            _predictions(model, task, batch)


# ---------------------------------------------------------------------- what it may return


@pytest.mark.parametrize(
    "value",
    [
        0.25,
        Fraction(1, 4),
        np.float32(0.25),
        np.float64(0.25),
        np.array([[0.25]]),
        torch.tensor(0.25),
        torch.tensor([0.25], dtype=torch.bfloat16),
    ],
)
def test_one_number_of_any_kind_is_a_score(value: Any) -> None:
    assert Objective("m:f", lambda _: value)(PREDICTIONS) == 0.25
    assert Objective("m:f", lambda _: 3)(PREDICTIONS) == 3.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        ("private text", "a value of type str"),
        (1j, "a value of type complex"),
        (True, "a value of type bool"),
        (np.bool_(True), "a value of type bool"),
        (torch.tensor(True), "a value of type bool"),
        (Decimal(1), "a value of type Decimal"),
        ([0.5], "a value of type list"),
        (np.array(["private text"]), "a value of type str"),
        (torch.zeros(3), "3 numbers"),
        (np.zeros((0, 2)), "0 numbers"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (torch.tensor(math.nan), "nan"),
        (1e39, "a number beyond binary32"),
    ],
)
def test_anything_else_is_named(value: Any, words: str) -> None:
    with pytest.raises(MeasurementError) as caught:
        Objective("m:f", lambda _: value)(PREDICTIONS)
    assert str(caught.value) == f"Objective m:f returned {words}; it must return one finite number."


@pytest.mark.parametrize("error", [ValueError("patient 17\nis ill"), SystemExit(3), KeyError(17)])
def test_an_exceptions_message_stays_on_this_machine(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def function(_: Predictions) -> float:
        raise error

    with caplog.at_level(logging.WARNING), pytest.raises(MeasurementError) as caught:
        Objective("m:f", function)(PREDICTIONS)
    kind = type(error).__name__
    assert str(caught.value) == f"Objective m:f raised {kind}; this worker's log says where."
    (record,) = caplog.records
    assert f"objective m:f: {kind} at {__file__}:" in record.getMessage()
    assert record.getMessage().endswith(": " + " ".join(str(error).split()))


def test_an_exception_that_cannot_even_be_printed() -> None:
    class WorseError(Exception):
        def __str__(self) -> str:
            raise ValueError

    def function(_: Predictions) -> float:
        raise WorseError

    with pytest.raises(MeasurementError, match="raised WorseError; this worker's log"):
        Objective("m:f", function)(PREDICTIONS)


def test_an_int_that_no_float_holds_is_an_error_like_others() -> None:
    with pytest.raises(MeasurementError, match="raised OverflowError"):
        Objective("m:f", lambda _: 10**400)(PREDICTIONS)


def test_what_the_ready_made_ones_return() -> None:
    assert objectives.error_rate(PREDICTIONS) == 0.5
    # a: 2 right of 3 wanted, 2 predicted; b and c: none.
    assert objectives.one_minus_macro_f1(PREDICTIONS) == pytest.approx(1 - (4 / 5) / 3)
    assert objectives.one_minus_exact_match(PREDICTIONS) == 0.5
    # "A" against "a" counts as the same word; "a b" shares one word of three.
    assert objectives.one_minus_token_f1(PREDICTIONS) == pytest.approx(1 - (3 + 2 / 3) / 4)


@pytest.mark.parametrize(
    ("text", "wanted", "f1"),
    [
        ("In 1894.", "1894", 2 / 3),
        (" the the cat", "The cat", 4 / 5),
        ("", "cat", 0.0),
        ("?", "", 1.0),
    ],
)
def test_two_texts_share_words(text: str, wanted: str, f1: float) -> None:
    assert objectives.token_f1(text, wanted) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (objectives.error_rate, "kind = classification"),
        (objectives.one_minus_macro_f1, "kind = classification"),
        (objectives.one_minus_exact_match, "generated_tokens_max above 0"),
        (objectives.one_minus_token_f1, "generated_tokens_max above 0"),
    ],
)
def test_what_the_ready_made_ones_need(function: Callable[..., float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        function(replace(PREDICTIONS, predicted=[], texts=[]))


# ---------------------------------------------------------------------- where it comes from


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, which leaves no trace in the interpreter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name, text in {
        "here": "SEVEN = 7\ndef seven(predictions):\n    return SEVEN\n",
        "broken": "import scores_of_nobody\n",
        "exit": "raise SystemExit(3)\n",
        "syntax": "def f(:\n",
    }.items():
        (tmp_path / f"scores_{name}.py").write_text(text)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("scores_")]:
        del sys.modules[name]


def test_a_module_in_the_current_directory(folder: Path) -> None:
    objective = load_objective("scores_here:seven")
    assert objective.name == "scores_here:seven"
    assert objective(PREDICTIONS) == 7.0
    assert load_objective(NAME)(PREDICTIONS) == 0.5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scores_nowhere:f", "scores_nowhere cannot be imported (ModuleNotFoundError"),
        ("a..b:f", "a..b cannot be imported"),
        ("scores_broken:f", "(ModuleNotFoundError at "),
        ("scores_exit:f", "scores_exit cannot be imported (SystemExit"),
        ("scores_syntax:f", "scores_syntax cannot be imported (SyntaxError"),
        ("scores_here:six", "has no six; check the name"),
        ("scores_here:SEVEN", "SEVEN is a int, not a function"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_loaded_is_one_sentence(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_objective(name)
    assert f"Objective {name}: " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- training by it alone


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a package that does nothing but register objectives."""

    def install(package: str, **entries: str) -> None:
        write_package(tmp_path / package, package, entries)
        monkeypatch.syspath_prepend(tmp_path / package)

    return install


def test_the_ready_made_ones_have_names(registered: Callable[..., None]) -> None:
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ready_made = names[objectives.ENTRY_POINTS]
    registered("fedmezo", **ready_made)
    assert sorted(ready_made) == sorted(READY_MADE)
    assert [load_objective(name).name for name in READY_MADE] == list(READY_MADE)
    assert load_objective("error-rate")(PREDICTIONS) == 0.5
    for name in READY_MADE:
        TaskConfig(objective=name, verbalizers={"a": "a", "b": "b"})


@pytest.mark.usefixtures("folder")
def test_an_installed_package_registers_an_objective(
    tmp_path: Path, registered: Callable[..., None]
) -> None:
    registered("their-package", shortest="scores_theirs:length")
    module = tmp_path / "their-package/scores_theirs.py"
    module.write_text("def length(predictions):\n    return 7\n")
    objective = load_objective("shortest")
    assert (objective.name, objective(PREDICTIONS)) == ("shortest", 7.0)


def test_a_name_that_nobody_or_more_than_one_registers_is_refused_without_an_import(
    registered: Callable[..., None],
) -> None:
    registered("one", twice="nowhere_at_all:f", once="nowhere_at_all:f")
    registered("other", twice="nowhere_at_all:f")
    with pytest.raises(ConfigError, match=r"exakt: no installed package .* these: .*once.*twice"):
        load_objective("exakt")
    with pytest.raises(ConfigError, match=r"twice: 2 packages register it \(one, other\)"):
        load_objective("twice")
    with pytest.raises(ConfigError, match="once: the module nowhere_at_all cannot be imported"):
        load_objective("once")


@pytest.mark.slow
def test_accuracy_rises_by_the_error_rate_alone(
    model_of: Callable[[str], nn.Module], tokenizer: PreTrainedTokenizerBase
) -> None:
    """From 24 to about 50 %; with random signs of the steps it stays near where it was."""
    config = TaskConfig(
        template="{text} It was",
        verbalizers={"negative": " terrible", "positive": " great"},
        tokens_max=64,
        objective=NAME,
    )
    task = Task(config, tokenizer, 384)
    trained, held_out = (
        task.encode(
            [
                Example({"text": f"{TEXTS[label][n % 4]} {n}", "label": label}, "data.jsonl", n + 1)
                for n in numbers
                for label in TEXTS
            ]
        )
        for numbers in (range(64), range(100, 200))
    )
    options: dict[str, Any] = {
        "distribution": Distribution.RADEMACHER,
        "rounding": Rounding.STOCHASTIC,
        "threads": 1,
    }
    model = model_of("gpt2")
    manifest = manifest_of(model)
    weights = Weights(model, manifest, **options)
    estimator = Estimator(model, manifest, task, objective=objectives.error_rate, **options)
    chance = np.random.default_rng(2)
    before = evaluate(task, model, held_out, 64).accuracy
    for step in range(1, 41):
        picked = chance.choice(len(trained), 64, replace=False)
        batch = task.collate([trained.examples[index] for index in picked], "the test")
        seeds = np.arange(8, dtype=np.uint64) + np.uint64((2 << 32) + (step << 16))
        measured = estimator.measure(batch, [], [int(seed) for seed in seeds], 3e-2)
        grads = np.array([m.projected_grad for m in measured], dtype=np.float32)
        weights.apply(step, [Commit(seeds, np.float32(-1e-3 / 8) * grads, step)])
    assert evaluate(task, model, held_out, 64).accuracy > before + 0.1

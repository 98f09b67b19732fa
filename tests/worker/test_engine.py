"""The engine: measures, applies and digests, one thing at a time."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedmezo_core import program
from fedmezo_core.errors import CutShortError, FedMezoError, MismatchError, ModelError
from fedmezo_core.events import Measure, Measured, Ticket, Work
from fedmezo_core.records import Committed, Genesis, SeedRange, digest64_of, first_seed_of
from fedmezo_core.zo.data.held_out import evaluate
from fedmezo_core.zo.data.rows import read_examples
from fedmezo_core.zo.forward import row_states as row_states_module
from fedmezo_core.zo.party import open_party
from fedmezo_core.zo.plain.measurements import local_steps
from fedmezo_worker import engine as engine_module
from fedmezo_worker.engine import Engine
from fedmezo_worker.offers.told_to_others import reason_to_decline
from fedmezo_worker.worker_settings import WorkerSettings
from tests.integration.support.harness import TASK, config_of

FIRST_SEED = first_seed_of(7, 1, 0)
STEPS = 2


def measure_of(pairs: int, *, eps: float = 1e-3, want_digest: bool = True) -> Measure:
    """An order for so many projected gradients."""
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + pairs))
    return Measure(Ticket(1, 1, 0), Work(seeds, 1e-6, eps, want_digest))


MEASURE = measure_of(STEPS)


@pytest.fixture
def settings(model_folder: Path, data_files: list[Path]) -> WorkerSettings:
    return WorkerSettings(name="w1", data=data_files[0], model=str(model_folder), threads=1)


@pytest.fixture
async def engine(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> AsyncIterator[Engine]:
    """An engine at the base."""
    made = Engine()
    await made.load(settings, tiny_genesis())
    yield made
    await made.close()


async def test_loading_shows_its_long_steps(
    settings: WorkerSettings,
    tiny_genesis: Callable[..., Genesis],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genesis, made = tiny_genesis(), Engine()
    shown: list[str] = []
    monkeypatch.setattr(program, "_show_step", lambda step, _over: shown.append(step.what))
    await made.load(settings, genesis)
    await made.close()
    assert shown == [
        f"reading {settings.data}",
        "compiling kernels",
        f"loading {settings.model}",
        f"digesting {settings.model}",
        f"turning the rows of {settings.data} into tokens",
    ]


async def test_a_measurement_leaves_the_weights_as_they_are(engine: Engine) -> None:
    before = await engine.digest()
    measured = await engine.measure(MEASURE)
    assert await engine.digest() == before
    assert measured.scalars.weights_digest64 == digest64_of(before)
    assert len(measured.scalars.projected_grads) == 2


async def test_the_same_order_gives_the_same_bits(
    engine: Engine, settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    other = Engine()
    await other.load(settings, tiny_genesis())
    try:
        assert await engine.measure(MEASURE) == await other.measure(MEASURE)
    finally:
        await other.close()


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
async def test_a_projected_gradient_for_each_probe_of_each_step(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis], estimator: str
) -> None:
    engines = {probes: Engine() for probes in (1, 3)}
    try:
        for probes, engine in engines.items():
            await engine.load(settings, tiny_genesis(probes=probes, estimator=estimator))
        found = {
            probes: await engine.measure(measure_of(STEPS * probes))
            for probes, engine in engines.items()
        }
    finally:
        for engine in engines.values():
            await engine.close()
    assert len(found[3].scalars.projected_grads) == STEPS * 3
    # The first step's first probe is the run's with one: same seed, batch and weights.
    assert found[3].scalars.projected_grads[0] == pytest.approx(
        found[1].scalars.projected_grads[0], rel=0.05
    )


async def test_one_sided_gradients_come_near_the_two_sided(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    found = []
    for estimator in ("two_sided", "one_sided"):
        engine = Engine()
        try:
            await engine.load(settings, tiny_genesis(estimator=estimator, eps=1e-4))
            found.append(
                (await engine.measure(measure_of(STEPS, eps=1e-4))).scalars.projected_grads
            )
        finally:
            await engine.close()
    assert found[0] != found[1]
    # They differ by the curvature along z, which is proportional to eps.
    assert found[0][0] == pytest.approx(found[1][0], abs=0.1)


async def test_a_digest_is_taken_only_if_asked_for(engine: Engine) -> None:
    measured = await engine.measure(measure_of(1, want_digest=False))
    assert measured.scalars.weights_digest64 is None


async def test_an_answers_loss_is_the_mean_over_its_steps(engine: Engine) -> None:
    answer = await engine.measure(MEASURE)
    loaded = engine.loaded
    batch_of = functools.partial(loaded.batches.batch, MEASURE.ticket.round)
    steps = local_steps(loaded.estimator, batch_of, MEASURE.work, loaded.party.config)
    losses = [measurement.loss for measurement in steps]
    assert len(set(losses)) == STEPS
    assert answer.scalars.mean_loss == pytest.approx(sum(losses) / STEPS, rel=1e-12)


async def test_commits_one_by_one_or_at_once_give_the_same_weights(
    engine: Engine, settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    commits = [Committed(k, (SeedRange(k << 16, (0.5, -0.25)),), 99 + k) for k in (1, 2, 3)]
    other = Engine()
    await other.load(settings, tiny_genesis())
    try:
        await engine.apply(commits)
        for commit in commits:
            await other.apply([commit])
        assert await engine.digest() == await other.digest()
    finally:
        await other.close()


async def test_a_measurement_can_be_cut_short_at_its_next_step(engine: Engine) -> None:
    measuring = engine.measure(measure_of(4096))
    engine.cut_short()
    with pytest.raises(CutShortError):
        await asyncio.wait_for(measuring, 30)
    assert isinstance(await engine.measure(MEASURE), Measured)


@pytest.fixture
async def evaluating_engine(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis], heldout_file: Path
) -> AsyncIterator[Engine]:
    """An engine at the base, with held-out rows."""
    made = Engine()
    await made.load(settings.model_copy(update={"heldout": heldout_file}), tiny_genesis())
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("short_rows", "words", "level", "fits"),
    [
        (0, 40, logging.WARNING, "a new run with tokens_max = {} keeps all of them"),
        (1, 99, logging.WARNING, "a new run with tokens_max = 64 keeps more of them"),
        (19, 40, logging.INFO, "a new run with tokens_max = {} keeps all of them"),
    ],
    ids=["all", "many, beyond the positions", "few"],
)
async def test_rows_that_were_cut_are_counted(
    short_rows: int,
    words: int,
    level: int,
    fits: str,
    settings: WorkerSettings,
    tiny_genesis: Callable[..., Genesis],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fedmezo.party")
    path = tmp_path / "rows.jsonl"
    short = '{"text": "Short.", "label": "positive"}\n'
    path.write_text(short * short_rows + short.replace("Short.", "good " * words))
    engine = Engine()
    changes = {"data": path, "heldout": settings.data}
    await engine.load(settings.model_copy(update=changes), tiny_genesis())
    await engine.close()
    [said] = [one for one in caplog.records if f"{path}: " in one.getMessage()]
    found = re.fullmatch(
        rf"{re.escape(str(path))}: {short_rows + 1} rows, 1 of them cut to 32 tokens, which loses "
        r"(\d+) % of all tokens; the longest row has (\d+); (.*)",
        said.getMessage(),
    )
    assert found is not None, said.getMessage()
    percent, longest, advice = int(found[1]), int(found[2]), found[3]
    assert (said.levelno, advice) == (level, fits.format(longest))
    if not short_rows:
        assert percent == round(100 * (longest - 32) / longest)
    assert f"{settings.data}: 24 rows" in caplog.messages


@pytest.mark.parametrize("version", [2, 3])
async def test_a_tokenizer_saved_with_a_padding_token_may_join_a_new_run(
    version: int,
    settings: WorkerSettings,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    tokenizer: Any = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copy)
    genesis = tiny_genesis(task=TASK | {"template_version": version})
    engine = Engine()
    changed = settings.model_copy(update={"model": str(copy)})
    with nullcontext() if version == 3 else pytest.raises(MismatchError, match="The tokenizer "):
        await engine.load(changed, genesis)
    await engine.close()


@pytest.mark.parametrize("version", [2, 3])
async def test_an_old_runs_text_that_is_a_control_token_is_told(
    version: int,
    settings: WorkerSettings,
    tiny_genesis: Callable[..., Genesis],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "rows.jsonl"
    plain = '{"text": "A film.", "label": "positive"}\n'
    path.write_text(plain + plain.replace("film", "<eos> film"))
    engine = Engine()
    task = TASK | {"template_version": version}
    await engine.load(settings.model_copy(update={"data": path}), tiny_genesis(task=task))
    eos = engine.loaded.party.task.encode(read_examples(path, ("text", "label"))).examples[1]
    assert (0 in eos.prompt) == (version == 2)
    await engine.close()
    said = "".join(one for one in caplog.messages if "control token" in one)
    assert bool(said) == (version == 2)
    assert not said or said.startswith(
        f"{path}: the text of 1 rows contains '<eos>' or the like (first in "
    )


async def test_evaluations_change_no_bit(engine: Engine, evaluating_engine: Engine) -> None:
    commit = Committed(1, (SeedRange(1 << 16, (0.5, -0.25)),), 99)
    at_base = await evaluating_engine.evaluate()
    assert at_base is not None
    assert (at_base.round, at_base.rows) == (0, 10)
    assert await evaluating_engine.measure(MEASURE) == await engine.measure(MEASURE)
    for each in (engine, evaluating_engine):
        await each.apply([commit])
    later = await evaluating_engine.evaluate()
    assert later is not None
    assert later.round == 1
    assert later.loss != at_base.loss
    order = replace(MEASURE, ticket=Ticket(1, 2, 0))
    assert await evaluating_engine.measure(order) == await engine.measure(order)
    assert await evaluating_engine.evaluate() == later


async def test_an_evaluation_is_the_replicas(
    evaluating_engine: Engine,
    model_folder: Path,
    heldout_file: Path,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    party = open_party(tiny_genesis().config, str(model_folder), threads=1)
    rows = party.task.encode(read_examples(heldout_file, party.config.task.data_columns))
    expected = evaluate(party.task, party.loaded.model, rows, 32)
    found = await evaluating_engine.evaluate()
    assert found is not None
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.accuracy, found.auc) == (expected.accuracy, expected.auc)


async def test_an_evaluation_can_be_cut_short_at_its_next_batch(evaluating_engine: Engine) -> None:
    evaluating = evaluating_engine.evaluate()
    evaluating_engine.cut_evaluation_short()
    assert await evaluating in (None, await evaluating_engine.evaluate())
    measuring = evaluating_engine.measure(MEASURE)
    cut = evaluating_engine.evaluate()  # It waits for the measurement, and so has not begun.
    evaluating_engine.cut_evaluation_short()
    assert await cut is None
    assert isinstance(await measuring, Measured), "only the evaluation was cut short"


async def test_another_base_is_refused(
    settings: WorkerSettings, tiny_genesis: Callable[..., Genesis]
) -> None:
    genesis = tiny_genesis()
    other = Genesis(genesis.config, genesis.manifest_digest, b"x" * 32, b"y" * 32, 1, 4)
    engine = Engine()
    with pytest.raises(MismatchError, match="load the same files of tiny as the coordinator"):
        await engine.load(settings, other)
    await engine.close()


@pytest.mark.slow
async def test_weights_on_a_disk_change_nothing(
    evaluating_engine: Engine,
    settings: WorkerSettings,
    tiny_genesis: Callable[..., Genesis],
    model_folder: Path,
    heldout_file: Path,
    tmp_path: Path,
) -> None:
    room = (model_folder / "model.safetensors").stat().st_size // 2
    changes = {
        "device_memory_max": room,
        "offload_folder": tmp_path,
        "heldout": heldout_file,
    }
    commits = [Committed(k, (SeedRange(k << 16, (0.5, -0.25)),), 99 + k) for k in (1, 2, 3)]
    await evaluating_engine.apply(commits)
    expected = await evaluating_engine.measure(MEASURE)
    evaluated = await evaluating_engine.evaluate()
    # Twice: a worker that starts again finds the base, not what the one before it has left.
    for _ in range(2):
        other = Engine()
        await other.load(settings.model_copy(update=changes), tiny_genesis())
        try:
            await other.apply(commits)
            assert await other.measure(MEASURE) == expected
            assert await other.evaluate() == evaluated
            assert await other.measure(MEASURE) == expected
        finally:
            await other.close()


@pytest.fixture
def final_norm(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Genesis]:
    """Gives the genesis of a run of so many rounds that trains the final norm alone."""
    monkeypatch.setattr(row_states_module, "FROZEN_SHARE_MIN", 0.1)

    def genesis(rounds: int) -> Genesis:
        config = config_of(train=["ln_f"], rounds=rounds)
        return open_party(config, str(model_folder), threads=1).genesis()

    return genesis


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "row_states_max", "once"), [(99, 1 << 20, True), (99, 0, False), (2, 1 << 20, False)]
)
async def test_rows_that_come_often_go_through_the_frozen_part_once(
    settings: WorkerSettings,
    final_norm: Callable[..., Genesis],
    heldout_file: Path,
    rounds: int,
    row_states_max: int,
    once: bool,
) -> None:
    changes = {"row_states_max": row_states_max, "heldout": heldout_file}
    engine, plain = Engine(), Engine()
    await engine.load(settings.model_copy(update=changes), final_norm(rounds))
    await plain.load(
        settings.model_copy(update=changes | {"row_states_max": 0}), final_norm(rounds)
    )
    try:
        ours, theirs = await engine.measure(MEASURE), await plain.measure(MEASURE)
        assert ours.scalars.projected_grads == pytest.approx(
            theirs.scalars.projected_grads, rel=0.05, abs=0.01
        )
        row_states = engine.loaded.row_states
        assert once is (row_states is not None and bool(row_states.cut))
        # A measurement that was cut short is no reason to end an evaluation.
        engine.cut_short()
        found, expected = await engine.evaluate(), await plain.evaluate()
        assert found is not None
        assert expected is not None
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert await engine.measure(MEASURE) == ours
    finally:
        await engine.close()
        await plain.close()


@pytest.mark.parametrize(
    ("model", "kind", "told"),
    [
        ("my-base", MismatchError, '"my-base" = "FOLDER" under [models]'),
        ("owner/my-base", ModelError, "its log says why"),
    ],
)
async def test_a_model_that_is_a_folder_elsewhere_is_declined_with_the_line_to_write(
    model: str,
    kind: type[FedMezoError],
    told: str,
    settings: WorkerSettings,
    monkeypatch: pytest.MonkeyPatch,
    tiny_genesis: Callable[..., Genesis],
) -> None:
    def nowhere(name: str, _: int | None) -> Path:
        raise ModelError(f"The model {name} is not in /home/secret.")

    monkeypatch.setattr(engine_module, "folder_of_hub_name", nowhere)
    engine = Engine()
    with pytest.raises(kind) as caught:
        await engine.load(settings.model_copy(update={"model": ""}), tiny_genesis(model=model))
    await engine.close()
    reason = reason_to_decline(caught.value, "w1")
    assert told in reason
    assert "secret" not in reason
    if kind is MismatchError:
        assert "or a model on the hub" in reason, "gpt2 is one"

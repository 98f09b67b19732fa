"""Experiments: what arms are made of, runs that are kept, and what is reported."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import figures
from experiments import __main__ as program
from experiments import peak_memory as memory
from experiments import results as report
from experiments import runs
from experiments.catalogue import EXPERIMENTS, Arm, Changes, Experiment, run_of
from experiments.first_order import FirstOrder
from experiments.in_memory_federation import CountsRows
from experiments.judging import Judge, Point
from experiments.runs import Result, Run
from experiments.starting_point import Settings, load_data, split
from fedmezo_core.errors import ConfigError
from fedmezo_core.zo.data.rows import Example
from fedmezo_core.zo.party import open_party
from fedmezo_core.zo.plain.measurements import Measurement
from fedmezo_core.zo.privacy.mechanism import PrivateMeasures
from tests.integration.support.harness import TASK
from tests.integration.support.parties import write_rows

LORA = {"rank": 2, "alpha": 4.0, "target_modules": ["c_attn"]}


def row(number: int, label: str = "a") -> Example:
    return Example({"text": f"{number}", "label": label}, "file", number)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments-data")
    for number, name in enumerate(("films", "tweets")):
        write_rows(folder / f"{name}.train.jsonl", skew=number, count=30)
    write_rows(folder / "heldout.jsonl", count=8)
    return folder


@pytest.fixture
def changes(model_folder: Path, data_folder: Path) -> Changes:
    """The tiny model and data instead of the demo's, and plain MeZO instead of the recipe."""
    run = {
        "task": TASK,
        "rounds": 3,
        "local_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "estimator": "two_sided",
        "probes": 1,
        "normalized_step": False,
        "distribution": "rademacher",
        "dtype": "float32",
        "lora": None,
        "train": (),
    }
    settings = {
        "model": str(model_folder),
        "data": str(data_folder),
        "clients": 2,
        "heldout_per_label": 3,
        "heldout_rows_max": None,
        "fit_rows": 0,
        "curve_rows": 6,
        "evaluate_every_rounds": 2,
    }
    return Changes(run, settings)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 9, 40])
def test_every_row_goes_to_one_of_as_many_clients_as_asked(clients: int) -> None:
    domains = {
        name: [row(number) for number in range(100 * place, 100 * place + 60)]
        for place, name in enumerate(("amazon", "movies", "nyt", "tweets"))
    }
    dealt = split(domains, clients)
    assert len(dealt) == clients
    assert sorted(r.number for rows in dealt.values() for r in rows) == sorted(
        r.number for rows in domains.values() for r in rows
    )
    assert all(dealt.values())
    if clients >= 4:
        # Nobody has rows of two domains.
        assert all(len({r.number // 100 for r in rows}) == 1 for rows in dealt.values())
    if clients == 4:
        assert dealt == domains


def test_rows_that_are_held_out_are_not_trained_on(data_folder: Path) -> None:
    settings = Settings(data=str(data_folder), heldout_per_label=3, fit_rows=0, clients=2)
    task = run_of(EXPERIMENTS["accuracy"], Arm("any"), 1, Changes()).config.task
    data = load_data(settings, task)
    assert list(data.clients) == ["films", "tweets"]
    assert len(data.heldout) == 8 + 2 * 2 * 3
    assert {len(rows) for rows in data.clients.values()} == {30 - 6}
    trained = {(r.file, r.number) for rows in data.clients.values() for r in rows}
    assert not trained & {(r.file, r.number) for r in data.heldout}
    taken = [r for r in data.heldout if "train" in r.file]
    assert sum(r.values["label"] == "positive" for r in taken) == len(taken) / 2
    fewer = load_data(settings.model_copy(update={"train_rows_max": 5}), task)
    assert {len(rows) for rows in fewer.clients.values()} == {5}
    assert fewer.heldout == data.heldout


def test_a_domain_gives_at_most_a_tenth_of_its_rows_to_fit_an_adapter_to(
    data_folder: Path, changes: Changes
) -> None:
    settings = Settings(data=str(data_folder), heldout_per_label=3, fit_rows=100, clients=2)
    task = run_of(EXPERIMENTS["accuracy"], Arm("any"), 1, Changes()).config.task
    data = load_data(settings, task)
    assert {len(rows) for rows in data.clients.values()} == {24 - 2}
    assert len(data.fitting) == 2 * 2
    trained = {(r.file, r.number) for rows in data.clients.values() for r in rows}
    assert not trained & {(r.file, r.number) for r in data.fitting}
    fitted = Arm("fitted", {"lora": {**LORA, "freeze_a": True}})
    with pytest.raises(ConfigError, match="leaves none; raise fit_rows"):
        runs.execute(run_of(EXPERIMENTS["accuracy"], fitted, 1, changes))


# ---------------------------------------------------------------- the catalogue


@pytest.mark.parametrize("quick", [False, True])
def test_every_arm_is_a_run_that_is_allowed(quick: bool) -> None:
    for experiment in EXPERIMENTS.values():
        made = [run_of(experiment, arm, 1, Changes(quick=quick)) for arm in experiment.arms]
        assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)
        # Quick runs are of one size, so arms that differ in size alone are then the same.
        distinct = len({run.model_dump_json() for run in made})
        assert distinct == len(made) or quick, experiment.title
        assert len(experiment.arms) <= len(report.COLOURS) * len(report.LINES)
        names = {arm.name for arm in experiment.arms}
        others = {*experiment.against.values(), *filter(None, [experiment.paced_by])}
        assert {*experiment.against, *others} <= names


def test_every_experiment_has_a_target_of_make() -> None:
    makefile = (runs.ROOT / "Makefile").read_text()
    found = re.search(r"^EXPERIMENTS := (.+)$", makefile, re.MULTILINE)
    assert found is not None
    assert sorted(found[1].split()) == sorted(EXPERIMENTS)


@pytest.mark.parametrize("has_cuda", [False, True])
def test_all_leaves_out_what_needs_a_gpu_where_there_is_none(
    has_cuda: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    left_out = set(EXPERIMENTS) - set(program.targets_of(["all"]))
    assert left_out == (set() if has_cuda else {"accuracy-gpu"})
    assert ("accuracy-gpu is left out" in capsys.readouterr().err) is not has_cuda
    assert program.targets_of(["all", "accuracy-gpu"]) == list(EXPERIMENTS)
    assert program.targets_of(["clients", "accuracy", "clients"]) == ["clients", "accuracy"]


def test_any_value_of_a_run_or_of_the_settings_can_be_given() -> None:
    given = ["learning_rate=1e-3", "clients=3", "eps_follows_rate=true", "schedule=cosine"]
    changes = program.changes_of([*given, 'task={"template": "{text} so", "verbalizers": {}}'])
    assert changes.run["learning_rate"] == 1e-3
    assert changes.settings == {"clients": 3}
    values = {**changes.run, "task": TASK}
    arm = Arm("x", {"probes": 3})
    run = run_of(EXPERIMENTS["accuracy"], arm, 5, replace(changes, run=values | {"probes": 2}))
    assert (run.config.learning_rate, run.config.probes) == (1e-3, 3)
    assert (run.config.seed, run.config.workers_min, run.config.quorum) == (5, 3, 3)
    assert run.config.schedule == "cosine"
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        program.changes_of(["rounds"])
    with pytest.raises(ConfigError, match="learning"):
        run_of(EXPERIMENTS["accuracy"], Arm("x", {"learning": 1}), 1, Changes())


def forwards_of_a_worker(experiment: Experiment, arm: Arm) -> int:
    run = run_of(experiment, arm, 1, Changes()).config
    passes = 2 * run.probes if run.estimator == "two_sided" else run.probes + 1
    return run.rounds * run.local_steps * passes


def test_arms_take_the_forward_passes_that_they_are_named_after() -> None:
    experiment = EXPERIMENTS["estimators"]
    for arm in experiment.arms:
        named = re.search(r"(\d+) forwards$", arm.name)
        assert named is not None, arm.name
        assert forwards_of_a_worker(experiment, arm) == int(named[1]), arm.name
    experiment = EXPERIMENTS["local-steps"]
    assert {forwards_of_a_worker(experiment, arm) for arm in experiment.arms} == {600}


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(("one_sided", "passes"), [(False, 6), (True, 4)])
def test_rows_that_are_measured_one_by_one_count_as_often_as_they_are(
    one_sided: bool, passes: int
) -> None:
    class Zeros:
        def measure(self, _batch: Any, _local: Any, seeds: Any, _eps: float) -> list[Measurement]:
            return [Measurement(0.0, 0.0, 0.0, 0.0) for _ in seeds]

    counted = CountsRows(Zeros(), one_sided=one_sided)
    private = PrivateMeasures(counted, clip=1.0, noise_multiplier=1.0, batch_size=4)
    row: Any = SimpleNamespace(examples=("one",))
    for sample in ([row] * 5, [], [row] * 2):
        private.measure(sample, [], (1, 2, 3), 1e-3)
    assert counted.rows == 7 * passes


@pytest.mark.parametrize(
    ("arm", "forwards", "rows", "backwards"),
    [
        (Arm("zo"), 2 * 3 * 2 * 2, 4, 0),
        (Arm("probes", {"probes": 3, "estimator": "one_sided"}), 2 * 3 * 2 * 4, 4, 0),
        # Each client has 24 rows.
        (Arm("large batch", {"batch_size": 64}), 2 * 3 * 2 * 2, 24, 0),
        (Arm("bp", first_order=FirstOrder(learning_rate=1e-2)), 2 * 3 * 2, 4, 2 * 3 * 2),
    ],
    ids=lambda value: value.name if isinstance(value, Arm) else None,
)
def test_a_run_says_what_it_came_to_and_what_it_cost(
    changes: Changes, arm: Arm, forwards: int, rows: int, backwards: int
) -> None:
    result = runs.execute(run_of(EXPERIMENTS["accuracy"], arm, 1, changes))
    assert [point.round for point in result.curve] == [0, 2, 3]
    assert [(point.round, point.rows) for point in result.whole] == [(0, 20), (3, 20)]
    assert {point.rows for point in result.curve} == {6}
    assert (result.rounds, len(result.train_losses), result.ended) == (3, 3, "")
    assert (result.forwards, result.backwards) == (forwards, backwards)
    assert result.forward_rows == forwards * rows
    assert result.bytes_up > 0 < result.bytes_down
    if arm.first_order:
        assert result.bytes_up == 2 * 3 * result.trained_bytes
        assert not result.head
    else:
        assert result.bytes_up < 2 * 3 * 150
        assert len(result.head) == 64


def test_a_run_that_is_lost_is_a_result(changes: Changes) -> None:
    arm = Arm("wild", {"learning_rate": 1e9, "projected_grad_abs_max": 1e7})
    result = runs.execute(run_of(EXPERIMENTS["accuracy"], arm, 1, changes))
    assert result.ended
    assert result.rounds < 3
    assert [point.round for point in result.whole] == [0]
    text = report.markdown(EXPERIMENTS["accuracy"], {"wild": [result]}, [])
    assert "1 of 1 seeds lost" in text
    assert result.ended in text


def test_a_finished_run_is_kept_until_anything_changes(changes: Changes, tmp_path: Path) -> None:
    run = run_of(EXPERIMENTS["accuracy"], Arm("x"), 1, changes)
    assert runs.kept(run, tmp_path) is None
    runs.execute_and_keep(run, tmp_path)
    found = runs.kept(run, tmp_path)
    assert found is not None
    assert found.run == run
    again = runs.execute(run)
    assert (again.head, again.curve, again.whole) == (found.head, found.curve, found.whole)
    # What the base comes to is kept beside it: on some rows and on all.
    assert len(list(tmp_path.glob("base-*.json"))) == 2
    another = runs.execute(run, tmp_path)
    assert (another.curve, another.whole) == (found.curve, found.whole)
    others = [
        run_of(EXPERIMENTS["accuracy"], Arm("x"), 2, changes),
        run_of(EXPERIMENTS["accuracy"], Arm("x", {"eps": 1e-2}), 1, changes),
        run_of(EXPERIMENTS["accuracy"], Arm("x", first_order=FirstOrder()), 1, changes),
        run_of(EXPERIMENTS["accuracy"], Arm("x", settings={"curve_rows": 4}), 1, changes),
    ]
    assert all(runs.kept(other, tmp_path) is None for other in others)


def test_a_run_in_a_process_of_its_own_and_one_that_fails_there(
    changes: Changes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    processes = runs.Processes(tmp_path)
    run = run_of(EXPERIMENTS["accuracy"], Arm("x", {"rounds": 1}), 1, changes)
    assert processes.result(run).rounds == 1
    bad = Arm("x", {"lora": {**LORA, "target_modules": ["q_proj"]}})
    with pytest.raises(runs.RunError, match="ended with status 2"):
        processes.result(run_of(EXPERIMENTS["accuracy"], bad, 1, changes))
    assert "q_proj" in capfd.readouterr().err
    processes.end()
    with pytest.raises(runs.RunError, match="interrupted"):
        processes.result(run)


def test_the_plan_counts_what_a_run_takes(
    changes: Changes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arm in (Arm("zo"), Arm("one", {"probes": 3, "estimator": "one_sided"})):
        run = run_of(EXPERIMENTS["accuracy"], arm, 1, changes)
        assert program.passes_of(run) == runs.execute(run).forwards
    program.plan(program.Order(["distributions", "estimators"], 2, changes=changes, kept=tmp_path))
    text = capsys.readouterr().out
    # The arm that differs in nothing is in both, and counted once.
    cells = ([cell.strip() for cell in line.split("│")[1:6]] for line in text.splitlines())
    rows = {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in cells if row[1:]}
    assert rows["distributions"] == [6, 0, 144, 36]
    assert rows["estimators"][:2] == [2 * len(EXPERIMENTS["estimators"].arms) - 2, 0]
    both = zip(rows["distributions"], rows["estimators"], strict=True)
    assert rows["all"] == [first + second for first, second in both]


def test_texts_that_the_model_writes_are_judged_too(changes: Changes, tmp_path: Path) -> None:
    """The same for every method, whether or not an objective scores the run."""
    task = {
        "kind": "instruction",
        "template": "{text} It was",
        "response_column": "label",
        "tokens_max": 64,
    }
    by_f1 = {"objective": "fedmezo_core.zo.objectives:one_minus_token_f1"}
    results = {
        name: [
            runs.execute(
                run_of(
                    EXPERIMENTS["accuracy"],
                    Arm(
                        name,
                        {"task": task | more, "rounds": 1},
                        {"generated_tokens_max": 2, "heldout_per_label": 0},
                        first_order=first_order,
                    ),
                    1,
                    changes,
                ),
                tmp_path,
            )
        ]
        for name, more, first_order in (
            ("loss", {}, None),
            ("F1", {**by_f1, "generated_tokens_max": 2}, None),
            ("bp", {}, FirstOrder(learning_rate=1e-2)),
        )
    }
    party = open_party(results["loss"][0].run.config, changes.settings["model"], threads=1)
    data = load_data(results["loss"][0].run.settings, party.config.task)
    judge = Judge(party, data.heldout, every_rounds=1, generated_tokens_max=2)
    judge.judge(0)
    for [result] in results.values():
        assert result.whole[0] == judge.whole[0]
    assert results["F1"][0].train_losses[0] > 0.9, "the score, of a model that says nothing right"
    text = report.markdown(EXPERIMENTS["accuracy"], results, [])
    assert "| arm | accuracy | loss | exact match | token F1 | rounds |" in text


def test_columns_that_no_run_has_are_left_out(changes: Changes) -> None:
    """As with more than two classes, which have no median margin and no AUC."""
    verbalizers = {"negative": " terrible", "positive": " great", "neutral": " bad"}
    arm = Arm("x", {"task": TASK | {"verbalizers": verbalizers}})
    result = runs.execute(run_of(EXPERIMENTS["accuracy"], arm, 1, changes))
    text = report.markdown(EXPERIMENTS["accuracy"], {"x": [result]}, [])
    assert "| arm | accuracy | loss | rounds |" in text
    names = [figure.name for figure in report.figures(EXPERIMENTS["accuracy"], {"x": [result]})]
    assert not [name for name in names if "AUC" in name or "calibrated" in name]


# ---------------------------------------------------------------- memory


def test_memory_is_taken_on_the_longest_batch(changes: Changes) -> None:
    run = run_of(EXPERIMENTS["accuracy"], Arm("x"), 1, changes)
    party = open_party(run.config, run.settings.model, threads=1)
    rows = next(iter(load_data(run.settings, run.config.task).clients.values()))
    batch = memory.longest_batch(run, party, rows)
    lengths = [len(example.prompt) for example in party.task.encode(rows).examples]
    assert batch.input_ids.shape == (4, max(lengths))
    bp = run_of(EXPERIMENTS["accuracy"], Arm("x", first_order=FirstOrder()), 1, changes)
    for way in (memory.INFERENCE, memory.TRAINING):
        for made in (run, bp):
            memory.passes(made, party, rows, way)()


def test_memory_is_that_of_processes_of_their_own(
    changes: Changes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(EXPERIMENTS["accuracy"], Arm("x"), 1, changes)
    peak = memory.kept_peak_mb(run, memory.TRAINING, tmp_path)
    assert peak > 100
    # One process is enough to see that it works: each takes seconds to start.
    asked: list[str] = []

    def half(run: Run, way: str) -> float:
        asked.append(way)
        return peak / 2

    monkeypatch.setattr(memory, "peak_mb", half)
    for _ in range(2):
        found = memory.figures({"FedMeZO": run}, tmp_path)
        values = [(figure.value, figure.unit) for figure in found]
        assert values == [(peak / 2, "MB"), (peak, "MB"), (2, "ratio")]
    assert asked == ["inference"]
    memory.figures({"FedMeZO": run}, tmp_path, fresh=True)
    assert asked == ["inference", "inference", "training"]


# ---------------------------------------------------------------- the whole program


TINY = Experiment(
    "Tiny arms",
    (
        Arm("ours"),
        Arm("ours, LoRA", {"lora": LORA, "learning_rate": 1e-2}),
        Arm("theirs", first_order=FirstOrder(learning_rate=1e-2)),
    ),
    panels=EXPERIMENTS["accuracy"].panels,
    against={"ours": "theirs"},
    has_memory=True,
    goals={"theirs ÷ ours: bytes up": "at least 10"},
)


def test_an_experiment_reports_and_goes_on_where_it_was(
    changes: Changes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPERIMENTS, "accuracy", TINY)
    done: list[Run] = []

    class Here(runs.Processes):
        """Without a process each, which takes seconds to start."""

        def result(self, run: Run) -> Result:
            done.append(run)
            runs.execute_and_keep(run, tmp_path / "kept")
            found = runs.kept(run, tmp_path / "kept")
            assert found is not None
            return found

    monkeypatch.setattr(program, "Processes", Here)
    peaks = [figures.Figure("peak memory of inference", 500.0, "MB")]
    monkeypatch.setattr(memory, "figures", lambda *_, **__: peaks)
    order = program.Order(
        ["accuracy"],
        seeds=2,
        jobs=1,
        changes=changes,
        kept=tmp_path / "kept",
        reports=tmp_path / "reports",
    )
    program.experiment(order)
    assert len(done) == 6
    program.experiment(order)
    assert len(done) == 6, "all were kept"
    program.experiment(replace(order, fresh=True, seeds=1))
    assert len(done) == 9

    rows = json.loads((tmp_path / "reports/accuracy.json").read_text())
    assert all(set(item) == {"name", "value", "unit", "goal"} for item in rows)
    assert all(math.isfinite(item["value"]) for item in rows)
    names = [item["name"] for item in rows]
    assert len(set(names)) == len(names)
    by_name = {item["name"]: item for item in rows}
    assert by_name["theirs ÷ ours: bytes up"]["goal"] == "at least 10"
    assert by_name["theirs ÷ ours: bytes up"]["value"] > 10
    assert by_name["theirs ÷ ours: forward passes"]["value"] > 0
    assert by_name["theirs: rows through the model, all workers"]["value"] == 12 * 4
    assert by_name["theirs ÷ ours: rows through the model"]["value"] == 12 / (2 * 3 * 2 * 2)
    assert by_name["theirs: backward passes of one batch, all workers"]["value"] == 12
    assert "ours: held-out accuracy, behind theirs" in by_name
    text = (tmp_path / "reports/accuracy.md").read_text()
    for name in ("before", "ours", "ours, LoRA", "theirs", "inference"):
        assert f"| {name} |" in text
    picture = tmp_path / "reports/accuracy.png"
    assert picture.stat().st_size > 10_000
    picture.unlink()
    assert report.redraw("accuracy", TINY, tmp_path / "reports") == picture
    assert picture.exists()


def test_the_share_of_a_drop_is_at_equal_rounds_and_at_convergence(changes: Changes) -> None:
    run = runs.execute(run_of(EXPERIMENTS["accuracy"], Arm("x", {"rounds": 1}), 1, changes))

    def of(losses: dict[int, float]) -> Result:
        curve = [replace(run.curve[0], round=at, loss=loss) for at, loss in losses.items()]
        return run.model_copy(update={"curve": curve})

    results = {
        "ours": [of({0: 3.0, 20: 2.6}), of({0: 3.0, 10: 2.9, 20: 2.8})],
        "theirs": [of({0: 3.0, 5: 2.5, 10: 2.6}), of({0: 3.0, 10: 2.6})],
    }
    arms = (Arm("ours"), Arm("theirs"))
    found = report.figures(Experiment("any", arms, drops={"ours": ("theirs",)}), results)
    shares = {
        figure.name.removeprefix("ours: share of the drop of theirs, "): figure.value
        for figure in found
        if "share of the drop" in figure.name
    }
    assert shares == {
        "at equal rounds": pytest.approx((0.5 + 0.25) / 2),
        "at equal rounds, most − least of the seeds": pytest.approx(0.25),
        "at convergence": pytest.approx((0.8 + 0.5) / 2),
        "at convergence, most − least of the seeds": pytest.approx(0.3),
    }


@pytest.mark.parametrize("splitter", ["iid", "category", "dirichlet"])
def test_rows_are_dealt_as_fedmezo_split_deals_them(data_folder: Path, splitter: Any) -> None:
    settings = Settings(
        data=str(data_folder), heldout_per_label=0, fit_rows=0, clients=2, splitter=splitter
    )
    task = run_of(EXPERIMENTS["accuracy"], Arm("any"), 1, Changes()).config.task
    clients = load_data(settings, task).clients
    assert list(clients) == ["client-1", "client-2"]
    trained = [(row.file, row.number) for rows in clients.values() for row in rows]
    assert len(trained) == len(set(trained)) == 60
    files = [{row.file for row in rows} for rows in clients.values()]
    assert all(len(names) == 1 for names in files) == (splitter == "category")


def curve_point(round_: int, accuracy: float) -> Point:
    return Point(round_, 1.0, accuracy, None, None, 10)


def test_a_line_is_the_mean_of_the_seeds_that_came_so_far() -> None:
    curve = report.Curve(
        "arm",
        [[0, 5], [0]],
        [
            {"round": 1.0, "forwards": 8.0, "bytes": 2.0},
            {"round": 1.0, "forwards": 8.0, "bytes": 4.0},
        ],
        {"accuracy": [[0.5, 0.9], [0.7]], "auc": [[None, None], [None]]},
    )
    assert curve.line("accuracy", "round") == [(0, 0.6, 0.5, 0.7), (5, 0.9, 0.9, 0.9)]
    assert curve.line("accuracy", "forwards")[-1][0] == 40
    assert curve.line("auc", "round") == []


def result_of(losses: list[float], ended: str = "") -> Result:
    """A result of which only the training losses matter."""
    values: dict[str, Any] = {"train_losses": losses, "rounds": len(losses), "ended": ended}
    return Result.model_construct(**values)


def test_losses_are_smoothed_over_as_many_rounds() -> None:
    assert report._smooth([1.0, 2.0, 3.0, 4.0, 5.0, 16.0]) == [3.0, 6.0]
    assert report._smooth([1.0, 4.0]) == [2.5]


def test_pace_is_the_round_that_comes_to_the_last_loss_of_the_baseline_with_the_same_seed() -> None:
    slow = [float(loss) for loss in range(10, 0, -1)]
    faster = [10.0, 8.0, 6.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    worse = [10.0] * 10
    results = {
        "slow": [result_of(slow), result_of(slow)],
        "other": [result_of(faster), result_of(worse)],
        "lost": [result_of([], "lost"), result_of([1.0], "lost")],
    }
    found = {figure.name: figure.value for figure in report._pace("slow", results)}
    rounds = "rounds to the last training loss of slow"
    assert found[f"slow: {rounds}"] == 10
    # The mean of the last five rounds is 3: one seed is at 2.8 after seven rounds, the other never.
    assert found[f"other: {rounds}"] == (7 + 10) / 2
    assert found[f"other: {rounds}, most − least of the seeds"] == 10 - 7
    change = "last training loss, less slow's"
    assert found[f"slow: {change}, same seeds"] == 0
    assert found[f"other: {change}, same seeds"] == pytest.approx((1.0 - 3 + 10 - 3) / 2)
    assert found[f"other: {change}, most − least of the seeds"] == pytest.approx(9.0)
    assert not [name for name in found if name.startswith("lost")]
    # A quick run has fewer rounds than are averaged.
    quick = report._pace("slow", {"slow": [result_of([2.0, 1.0])]})
    assert [figure.value for figure in quick] == [2, 0, 0, 0]


def test_held_out_pace_is_the_round_that_comes_to_the_mean_last_loss_of_the_baseline() -> None:
    def judged(*losses: float, ended: str = "") -> Result:
        points = [Point(number, loss, 0.5, None, None, 8) for number, loss in enumerate(losses)]
        run = SimpleNamespace(config=SimpleNamespace(rounds=4))
        values: dict[str, Any] = {"curve": points, "ended": ended, "run": run}
        return Result.model_construct(**values)

    results = {
        "slow": [judged(5, 4, 3, 2, 2.0), judged(5, 5, 5, 4, 3.0)],
        "fast": [judged(5, 2.5, 3, 3, 3), judged(5, 4, 2, 2, 2)],
        "lost": [judged(5, 9, ended="it diverged"), judged(5, 3, 2, ended="it diverged later")],
    }
    found = {figure.name: figure.value for figure in report._held_out_pace("slow", results)}
    rounds = "rounds to the last held-out loss of slow"
    assert found[f"slow: {rounds}"] == (3 + 4) / 2, "the mean of 2 and 3 is 2.5"
    assert found[f"fast: {rounds}"] == (1 + 2) / 2
    assert found[f"lost: {rounds}"] == (4 + 2) / 2
    assert found[f"lost: {rounds}, most − least of the seeds"] == 2
    lost = {"slow": [judged(5, ended="it diverged")], "fast": [judged(5, 1)]}
    assert report._held_out_pace("slow", lost) == []


def test_the_command_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["nothing"])
    error = capsys.readouterr().err
    assert all(target in error for target in EXPERIMENTS)

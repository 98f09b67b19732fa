"""The run's contract: what is refused, and in which words."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmezo_core.config import (
    COLUMN_USES_MAX,
    TEMPLATE_CHARS_MAX,
    TEXT_CHARS_MAX,
    VERBALIZERS_MAX,
    LoraConfig,
    RunConfig,
    TaskConfig,
    how_to_name_a_copy,
    parse_run,
)
from fedmezo_core.errors import ConfigError, ProtocolError
from fedmezo_core.journal.codec import config_from_pb, config_to_pb
from fedmezo_core.wire.client import RECEIVE_BYTES_MAX
from fedmezo_proto.v1 import journal_pb2 as pb

VALUES: dict[str, Any] = {
    "run_id": "run-1",
    "model": "m",
    "learning_rate": 1e-6,
    "task": {"verbalizers": {"no": " bad", "yes": " good"}},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rounds": 0},
            "run: rounds = 0 is not allowed: use 1 or more",
        ),
        ({"rounds": "many"}, "rounds = 'many' is not allowed"),
        ({"eps": 0}, "eps = 0 is not allowed: use more than 0"),
        ({"eps": float("inf")}, "eps = inf is not allowed"),
        ({"learning_rate": float("nan")}, "learning_rate = nan is not allowed"),
        ({"projected_grad_abs_max": -1}, "projected_grad_abs_max = -1 is not allowed"),
        ({"seed": -1}, "seed = -1 is not allowed"),
        ({"seed": 2**64}, "seed = 18446744073709551616 is not allowed"),
        ({"dtype": "float8"}, "dtype = 'float8' is not allowed: use 'float32', "),
        ({"dtype": "float64"}, "use 'float32', 'bfloat16' or 'float16'"),
        ({"distribution": "cauchy"}, "use 'rademacher', 'gaussian', 'low_rank_1'"),
        ({"distribution": "low_rank_3"}, "distribution = 'low_rank_3' is not allowed"),
        ({"estimator": "central"}, "estimator = 'central' is not allowed: use 'two_"),
        ({"probes": 0}, "probes = 0 is not allowed: use 1 or more"),
        ({"probes": 1025}, "probes = 1025 is not allowed"),
        (
            {"local_steps": 5, "probes": 820},
            "local_steps x probes = 4100 projected gradients in one answer; the most is 4096",
        ),
        (
            {"local_steps": 4, "probes": 1024, "cohort_size_max": 65},
            (
                "local_steps x probes x cohort_size_max = 266240 pairs in one round; "
                "the most is 262144"
            ),
        ),
        ({"run_id": "Run 1"}, "run_id = 'Run 1' is not allowed"),
        ({"run_id": "run-1\n"}, "run_id = 'run-1\\n' is not allowed"),
        ({"deadline_ms": 99}, "deadline_ms = 99 is not allowed"),
        ({"local_steps": 4097}, "local_steps = 4097 is not allowed"),
        ({"quorum": 65}, "quorum 65 can never be met by a cohort of at most 64"),
        ({"local_steps": 4096, "cohort_size_max": 65}, "266240 pairs in one round"),
        ({"buffer_answers": 4097}, "buffer_answers = 4097 is not allowed"),
        ({"staleness_max_rounds": 257}, "staleness_max_rounds = 257 is not allowed"),
        ({"staleness_exponent": -1}, "staleness_exponent = -1 is not allowed"),
        ({"buffer_answers": 2, "quorum": 3}, "quorum 3 is more than the buffer_answers = 2"),
        ({"buffer_answers": 2, "seed_policy": "shared"}, "choose per_worker or pool"),
        (
            {"buffer_answers": 2, "seed_policy": "pool", "pool_sampling": "weighted"},
            "the seeds of a late answer could not be drawn again; choose uniform",
        ),
        (
            {"buffer_answers": 65, "local_steps": 4096},
            "local_steps x probes x buffer_answers = 266240 pairs in one round",
        ),
        (
            {"buffer_answers": 64, "local_steps": 4096, "staleness_max_rounds": 8},
            "= 2359296 pairs to remember; the most is 2097152, so lower one of the four",
        ),
        ({"round": 3}, "round is not a known setting"),
        ({"task": {"verbalizers": {"a": " x", "b": " y"}, "tmplate": ""}}, "task.tmplate is not a"),
        ({"task": {"template": "no field"}}, "names no column; write one as {text}"),
        ({"task": {}}, "classification needs at least two verbalizers"),
        ({"task": {"kind": "poetry"}}, "task.kind = 'poetry' is not allowed"),
        (
            {"lora": {"rank": 0, "alpha": 1, "target_modules": ["q"]}},
            "lora.rank = 0 is not allowed",
        ),
        ({"lora": {"rank": 1, "alpha": 1, "target_modules": []}}, "lora.target_modules"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(VALUES | changes, "run")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def labels(count: int, characters: int) -> dict[str, str]:
    """As many verbalizers, which have as many characters together."""
    words = {f"{n:06d}": " x" for n in range(count)}
    words["000000"] += "x" * (characters - 8 * count)
    return words


def with_characters(count: int) -> dict[str, Any]:
    """Changes that give the contract as many characters of text."""
    return {"task": {"verbalizers": labels(2, count - len("m" + "{text}"))}}


def with_task(**changes: Any) -> dict[str, Any]:
    return {"task": VALUES["task"] | changes}


def with_targets(*targets: str) -> dict[str, Any]:
    return {"lora": {"rank": 1, "alpha": 1, "target_modules": list(targets)}}


@pytest.mark.parametrize(
    ("most", "too_much", "words"),
    [
        (
            with_task(template="{text}" + "x" * (TEMPLATE_CHARS_MAX - 6)),
            with_task(template="{text}" + "x" * (TEMPLATE_CHARS_MAX - 5)),
            "use at most 65536 characters",
        ),
        (
            with_task(template="{text}" * COLUMN_USES_MAX),
            with_task(template="{text}" * (COLUMN_USES_MAX + 1)),
            "names columns 257 times; the most is 256",
        ),
        (
            with_task(verbalizers=labels(VERBALIZERS_MAX, 10 * VERBALIZERS_MAX)),
            with_task(verbalizers=labels(VERBALIZERS_MAX + 1, 10 * VERBALIZERS_MAX)),
            "task.verbalizers is not allowed: use at most 10000 items",
        ),
        (
            with_characters(TEXT_CHARS_MAX),
            with_characters(TEXT_CHARS_MAX + 1),
            "have 1048577 characters together; the most is 1048576",
        ),
        (with_task(label_column="x" * 1024), with_task(label_column="x" * 1025), "at most 1024"),
        (
            with_task(response_column="x" * 1024),
            with_task(response_column="x" * 1025),
            "at most 1024",
        ),
        (
            with_task(objective="m:" + "x" * 1022),
            with_task(objective="m:" + "x" * 1023),
            "at most 1024",
        ),
        ({"model": "x" * 4096}, {"model": "x" * 4097}, "at most 4096 characters"),
        ({"train": ["x" * 256]}, {"train": ["x" * 257]}, "at most 256 characters"),
        ({"train": ["x"] * 4096}, {"train": ["x"] * 4097}, "at most 4096 items"),
        (with_targets("x" * 4096), with_targets("x" * 4097), "at most 4096 characters"),
        (with_targets(*["x"] * 4096), with_targets(*["x"] * 4097), "at most 4096 items"),
    ],
)
def test_every_text_and_list_has_a_bound(
    most: dict[str, Any], too_much: dict[str, Any], words: str
) -> None:
    parse_run(VALUES | most, "run")
    with pytest.raises(ConfigError) as caught:
        parse_run(VALUES | too_much, "run")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_contract_with_all_that_is_allowed_fits_into_a_message() -> None:
    half = "\U0001f600" * (TEXT_CHARS_MAX // 2 - 6)
    config = parse_run(VALUES | with_task(verbalizers={"a": half, "b": half}), "run")
    assert 4_000_000 < config_to_pb(config).ByteSize() < RECEIVE_BYTES_MAX


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "template", ["{" + "é" * 60_000 + "!}", "{" * 60_000, "{{" * 30_000 + "}", "{a" * 30_000]
)
def test_no_template_takes_for_ever(template: str) -> None:
    with pytest.raises(ConfigError, match="names no column"):
        parse_run(VALUES | with_task(template=template), "run")


@pytest.mark.parametrize("key", ["run_id", "model", "task"])
def test_a_value_that_is_missing_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"the file: {key} is missing; set it"):
        parse_run({k: v for k, v in VALUES.items() if k != key}, "the file")


def test_more_than_one_problem_is_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(1 more after this one\)"):
        parse_run(VALUES | {"rounds": 0, "eps": 0}, "run")


def test_the_nearest_key_of_a_table_is_named() -> None:
    with pytest.raises(ConfigError, match=r"task\.templat is not .*; write template, or remove it"):
        parse_run(VALUES | with_task(templat="{text}"), "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"workers_min": 2},
            "workers_min = 2 is too few for .* secure_cohort_min = 3 answers; set it to 3 or more",
        ),
        ({"secure_cohort_min": 4, "quorum": 3}, "quorum = 3 is too few .* set it to 4 or more"),
        (
            {"cohort_size_max": 4000},
            "cohort_size_max = 4000 is too many for secure_.*; set it to [0-9]+ or less",
        ),
    ],
)
def test_the_size_of_a_secure_sum_is_told(changes: dict[str, Any], said: str) -> None:
    secure = {k: v for k, v in VALUES.items() if k not in ("workers_min", "quorum")}
    with pytest.raises(ConfigError, match=said):
        parse_run(secure | {"secure_aggregation": True} | changes, "run")


def test_instruction_tuning_needs_no_verbalizers() -> None:
    config = parse_run(
        VALUES | {"task": {"kind": "instruction", "template": "{q} {q} {a b}"}}, "run"
    )
    assert config.task.columns() == ("q", "a b")


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": 2e-3},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"rounding": "nearest"},
        {"distribution": "gaussian"},
        {"distribution": "low_rank_2"},
        {"probes": 2},
        {"estimator": "one_sided"},
        {"buffer_answers": 2},
        {"rate_directions": 0},
    ],
)
def test_the_recipe_names_all_that_the_bits_depend_on(changes: dict[str, Any]) -> None:
    assert parse_run(VALUES | changes, "run").recipe != parse_run(VALUES, "run").recipe


positive = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False)
words = st.text(max_size=20)
configs = st.builds(
    RunConfig,
    run_id=st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True),
    model=st.text(min_size=1, max_size=50),
    task=st.builds(
        TaskConfig,
        template=words.map(lambda text: text + "{text}"),
        verbalizers=st.dictionaries(words, words, min_size=2, max_size=4),
        tokens_max=st.integers(8, 131_072),
    ),
    lora=st.none()
    | st.builds(
        LoraConfig,
        rank=st.integers(1, 1024),
        alpha=positive,
        target_modules=st.lists(words, min_size=1, max_size=3).map(tuple),
    ),
    seed=st.integers(0, 2**64 - 1),
    rounds=st.integers(1, 10_000_000),
    eps=positive,
    learning_rate=positive,
    report_losses=st.booleans(),
    buffer_answers=st.integers(0, 8),
    staleness_max_rounds=st.integers(0, 20),
    staleness_exponent=st.floats(0, 2),
    local_steps=st.integers(1, 4),
    probes=st.integers(1, 1024),
    estimator=st.sampled_from(["two_sided", "one_sided"]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    rounding=st.sampled_from(["stochastic", "nearest"]),
    distribution=st.sampled_from(
        ["rademacher", "gaussian", "low_rank_1", "low_rank_2", "low_rank_4"]
    ),
)


@given(configs)
def test_the_wire_keeps_every_value(config: RunConfig) -> None:
    assert config_from_pb(config_to_pb(config)) == config


def test_a_contract_from_before_steps_grew_keeps_its_bytes_and_all_its_values() -> None:
    old = RunConfig.model_validate(VALUES)
    new = parse_run(VALUES, "run")
    assert (old.rate_directions, new.rate_directions) == (0, 64)
    assert not config_to_pb(old).HasField("rate_directions")
    assert config_from_pb(config_to_pb(new)) == new
    assert parse_run(VALUES | {"task": old.task.model_dump()}, "run", old) == old
    assert parse_run(VALUES | {"rate_directions": 8}, "run").rate_directions == 8
    one_step = {"local_steps": 1, "rate_directions": 0}
    alone = parse_run(VALUES | one_step, "run").recipe
    assert parse_run(VALUES | one_step | {"rate_directions": 64}, "run").recipe == alone, (
        "workers compute no coefficients, so older ones may take part"
    )


def test_forms_of_the_base_are_listed_by_name_and_only_for_adapters() -> None:
    plain = parse_run(VALUES, "run")
    assert not plain.base_forms
    assert not config_to_pb(plain).base_forms
    lora = {"lora": {"rank": 2, "alpha": 4, "target_modules": ["c_attn"]}}
    forms = ["8-bit", "onnx:" + "ab" * 32]
    listed = parse_run(VALUES | lora | {"base_forms": forms}, "run")
    assert config_from_pb(config_to_pb(listed)) == listed
    assert listed.recipe == parse_run(VALUES | lora, "run").recipe
    for values, words in (
        (lora | {"base_forms": ["onnx:abc"]}, "it must match"),
        (lora | {"base_forms": ["2-bit"]}, "it must match"),
        ({"base_forms": forms}, "base_forms are for runs with lora"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_run(VALUES | values, "run")


def test_a_run_of_before_probes_keeps_its_recipe_and_its_bytes() -> None:
    """Workers and journals of the first release have these, and know no field 21 or 22."""
    config = RunConfig.model_validate(VALUES)
    assert (config.probes, config.estimator, config.pairs_per_answer) == (1, "two_sided", 10)
    assert config.recipe == "fedmezo-1 philox4x32-10 rademacher float32 stochastic eps=0.001"
    message = config_to_pb(config)
    assert not message.HasField("probes")
    assert not message.HasField("estimator")


@pytest.mark.parametrize("change", [{"probes": 0}, {"probes": 4097}, {"estimator": 0}])
def test_a_probe_count_or_estimator_that_is_none_is_refused(change: dict[str, int]) -> None:
    message = config_to_pb(parse_run(VALUES, "run"))
    message.MergeFrom(pb.RunConfig(**change))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        config_from_pb(message)


INSTRUCTION = {"kind": "instruction", "response_column": "answer"}


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{text} It was", ["", "text", " It was"]),
        ("{text} {bewertung-neu}: x", ["", "text", " ", "bewertung-neu", ": x"]),
        ("{größe}{名前}{a.b}{0}", ["", "größe", "", "名前", "", "a.b", "", "0", ""]),
        ('{{"q": "{text}"}}', ['{"q": "', "text", '"}']),
        ("{{text}} {{{text}}}", ["{text} {", "text", "}"]),
    ],
)
def test_what_stands_in_a_new_runs_braces_is_a_column(template: str, parts: list[str]) -> None:
    values = VALUES | {"task": INSTRUCTION | {"template": template}}
    config = parse_run(values, "run")
    assert config.task.template_parts() == parts
    assert config.task.columns_are_plain
    assert config_from_pb(config_to_pb(config)) == config
    assert parse_run(values, "run", config) == config, "a restart with the same settings"
    assert config.recipe.endswith(" template=3")
    begun = RunConfig.model_validate(VALUES | {"task": values["task"] | {"template_version": 2}})
    assert begun.task.template_parts() == parts
    assert not begun.task.columns_are_plain
    assert parse_run(values, "run", begun) == begun, "a run of the second version keeps it"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{text:>10}", "{text:>10}"),
        ("{text} {}", "{}"),
        ("{text!r}", "{text!r}"),
        ("{text[0]}", "{text[0]}"),
        ("{text} { x }", "{ x }"),
        ("{text} {x\ny}", "{x\\ny}"),
        ("{text} {", "{"),
        ("{text} }", "}"),
    ],
)
def test_braces_without_a_column_are_refused_by_name(template: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(VALUES | {"task": INSTRUCTION | {"template": template}}, "run")
    assert f"holds {named}, which names no column" in str(caught.value)
    assert "{{ or }}" in str(caught.value)


@pytest.mark.parametrize("template", ["{text} {größe}", "{{{text}}}", "{text:>10} {text}"])
def test_the_braces_of_a_run_that_has_begun_keep_their_meaning(template: str) -> None:
    task = INSTRUCTION | {"template": template}
    begun = RunConfig.model_validate(VALUES | {"task": task})
    assert begun.task.columns() == ("text",)
    assert config_from_pb(config_to_pb(begun)) == begun
    assert parse_run(VALUES | {"task": task}, "run", begun) == begun


def test_a_template_that_gives_the_answer_away_is_refused() -> None:
    task = VALUES["task"] | {"template": "{text} {label}"}
    with pytest.raises(ConfigError, match=r"names label, the column with the answer"):
        parse_run(VALUES | {"task": task}, "run")
    begun = RunConfig.model_validate(VALUES | {"task": task})
    assert parse_run(VALUES | {"task": task}, "run", begun) == begun
    objective = parse_run(VALUES | {"task": task | {"objective": "a:b"}}, "run")
    assert objective.task.holds_its_answer, "an objective may want it"


WITHOUT_A_RATE = {key: value for key, value in VALUES.items() if key != "learning_rate"}


def test_a_new_run_without_a_rate_gets_normalised_steps_of_a_sound_one() -> None:
    lora = {"rank": 32, "alpha": 32, "target_modules": ["up_proj"]}
    demo = {"rounds": 50, "local_steps": 1, "probes": 28, "schedule": "linear", "workers_min": 4}
    fitted = parse_run(WITHOUT_A_RATE | demo | {"lora": lora | {"freeze_a": True}}, "run")
    assert fitted.normalized_step
    assert 0.2 <= fitted.learning_rate <= 0.8, "the demo's own rate is 0.5"
    parts: list[dict[str, Any]] = [{}, {"lora": lora}, {"train": ["layers.29"]}]
    whole, *others = (parse_run(WITHOUT_A_RATE | demo | part, "run") for part in parts)
    assert all(whole.learning_rate < other.learning_rate < 0.2 for other in others)
    longer = parse_run(WITHOUT_A_RATE | demo | {"rounds": 200}, "run")
    assert longer.learning_rate == pytest.approx(whole.learning_rate / 2, rel=0.05)
    for schedule in ("linear", "cosine"):
        level = {"schedule": schedule, "final_rate_fraction": 1.0}
        constant, flat = (
            parse_run(WITHOUT_A_RATE | demo | one, "run")
            for one in ({"schedule": "constant"}, level)
        )
        assert flat.learning_rate == constant.learning_rate
    assert not parse_run(VALUES, "run").normalized_step, "as it was"


def test_a_default_rate_is_the_same_for_all_who_bring_enough_directions() -> None:
    def rate(probes: int, workers: int, **changes: Any) -> float:
        values = {"probes": probes, "workers_min": workers, **changes}
        return parse_run(WITHOUT_A_RATE | values, "run").learning_rate

    enough = rate(16, 4)
    assert rate(16, 40) == rate(31, 3) == rate(64, 1) == enough
    assert rate(16, 40, seed_policy="shared") == rate(16, 1), "each direction counts once"
    # Fewer make shorter steps, of a walk that is as long as before: sqrt(16 / 64) x 64 / 16.
    assert rate(16, 1) == pytest.approx(2 * enough, rel=0.05)
    alike = rate(16, 4, rate_directions=0)
    assert alike == enough
    assert rate(16, 16, rate_directions=0) == pytest.approx(2 * alike, rel=0.05)


def test_a_default_rate_stays_with_its_run() -> None:
    begun = parse_run(WITHOUT_A_RATE, "run")
    assert config_from_pb(config_to_pb(begun)) == begun
    assert parse_run({**begun.model_dump(), **WITHOUT_A_RATE}, "run", begun) == begun
    old = RunConfig.model_validate(WITHOUT_A_RATE)
    assert parse_run({**old.model_dump(), **WITHOUT_A_RATE}, "run", old) == old, (
        "runs from before keep 1e-6"
    )


def test_a_default_rate_is_checked_with_the_rest() -> None:
    with pytest.raises(ConfigError, match="learning_rate x weight_decay"):
        parse_run(WITHOUT_A_RATE | {"weight_decay": 1e5}, "run")
    personal = WITHOUT_A_RATE | {"personal_rate": "random"}
    rate = parse_run(personal, "run").learning_rate
    config = parse_run(personal | {"personal_rate_amplitude": rate / 4}, "run")
    assert (config.learning_rate, config.rate_amplitude) == (rate, rate / 4)
    with pytest.raises(ConfigError, match=f"must be below learning_rate = {rate}"):
        parse_run(personal | {"personal_rate_amplitude": rate}, "run")


def test_own_rates_are_compared_with_the_default_rate() -> None:
    own = {"personal_rate": "random", "personal_rate_amplitude": 1e-5}
    run = parse_run(WITHOUT_A_RATE | own, "run")
    assert run.personal_rate_amplitude == 1e-5 < run.learning_rate
    with pytest.raises(ConfigError, match=r"must be below learning_rate = 0\.\d"):
        parse_run(WITHOUT_A_RATE | own | {"personal_rate_amplitude": 1.0}, "run")


@pytest.mark.parametrize("written", [False, "false"])
def test_plain_steps_need_a_rate(written: object) -> None:
    plain = WITHOUT_A_RATE | {"normalized_step": written}
    with pytest.raises(ConfigError, match=r"run: learning_rate is missing.*fedmezo probe"):
        parse_run(plain, "run")
    assert not parse_run(plain, "run", rate_comes_later=True).normalized_step


@pytest.mark.parametrize(
    "model", ["tiny", "my base", 'a "b" \\', "модель", "llama-\U0001f999", "a\nb"]
)
def test_the_line_that_names_a_copy_is_what_a_worker_reads(model: str) -> None:
    line, _, _ = how_to_name_a_copy(model).partition(" under [models]")
    assert "\n" not in line
    assert tomllib.loads(f"[models]\n{line}") == {"models": {model: "FOLDER"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": True}, "run: rounds = true is not allowed: use a number."),
        ({"learning_rate": False}, "run: learning_rate = false is not allowed: use a number."),
        (with_task(tokens_max=True), "run: task.tokens_max = true is not allowed"),
    ],
)
def test_true_is_no_number(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(VALUES | changes, "run")
    assert str(caught.value).startswith(said)


def test_a_rate_that_nobody_can_mean() -> None:
    with pytest.raises(ConfigError, match="run: learning_rate = 1e\\+300 is not allowed: use 1e"):
        parse_run(VALUES | {"learning_rate": 1e300}, "run")
    begun = parse_run(VALUES, "run").model_copy(update={"learning_rate": 1e300})
    assert parse_run(begun.model_dump(), "run", begun).learning_rate == 1e300

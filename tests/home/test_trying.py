"""`fedmezo generate` and `fedmezo evaluate` on what an export wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmezo_core import program
from fedmezo_core.errors import ConfigError, DataError, FedMezoError, ModelError
from fedmezo_core.program import LongStep
from fedmezo_core.zo.model.run_file import RUN_FILE, read_run_file
from tests.home.conftest import ROUNDS, FinishedRun, invoked
from tests.integration.support.harness import TASK, toml_of

pytestmark = pytest.mark.slow

Exported = Callable[..., Path]


def evaluated(folder: Path, rows: Path, *more: str | Path) -> dict[str, Any]:
    said = invoked("evaluate", folder, "--data", rows, "--threads", "1", "--format", "json", *more)
    values: dict[str, Any] = json.loads(said)
    return values


def test_a_full_model_has_exactly_the_runs_own_result(
    full_run: FinishedRun, exported: Exported
) -> None:
    last = full_run.evaluations[-1]
    found = evaluated(exported(full_run), full_run.heldout)
    assert (found["loss"], found["accuracy"], found["auc"], found["row_count"]) == (
        last.loss,
        last.accuracy,
        last.auc,
        last.rows,
    )


def test_an_adapter_has_exactly_the_runs_own_result_and_merged_weights_the_same_accuracy(
    lora_run: FinishedRun, exported: Exported
) -> None:
    last = lora_run.evaluations[-1]
    assert last.loss != lora_run.evaluations[0].loss
    alone = exported(lora_run, "--as", "adapter")
    found = evaluated(alone, lora_run.heldout, "--model", lora_run.model)
    assert (found["loss"], found["accuracy"]) == (last.loss, last.accuracy)
    merged = evaluated(exported(lora_run, name="merged"), lora_run.heldout)
    # The sum of base and adapter is rounded once more.
    assert merged["accuracy"] == last.accuracy
    assert merged["loss"] == pytest.approx(last.loss, abs=1e-5)


def test_any_round(full_run: FinishedRun, exported: Exported) -> None:
    folder = exported(full_run, "--round", "1")
    assert evaluated(folder, full_run.heldout)["loss"] == full_run.evaluations[1].loss
    run = read_run_file(folder)
    assert run is not None
    assert (run.round, [one.round for one in run.evaluations]) == (1, [0, 1])


def test_a_base_is_evaluated_with_the_coordinators_file(full_run: FinishedRun) -> None:
    found = evaluated(full_run.model, full_run.heldout, "--config", full_run.config)
    assert found["loss"] == full_run.evaluations[0].loss


def test_a_classification_answers_with_a_class(full_run: FinishedRun, exported: Exported) -> None:
    folder = exported(full_run)
    said = json.loads(invoked("generate", folder, "A gripping film.", "--format", "json"))
    shares = said["probabilities"]
    assert shares.keys() == TASK["verbalizers"].keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert said["label"] == max(shares, key=shares.get)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("Review: A gripping film. It was", return_tensors="pt").input_ids
    words = [tokenizer(word).input_ids[0] for word in TASK["verbalizers"].values()]
    with torch.inference_mode():
        wanted = model(ids).logits[0, -1, words].double().softmax(-1).tolist()
    assert list(shares.values()) == pytest.approx(wanted, abs=1e-6)
    assert invoked("generate", folder, "A gripping film.").startswith(f"{said['label']} (negative")


def test_a_text_goes_on_as_transformers_says(full_run: FinishedRun, exported: Exported) -> None:
    folder = exported(full_run)
    flags = ["--raw", "--tokens-max", "5"]
    text = json.loads(invoked("generate", folder, "The plot", *flags, "--format", "json"))["text"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The plot", return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert text == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert invoked("generate", folder, "The plot", *flags) == f"{text}\n"


def test_instructions_of_several_columns(full_run: FinishedRun, tmp_path: Path) -> None:
    task = {"kind": "instruction", "template": "{question} {context} ->", "tokens_max": 32}
    config = tmp_path / "c.toml"
    config.write_text(toml_of({"run": {"run_id": "r", "model": "m", "task": task}}))
    flags = ["--config", str(config), "--tokens-max", "3"]
    row = json.dumps({"question": "The plot", "context": "is bad"})
    said = invoked("generate", full_run.model, row, *flags)
    assert said == invoked("generate", full_run.model, "The plot is bad ->", "--raw", *flags)
    for wrong in ("The plot", '{"question": "The plot"}', "[1]"):
        with pytest.raises(ConfigError, match="has the columns question, context; give a JSON"):
            invoked("generate", full_run.model, wrong, *flags)


def test_what_takes_long_says_how_far_it_is(
    full_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[LongStep] = []
    monkeypatch.setattr(program, "_show_step", lambda step, _over: shown.append(step))
    out, base = tmp_path / "out", full_run.model
    invoked("export", out, "--journal", full_run.journal, "--model", base, "--threads", "1")
    assert [step.what for step in shown] == [
        "reading the journal",
        "compiling kernels",
        f"loading {base}",
        f"digesting {base}",
        f"replaying rounds 1 to {ROUNDS}",
        "digesting the weights",
        f"writing {out}",
    ]
    shown.clear()
    evaluated(out, full_run.heldout)
    rows = full_run.heldout
    assert [step.what for step in shown] == [
        f"loading {out}",
        f"reading {rows}",
        f"turning the rows of {rows} into tokens",
        "evaluating",
    ]
    assert shown[-1].counted == "10 of 10 rows"


def test_wrong_inputs(
    full_run: FinishedRun, lora_run: FinishedRun, exported: Exported, tmp_path: Path
) -> None:
    folder = exported(full_run)
    with pytest.raises(ConfigError, match=f"has no {RUN_FILE}, so nothing says how"):
        invoked("generate", full_run.model, "text")
    with pytest.raises(ConfigError, match=r"--model is for an exported adapter, and .* is none"):
        invoked("generate", folder, "text", "--model", full_run.model)
    with pytest.raises(DataError, match="The text is empty"):
        invoked("generate", folder, "", "--raw")
    with pytest.raises(DataError, match="the model knows 64 positions, so there is no place"):
        invoked("generate", folder, "bad " * 64, "--raw")
    invoked("generate", folder, "bad " * 10, "--raw", "--tokens-max", "4000")
    with pytest.raises(ConfigError, match="'gpu' is no device"):
        invoked("generate", folder, "text", "--device", "gpu")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "neutral"}\n')
    with pytest.raises(DataError, match="label 'neutral' is not among"):
        evaluated(folder, rows)
    with pytest.raises(FedMezoError, match=r"There is no folder .*nowhere"):
        evaluated(tmp_path / "nowhere", rows, "--config", full_run.config)
    alone = exported(lora_run, "--as", "adapter", name="alone")
    with pytest.raises(FedMezoError, match="q_proj"):
        evaluated(alone, lora_run.heldout, "--model", tmp_path / "exported", "--batch-size", "2")
    for text in ("{", '{"version": 2}', "[]"):
        (folder / RUN_FILE).write_text(text)
        with pytest.raises(ModelError, match=RUN_FILE):
            invoked("generate", folder, "text")


def test_the_card(full_run: FinishedRun, lora_run: FinishedRun, exported: Exported) -> None:
    folder = exported(full_run)
    metadata = metadata_load(folder / "README.md")
    assert metadata is not None
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["pipeline_tag"] == "text-generation"
    card = (folder / "README.md").read_text()
    last = full_run.evaluations[-1]
    best = min(full_run.evaluations, key=lambda one: one.loss)
    run = read_run_file(folder)
    assert run is not None
    for part in (
        "| Workers | 2, with 48 rows together |",
        f"| Round | {ROUNDS} of {ROUNDS} |",
        f"| {best.round} (best) | {best.loss:.4f} |",
        f"| `learning_rate` | {run.contract.learning_rate:g} |",
        f"`{last.weights_digest.hex()}`",
        f"--round {ROUNDS} --out FOLDER",
        "does not know how much of their privacy",
    ):
        assert part in card, part
    assert run.contract.task.template == TASK["template"]
    assert run.weights_digest == last.weights_digest.hex()
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"clinic-a" not in content
        assert str(full_run.journal.parent).encode() not in content
    alone = exported(lora_run, "--as", "adapter", name="alone")
    assert "| Workers | 2 |" in (alone / "README.md").read_text()
    adapter = metadata_load(alone / "README.md")
    assert adapter is not None
    assert (adapter["library_name"], adapter["base_model_relation"]) == ("peft", "adapter")


# peft itself still asks transformers for something deprecated.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_code_in_the_card_works(
    full_run: FinishedRun, lora_run: FinishedRun, exported: Exported
) -> None:
    for run, kind in ((full_run, "model"), (lora_run, "adapter")):
        folder = exported(run, "--as", kind, name=kind)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        kept = read_run_file(folder)
        assert kept is not None
        code = code.replace("FOLDER", str(folder)).replace(
            f'"{kept.contract.model}"', f'"{run.model}"'
        )
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["model"].config.vocab_size == 384
        base = ("--model", run.model) if kind == "adapter" else ()
        said = invoked("generate", folder, "A gripping film.", *base, "--format", "json")
        assert names["label"] == json.loads(said)["label"]

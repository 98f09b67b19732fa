"""Presets: what they fill in, what wins, and which layers their words mean in a model."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fedmezo
from fedmezo.presets import PRESETS, Preset, parse_contract, preset_toml, with_preset
from fedmezo_coordinator.coordinator_settings import CoordinatorSettings, check_same_run
from fedmezo_coordinator.programs.fedmezo_command import main
from fedmezo_core.config import LoraConfig, RunConfig
from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.layered_settings import load_settings
from fedmezo_core.zo.model.selection import with_places_named

SHORT = """
model = "{model}"
heldout = "{heldout}"
[run]
run_id = "reviews"
preset = "classification"
workers_min = 4
[run.task]
template = "{{text}} It was"
verbalizers = {{ negative = " terrible", positive = " great" }}
"""
TASK = {"template": "{text} It was", "verbalizers": {"no": " bad", "yes": " good"}}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_each_preset_makes_a_contract_of_a_name_and_a_task(preset: Preset) -> None:
    given: dict[str, Any] = {"run_id": "r", "model": "m", "preset": preset.name, "task": TASK}
    config = parse_contract(given, "here")
    assert config.rounds == preset.values["rounds"]
    assert config.task.template == TASK["template"]
    assert config.task.tokens_max == 64


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_what_show_prints_stands_for_the_preset(preset: Preset) -> None:
    run = tomllib.loads(preset_toml(preset))["run"]
    assert run == preset.values
    assert all(len(line) <= 100 for line in preset_toml(preset).splitlines())


def test_what_is_given_wins_key_by_key() -> None:
    given = {
        "preset": "classification",
        "rounds": 7,
        "lora": {"rank": 4},
        "task": {**TASK, "tokens_max": 99},
    }
    values = with_preset(given)
    assert (values["rounds"], values["probes"]) == (7, 28)
    assert (values["lora"]["rank"], values["lora"]["target_modules"]) == (4, ["last-up"])
    assert values["task"] == {"kind": "classification", **TASK, "tokens_max": 99}
    assert "preset" not in values
    assert with_preset({"preset": "classification"})["rounds"] == 50, "the preset itself changed"


def test_modules_to_train_take_the_place_of_the_adapter() -> None:
    assert "lora" not in with_preset({"preset": "classification", "train": ["norm"]})


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
@pytest.mark.parametrize("written", [True, "true"])
def test_secure_aggregation_takes_the_place_of_what_needs_single_answers(
    preset: Preset, written: bool | str
) -> None:
    given: dict[str, Any] = {"run_id": "r", "model": "m", "preset": preset.name, "task": TASK}
    config = parse_contract(given | {"secure_aggregation": written}, "here")
    assert (config.secure_aggregation, config.seed_policy) == (True, "shared")
    assert config.workers_min == config.secure_cohort_min
    assert (config.rounds, config.report_losses) == (preset.values["rounds"], False)
    # What is written is never changed silently.
    with pytest.raises(ConfigError, match="set report_losses to false"):
        parse_contract(given | {"secure_aggregation": True, "report_losses": True}, "here")


def test_a_rate_follows_from_the_contract_unless_one_is_given() -> None:
    def rate(**more: Any) -> float:
        return parse_contract({"run_id": "r", "model": "m", "task": TASK} | more, "h").learning_rate

    slow = rate(preset="classification-fast", rounds=120, workers_min=4)
    assert rate(preset="classification-fast", rounds=30, workers_min=4) == pytest.approx(
        2 * slow, rel=0.05
    )
    # The experiment's rate was 3 for its 64 directions.
    assert rate(preset="classification-fast", workers_min=4) == pytest.approx(3, rel=0.05)
    assert rate(preset="classification-fast", learning_rate=0.3) == 0.3


def test_an_unknown_preset_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no preset 'fast'; the presets are classification, "):
        with_preset({"preset": "fast"})
    with pytest.raises(ConfigError, match="a value that is no text"):
        with_preset({"preset": 3})


def settings_of(tmp_path: Path, text: str) -> CoordinatorSettings:
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    return load_settings(CoordinatorSettings, ["--config", str(path)], program="test")


def test_a_run_that_has_begun_keeps_what_its_preset_said_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, SHORT.format(model="m", heldout="h"))
    config = settings.run_config("here")
    assert config.lora is not None
    named = config.lora.model_copy(update={"target_modules": ("h.11.mlp.c_fc",)})
    begun = config.model_copy(update={"lora": named, "probes": 17})
    check_same_run("j", begun, settings.run, "here")
    # What the user wrote still counts, and so does what the word means no longer.
    for changed in ({"workers_min": 5}, {"task": {"tokens_max": 32}}, {"lora": {"rank": 2}}):
        with pytest.raises(ConfigError, match="belongs to a run with"):
            check_same_run("j", begun, settings.run | changed, "here")
    monkeypatch.setattr("fedmezo.presets.PRESETS", ())
    check_same_run("j", begun, settings.run, "here")


@pytest.mark.parametrize("place", ["above", "[run.task]"])
def test_a_preset_in_another_table_is_sent_where_it_belongs(tmp_path: Path, place: str) -> None:
    text = SHORT.replace('preset = "classification"\n', "")
    line = 'preset = "classification"\n'
    text = line + text if place == "above" else text + line
    with pytest.raises(ConfigError, match=r"preset belongs below \[run\], not (above|below)"):
        settings_of(tmp_path, text.format(model="m", heldout="h"))


def test_a_word_in_the_settings_means_what_the_journal_has(tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 2, "target_modules": ["last-up"]}
    asked = {"run_id": "r", "model": "m", "task": TASK, "lora": lora}
    begun = parse_contract(asked | {"lora": lora | {"target_modules": ["h.1.mlp.c_fc"]}}, "here")
    check_same_run("j", begun, asked, "here")


def small(kind: str, layers: int) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    if kind == "gemma":
        return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=8))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_the_words_for_places_mean_layers_of_any_family() -> None:
    def named(model: Any, word: str) -> tuple[str, ...]:
        lora = LoraConfig(rank=2, alpha=2, target_modules=(word,))
        return with_places_named(model, lora).target_modules

    for kind in ("llama", "gemma"):
        model = small(kind, 6)
        assert named(model, "last-up") == ("model.layers.5.mlp.up_proj",)
        assert named(model, "last-down") == ("model.layers.5.mlp.down_proj",)
        assert named(model, "deep-up") == ("model.layers.4.mlp.up_proj",)
        assert named(model, "deep-values") == ("model.layers.4.self_attn.v_proj",)
    large = small("llama", 30)
    for word, name in (("deep-up", "mlp.up_proj"), ("deep-values", "self_attn.v_proj")):
        deep = tuple(f"model.layers.{layer}.{name}" for layer in range(20, 28))
        assert named(large, word) == deep
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=6, n_head=2, vocab_size=32))
    assert named(gpt2, "deep-values") == ("transformer.h.4.attn.c_attn",)
    assert named(small("llama", 2), "q_proj") == ("q_proj",)


def test_a_model_without_such_a_layer_is_refused() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    lora = LoraConfig(rank=2, alpha=2, target_modules=("last-up",))
    with pytest.raises(ModelError, match="no layer that is meant by last-up; write the names"):
        with_places_named(Flat(), lora)


def test_a_genesis_holds_the_layers_own_names(model_folder: Path) -> None:
    """The family here is GPT-2, whose layers have other names and transposed weights."""
    contract = {"run_id": "r", "model": "tiny", "preset": "classification", "task": TASK}
    genesis = fedmezo.begin_run(contract | {"lora": {"rank": 2}}, model_folder, threads=1)
    assert isinstance(genesis.config, RunConfig)
    assert genesis.config.lora is not None
    assert genesis.config.lora.target_modules == ("transformer.h.0.mlp.c_fc",)
    # B alone: [64, 2].
    assert genesis.trainable_elements == 128


def test_the_command_lists_and_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["fedmezo", "presets", *arguments])
        assert main() == 0
        return capsys.readouterr().out

    assert "classification-fast\n  " in said()
    assert tomllib.loads(said("--show", "instruction"))["run"]["batch_size"] == 4
    shown = json.loads(said("--format", "json"))
    assert [one["name"] for one in shown["presets"]] == [preset.name for preset in PRESETS]
    monkeypatch.setattr("sys.argv", ["fedmezo", "presets", "--show", "x"])
    assert main() == 2
    assert "no preset 'x'" in capsys.readouterr().err

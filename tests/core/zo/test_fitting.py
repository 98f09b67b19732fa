"""Adapters fitted to texts: A whitens what a module sees, and only B is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedmezo_coordinator.programs import fedmezo_command as client_cli
from fedmezo_core.config import RunConfig, TaskConfig, parse_run
from fedmezo_core.errors import ConfigError, DataError
from fedmezo_core.journal.codec import decode_record, encode_record
from fedmezo_core.zo.data.rows import Example, read_examples
from fedmezo_core.zo.fitting import fit_adapter
from fedmezo_core.zo.party import Party, open_party
from tests.integration.support.parties import save_model, write_rows

TASK = {"template": "{text} It was", "verbalizers": {"negative": " bad", "positive": " good"}}


def _config(**lora: Any) -> RunConfig:
    adapter = {"rank": 4, "alpha": 4, "target_modules": ["c_fc"], "freeze_a": True} | lora
    return parse_run({"run_id": "fit", "model": "m", "task": TASK, "lora": adapter}, "here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "model"
    save_model(path)
    return path


def _rows(tmp_path: Path, count: int = 60) -> list[Example]:
    return read_examples(write_rows(tmp_path / "rows.jsonl", count=count), ("text", "label"))


def _layer(party: Party) -> Any:
    [layer] = [m for _, m in party.loaded.model.named_modules() if hasattr(m, "lora_A")]
    return layer


def test_fitted_inputs_of_b_are_uncorrelated_and_of_unit_size(folder: Path, tmp_path: Path) -> None:
    party = open_party(_config(), str(folder), threads=1)
    assert [entry.name.split(".")[-3] for entry in party.loaded.manifest] == ["lora_B"]
    rows = _rows(tmp_path)
    fit_adapter(party, rows)
    seen: list[torch.Tensor] = []
    layer = _layer(party)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, -1]))
    for example in party.task.encode(rows).examples:
        party.task.loss(party.loaded.model, party.task.collate([example], "one"))
    handle.remove()
    features = torch.cat(seen).double() @ layer.lora_A["default"].weight.double().T
    moments = features.T @ features / len(features)
    assert torch.allclose(moments, torch.eye(4).double(), atol=2e-2)
    assert not layer.lora_B["default"].weight.any(), "the model computes what it did"


def test_a_run_begins_from_the_command_s_adapter_and_trains_b_alone(
    folder: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "coordinator.toml"
    head = f'model = "{folder}"\n[run]\nrun_id = "fit"\n[run.task]\n'
    task = (
        'template = "{text} It was"\n'
        '[run.task.verbalizers]\nnegative = " bad"\npositive = " good"\n'
        '[run.lora]\nrank = 4\nalpha = 4\ntarget_modules = ["c_fc"]\nfreeze_a = true\n'
    )
    settings.write_text(head + task)
    data = write_rows(tmp_path / "rows.jsonl", count=60)
    adapter = tmp_path / "adapter"
    flags = ["--config", str(settings), "--data", str(data), "--threads", "1"]
    refused = CliRunner().invoke(client_cli.app, ["adapter", str(adapter), *flags])
    assert "tokens_max = 256 is more than the 64 positions of model" in str(refused.exception)
    assert not adapter.exists()
    # The rate is measured later, with the adapter.
    head = head.replace('"fit"\n', '"fit"\nnormalized_step = false\n')
    settings.write_text(f"{head}tokens_max = 64\n{task}")
    taken = CliRunner().invoke(client_cli.app, ["adapter", str(adapter), *flags])
    assert taken.exit_code == 0, taken.output
    assert "rank 4 fitted to 60 rows" in taken.output
    plain = open_party(_config(), str(folder), threads=1)
    fitted = open_party(_config(), str(folder), adapter=adapter, threads=1)
    assert plain.manifest_digest == fitted.manifest_digest
    assert plain.base_digest != fitted.base_digest, "a party without it is refused"
    record = fitted.genesis()
    assert decode_record(encode_record(record)) == record


def test_what_cannot_be_fitted_is_refused_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    party = open_party(_config(rank=8), str(folder), threads=1)
    with pytest.raises(DataError, match=r"3 positions of 16 inputs at .* rank 8; give more rows"):
        fit_adapter(party, _rows(tmp_path, count=3))
    task = TaskConfig.model_validate(TASK)
    whole = open_party(RunConfig(run_id="x", model="m", task=task), str(folder), threads=1)
    with pytest.raises(ConfigError, match="no adapter to fit"):
        fit_adapter(whole, _rows(tmp_path))

"""What cannot be exported is refused before anything is written; the command prints the name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedmezo_coordinator.programs import fedmezo_command
from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.zo.edge.base_form import read_form
from fedmezo_core.zo.edge.edge_export import export_gguf_form, export_onnx_form
from fedmezo_core.zo.party import open_party
from tests.core.zo.edge.conftest import admitting, contract


def test_a_folder_in_use_and_a_missing_file_are_refused(base_folder: Path, tmp_path: Path) -> None:
    party = open_party(contract(), str(base_folder), threads=1)
    with pytest.raises(ModelError, match="cannot be copied"):
        export_gguf_form(party, tmp_path / "form", tmp_path / "none.gguf")
    assert not (tmp_path / "form").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_gguf_form(party, tmp_path / "used", tmp_path / "none.gguf")


def test_a_file_that_is_no_gguf_is_refused(base_folder: Path, tmp_path: Path) -> None:
    party = open_party(contract(), str(base_folder), threads=1)
    file = tmp_path / "notes.txt"
    file.write_text("GGU")
    with pytest.raises(ModelError, match=r"notes\.txt is no GGUF; give a GGUF of the same base"):
        export_gguf_form(party, tmp_path / "form", file)
    assert not (tmp_path / "form").exists()


def test_a_graph_of_sixteen_bits_is_refused(base_folder: Path, tmp_path: Path) -> None:
    party = open_party(contract(dtype="bfloat16"), str(base_folder), threads=1)
    with pytest.raises(ConfigError, match="has bfloat16; begin a run with float32, or export a"):
        export_onnx_form(party, tmp_path / "form")


@pytest.mark.parametrize("change", ["vocabulary", "layers", "width", "architecture", "end"])
def test_a_gguf_of_another_shape_is_refused(
    base_folder: Path, base_gguf: Path, tmp_path: Path, change: str
) -> None:
    """Where it is exported, not at each worker that loads it."""
    from benchmarks.integrations.gguf_models import Shape, write_random

    shape = Shape("llama", 2, 32, 64, 4, 2, 384, 128, 1e4)
    other, sentence = {
        "vocabulary": (replace(shape, vocabulary=416), "has 416 tokens, the run's base 384"),
        "layers": (replace(shape, layers=1), r"blk\.1\.attn_q\.weight has 0 inputs, the run's"),
        "width": (replace(shape, width=64), r"blk\.0\.attn_q\.weight has 64 inputs, the run's"),
        "architecture": (replace(shape, architecture="gemma3"), "architecture gemma3 cannot take"),
        "end": (shape, "cannot be read"),
    }[change]
    file = tmp_path / "other.gguf"
    write_random(other, file)
    if change == "end":
        file.write_bytes(file.read_bytes()[:900])
    party = open_party(contract(), str(base_folder), threads=1)
    with pytest.raises(ModelError, match=sentence):
        export_gguf_form(party, tmp_path / "form", file)
    assert not (tmp_path / "form").exists()


def test_the_same_base_gives_the_same_form(
    base_folder: Path, base_gguf: Path, tmp_path: Path
) -> None:
    file = base_gguf
    party = open_party(contract(), str(base_folder), threads=1)
    names = {export_gguf_form(party, tmp_path / name, file) for name in "ab"}
    assert len(names) == 1
    other = open_party(contract(seed=2), str(base_folder), threads=1)
    assert export_gguf_form(other, tmp_path / "c", file) not in names, "another adapter"


def test_the_command_prints_what_the_contract_lists(
    base_folder: Path,
    base_gguf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, config = base_gguf, tmp_path / "coordinator.toml"
    config.write_text(
        f"""model = {json.dumps(str(base_folder))}
journal = {json.dumps(str(tmp_path / "run.journal"))}
[run]
run_id = "r"
[run.task]
template = "{{text}} All in all, it was"
verbalizers = {{"0" = " terrible", "1" = " great"}}
[run.lora]
rank = 4
alpha = 16
target_modules = ["q_proj", "v_proj"]
freeze_a = true
"""
    )
    arguments = [
        "export-form",
        str(tmp_path / "form"),
        "--config",
        str(config),
        "--gguf",
        str(file),
    ]
    monkeypatch.setattr(sys, "argv", ["fedmezo", *arguments, "--threads", "1"])
    assert fedmezo_command.main() == 0
    printed = capsys.readouterr().out
    name = printed.split('base_forms = ["')[1].split('"]')[0]
    party = admitting(open_party(contract(), str(base_folder), threads=1), name)
    assert read_form(tmp_path / "form", party.genesis()).name == name

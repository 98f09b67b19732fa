"""Loading models: the same bits everywhere, or one clear sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedmezo_core.config import LoraConfig
from fedmezo_core.errors import ConfigError, ModelError
from fedmezo_core.zo.commits import Commit
from fedmezo_core.zo.materialize import materialize
from fedmezo_core.zo.model import loading
from fedmezo_core.zo.model.loading import adapter_seed, load_model
from fedmezo_core.zo.model.manifest import manifest_of, trained_tensors
from fedmezo_core.zo.model.weight_digest import base_digest, tokenizer_digest
from fedmezo_core.zo.noise import Distribution, Operands, Rounding

LORA = LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))


@pytest.fixture
def folder(tmp_path: Path, folder_of: Callable[[str], Path]) -> Path:
    """A copy of a small model's folder that a test may spoil."""
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "model"))


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "opt"])
def test_a_folder_loads_to_the_saved_bits(
    kind: str,
    folder_of: Callable[[str], Path],
    model_of: Callable[[str], nn.Module],
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = str(folder_of(kind))
    capfd.readouterr()
    loaded = load_model(path)
    assert base_digest(loaded.model) == base_digest(model_of(kind))
    assert loaded.manifest == manifest_of(loaded.model)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    again = load_model(path)
    assert tokenizer_digest(again.tokenizer) == tokenizer_digest(loaded.tokenizer)
    assert capfd.readouterr() == ("", ""), "loading is silent"


def test_bfloat16(folder_of: Callable[[str], Path]) -> None:
    loaded = load_model(str(folder_of("llama")), dtype="bfloat16")
    assert {entry.dtype for entry in loaded.manifest} == {"bfloat16"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_starts_at_the_same_bits_at_every_party(
    dtype: Any, folder_of: Callable[[str], Path]
) -> None:
    path = str(folder_of("llama"))
    torch.manual_seed(1)
    one = load_model(path, dtype=dtype, lora=LORA, run_seed=5)
    torch.manual_seed(2)
    two = load_model(path, dtype=dtype, lora=LORA, run_seed=5)
    other = load_model(path, dtype=dtype, lora=LORA, run_seed=6)
    assert base_digest(one.model) == base_digest(two.model) != base_digest(other.model)
    for entry, tensor in zip(one.manifest, trained_tensors(one.model, one.manifest), strict=True):
        assert entry.dtype == "float32", "peft keeps adapters in float32"
        if ".lora_B." in entry.name:
            assert not tensor.any()
            continue
        expected = torch.zeros(entry.shape)
        materialize(
            expected,
            expected,
            [
                Commit(
                    np.array([adapter_seed(5)], dtype=np.uint64),
                    np.array([1 / np.sqrt(3 * 32)], dtype=np.float32),
                    0,
                )
            ],
            Operands(entry.tensor_id, Distribution.GAUSSIAN, Rounding.NEAREST),
        )
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_head_multiplies_all_rows_at_once(
    lora: LoraConfig | None, folder_of: Callable[[str], Path]
) -> None:
    """torch takes a slice of positions row by row, in bfloat16 with a copy of the weight for
    each."""
    model: Any = load_model(str(folder_of("llama")), lora=lora).model
    seen: list[bool] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        last = model(input_ids=ids, logits_to_keep=1).logits
        assert torch.allclose(last, model(input_ids=ids).logits[:, -1:], atol=1e-5)
    assert seen == [True, True]


def test_lora_with_zero_b_changes_nothing(folder_of: Callable[[str], Path]) -> None:
    ids = torch.arange(12)[None]
    path = str(folder_of("gpt2"))
    lora = LoraConfig(rank=2, alpha=4, target_modules=("c_attn",))
    with torch.inference_mode():
        plain = load_model(path).model(ids).logits
        adapted = load_model(path, lora=lora).model(ids).logits
    assert torch.equal(plain, adapted)


def test_lora_targets_that_do_not_fit(folder: Path) -> None:
    for target, sentence in (
        ("wrong", r"no module wrong; its linear layers are .*q_proj"),
        ("embed_tokens", "embed_tokens is no linear layer"),
        ("layers.3.mlp.up_proj", r"no module layers\.3\.mlp\.up_proj; its linear"),
        (r".*layers\.1\.mlp", r"is no linear layer \(model\.layers\.1\.mlp\)"),
        (r"up_(proj)", r"no module whose whole name matches the regular expression up_\(proj\)"),
        (r"up_(proj", r"up_\(proj is no regular expression \(missing \)"),
    ):
        lora = LoraConfig(rank=2, alpha=4, target_modules=(target,))
        with pytest.raises(ConfigError, match=sentence):
            load_model(str(folder), lora=lora)
    lora = LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "one", "v_proj", "two"))
    with pytest.raises(ConfigError, match=r"no module one, two; its linear"):
        load_model(str(folder), lora=lora)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            ["layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"],
            r"1\.self_attn\.q|0\.mlp\.up",
        ),
        (r".*\.1\.mlp\.(up|down)_proj", r"1\.mlp\.(up|down)"),
        ("q_proj", r"\d\.self_attn\.q"),
        ("all-linear", r"\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))"),
    ],
)
def test_lora_targets_as_in_peft(
    targets: list[str] | str, expected: str, folder_of: Callable[[str], Path]
) -> None:
    lora = LoraConfig.model_validate({"rank": 128, "alpha": 256, "target_modules": targets})
    loaded = load_model(str(folder_of("llama")), lora=lora)
    found = {
        re.sub(r"^base_model\.model\.model\.layers\.|_proj\.lora_.*", "", entry.name)
        for entry in loaded.manifest
    }
    linear = {
        f"{layer}.{name}"
        for layer in "01"
        for name in (*(f"self_attn.{p}" for p in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }  # fmt: skip
    assert found == {name for name in linear if re.fullmatch(expected, name)}
    assert {entry.shape[0] for entry in loaded.manifest if ".lora_A." in entry.name} == {128}
    module: Any = loaded.model.get_submodule("base_model.model.model.layers.1")
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_only_named_modules_are_trained(folder_of: Callable[[str], Path]) -> None:
    loaded = load_model(str(folder_of("llama")), train=("layers.1",))
    assert len(loaded.manifest) == 9
    assert all(entry.name.startswith("model.layers.1.") for entry in loaded.manifest)
    with pytest.raises(ConfigError, match=r"train: the model has no module layers\.2;"):
        load_model(str(folder_of("llama")), train=("layers.1", "layers.2"))


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    def refuses(path: Path, sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence) as caught:
            load_model(str(path))
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")

    refuses(tmp_path / "absent", "no model folder")
    refuses(folder / "config.json", "is a file")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", r"no config\.json")

    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    refuses(folder, r"no weights: no \.safetensors file")
    torch.save({}, folder / "pytorch_model.bin")
    refuses(folder, "pickle files")
    weights.write_bytes(kept[: len(kept) // 2])
    refuses(folder, "cannot be loaded")
    weights.write_bytes(kept)

    config = json.loads((folder / "config.json").read_text())
    for broken in ("{", json.dumps(config | {"model_type": "unheard-of"})):
        (folder / "config.json").write_text(broken)
        refuses(folder, "cannot be loaded")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuses(folder, r"lacks 9 of the model's tensors.*model\.layers\.2")
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refuses(folder, "lacks|cannot be loaded")
    (folder / "config.json").write_text(json.dumps(config))
    load_model(str(folder))

    (folder / "adapter_config.json").write_text("{}")
    refuses(folder, "holds an adapter|cannot be loaded")
    (folder / "adapter_config.json").unlink()

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        refuses(folder, f"There is no tokenizer in {re.escape(str(folder))};")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_git_lfs_has_not_fetched(name: str, folder: Path) -> None:
    (folder / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    )
    path = re.escape(str(folder / name))
    with pytest.raises(ModelError, match=rf"^{path} is a Git LFS pointer: fetch the file"):
        load_model(str(folder))


def test_a_tokenizer_that_was_made_up(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of("gpt2"), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match="There is no tokenizer in "):
        load_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds a NaN or an inf"):
        load_model(str(folder))


def test_a_name_that_cannot_be_reached() -> None:
    with pytest.raises(
        ModelError, match=r"some-one/no-such-model cannot be loaded: it is no folder"
    ):
        load_model("some-one/no-such-model", local_files_only=True)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("some-one/no-such-model", "check the name and the network"),
        ("no-such-model", "if it is a folder at the coordinator, name your own copy"),
        ("not a name", "if it is a folder at the coordinator, name your own copy"),
    ],
)
def test_without_a_network_the_hub_is_asked_once(
    name: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[str] = []

    def nowhere(*_: Any, **__: Any) -> str:
        asked.append(name)
        return "http://127.0.0.1:9/config.json"

    monkeypatch.setattr(loading, "hf_hub_url", nowhere)
    monkeypatch.setattr(loading, "_auto_model", None)  # It would ask for a minute.
    with pytest.raises(ModelError, match=f"{advice}.* --model") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert len(asked) <= 1
    assert capfd.readouterr() == ("", "")
    assert not caplog.messages


def test_without_a_network_the_cache_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Model:
        @staticmethod
        def from_pretrained(source: str, **given: Any) -> None:
            seen.update(given, source=source)
            raise OSError("this test has no weights")

    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    monkeypatch.setattr(loading, "hf_hub_url", lambda *_: "http://127.0.0.1:9/config.json")
    monkeypatch.setattr(loading, "_auto_model", Model)
    with pytest.raises(ModelError, match="this test has no weights"):
        load_model("some-one/a-model")
    assert (seen["source"], seen["local_files_only"]) == ("/cache", True)


def test_a_name_that_no_folder_can_have_is_refused_like_one_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="The model aaa"):
        load_model("a" * 300, local_files_only=True)

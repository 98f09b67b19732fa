"""The worker's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmezo_core.errors import ConfigError
from fedmezo_core.layered_settings import load_settings
from fedmezo_worker.worker_settings import WorkerSettings

GIVEN = {"--name": "w1", "--data": "rows.jsonl"}


def load(changes: dict[str, str] | None = None) -> WorkerSettings:
    flags = GIVEN | (changes or {})
    return load_settings(
        WorkerSettings,
        [f"{flag}={value}" for flag, value in flags.items() if value != "absent"],
        program="fedmezo-worker",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--name": "Worker 1"}, "name = 'Worker 1' is not allowed: use 1 to 64 of a-z, 0-9 and -"),
        ({"--name": "w1\n"}, "name = 'w1\\n' is not allowed"),
        ({"--name": ""}, "name is missing; set it"),
        ({"--name": "w" * 65}, "is not allowed: use 1 to 64"),
        ({"--name": "absent"}, "name is missing; set it"),
        ({"--data": "absent"}, "data is missing; set it"),
        ({"--coordinator": "here"}, "coordinator = 'here' is not allowed: write it as host:port"),
        ({"--coordinator": "here:0"}, "coordinator = 'here:0' is not allowed"),
        ({"--threads": "0"}, "threads = '0' is not allowed"),
        ({"--device": "gpu"}, "device = 'gpu' is not allowed: use auto, cpu, cuda, or cuda: and"),
        ({"--device-memory-max": "much"}, "device_memory_max = 'much' is not allowed"),
        ({"--device-memory-max": "0"}, "device_memory_max = '0' is not allowed: use more than 0"),
        (
            {"--base-form": "form", "--model": "m"},
            "base_form leaves no use for model; set only one of the two",
        ),
        ({"--join": "j", "--coordinator": "x:1"}, "coordinator has no meaning with join, which"),
        ({"--gpu-layers": "3"}, "gpu_layers is for a GGUF in base_form; set both, or use device"),
        ({"--frozen-base-bits": "2"}, "frozen_base_bits = '2' is not allowed: use 8 or 4"),
        ({"--evaluate-every-rounds": "0"}, "evaluate_every_rounds = '0' is not allowed"),
        (
            {"--evaluations": "here.jsonl"},
            "evaluations needs heldout, the rows to evaluate on; set both.",
        ),
        ({"--give-up-after-s": "-1"}, "give_up_after_s = '-1' is not allowed"),
        (
            {"--serve": "here.sock"},
            "serve needs model or base_form: no coordinator decides what is loaded",
        ),
        (
            {"--serve": "here.sock", "--model": "m", "--checkpoint-key": "0" * 64},
            "checkpoint_key has no meaning with serve",
        ),
        (
            {"--serve": "here.sock", "--model": "m", "--coordinator": "127.0.0.1:7465"},
            "coordinator has no meaning with serve",
        ),
        ({"--heldout": ""}, "heldout = '' is not allowed: it is empty: write a path, or leave it"),
        ({"--data": ""}, "data is not allowed: it is empty: name a file or folder of rows"),
        (
            {"--heldout": "own.csv", "--evaluations": "./own.csv"},
            "evaluations = 'own.csv' would be written among the rows of heldout",
        ),
        (
            {"--data": "rows", "--heldout": "own.csv", "--evaluations": "rows/found.jsonl"},
            "evaluations = 'rows/found.jsonl' would be written among the rows of data",
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_named(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changes)
    assert words in str(caught.value)


def test_the_environment_names_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMEZO_WORKER_NAME", "from-environment")
    monkeypatch.setenv("FEDMEZO_WORKER_GIVE_UP_AFTER_S", "5.5")
    settings = load({"--name": "absent"})
    assert (settings.name, settings.give_up_after_s) == ("from-environment", 5.5)


def test_where_to_compute() -> None:
    settings = load({"--device": "cuda:1", "--device-memory-max": "8GiB", "--offload-folder": "/d"})
    assert (settings.device, settings.device_memory_max) == ("cuda:1", 8 << 30)
    assert settings.offload_folder == Path("/d")
    assert load().device == "auto"
    assert load({"--frozen-base-bits": "4"}).frozen_base_bits == 4


def test_what_to_evaluate_on() -> None:
    assert (load().heldout, load().evaluate_every_rounds, load().evaluations) == (None, 10, None)
    settings = load({"--heldout": "own.csv", "--evaluations": "here.jsonl"})
    assert (settings.heldout, settings.evaluations) == (Path("own.csv"), Path("here.jsonl"))


@pytest.mark.parametrize(("said", "bytes_"), [("50MB", 50_000_000), ("1MiB", 1_048_576), ("0", 0)])
def test_a_download_rate_is_a_size_or_0(said: str, bytes_: int) -> None:
    assert load({"--download-rate": said}).download_rate == bytes_


def test_a_download_rate_below_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="download_rate"):
        load({"--download-rate": "-1"})

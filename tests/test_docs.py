"""The documents, the commands, the settings and the tree say the same things."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
from pydantic import BaseModel

from fedmezo.presets import parse_contract
from fedmezo_coordinator.coordinator_settings import (
    CoordinatorSettings,
    InitSettings,
    RelaySettings,
)
from fedmezo_coordinator.programs.fedmezo_command import app
from fedmezo_coordinator.programs.preflight.coordinator_preflight import (
    CoordinatorPreflightSettings,
)
from fedmezo_core.config import LoraConfig, RunConfig, TaskConfig
from fedmezo_worker.preflight.worker_preflight import WorkerPreflightSettings
from fedmezo_worker.worker_settings import WorkerSettings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
README_LINES_MAX = 150


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES_MAX


def test_every_command_is_documented() -> None:
    text = _text_of([README, *DOCS])
    group = typer.main.get_command(app)
    names: list[str] = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", {})
        names += [f"{name} {child}" for child in children] or [name]
    for name in names:
        assert f"fedmezo {name}" in text, f"no document names fedmezo {name}"


def test_every_make_target_is_documented_and_every_documented_one_exists() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    )
    documented = _make_targets_in(_text_of([README, ROOT / "docs/development.md"]))
    assert targets <= documented, f"not in docs/development.md: {targets - documented}"
    named = {
        name for name in _make_targets_in(_text_of(PAGES)) if not name.startswith("experiment-")
    }
    assert named <= targets, f"named in a document, but no target: {named - targets}"


def test_every_document_can_be_reached_from_the_index() -> None:
    index = ROOT / "docs/README.md"
    assert index in _linked_from(README)
    reached, waiting = {index}, [index]
    while waiting:
        for page in _linked_from(waiting.pop()) & set(DOCS):
            if page not in reached:
                reached.add(page)
                waiting.append(page)
    assert not set(DOCS) - reached, "no link leads to these from docs/README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in _links_in(page):
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if heading and file.suffix == ".md":
            assert heading in _headings_in(file), f"{page.name}: no heading #{heading} in {file}"


def test_the_glossary_is_linked_from_the_readme_and_the_proto_files() -> None:
    assert ROOT / "docs/glossary.md" in _linked_from(README)
    for proto in PROTOS:
        header = proto.read_text().split("syntax =")[0]
        assert "docs/glossary.md" in header, f"{proto.name} does not name the glossary at its top"


def test_the_glossary_names_the_messages_whose_names_differ() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text()
    for name in ("PairRun", "Checkpoint", "Origin", "SealedOrigin"):
        assert any(f"message {name} {{" in proto.read_text() for proto in PROTOS)
        assert f"`{name}`" in glossary


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    for model in (
        RunConfig,
        TaskConfig,
        LoraConfig,
        CoordinatorSettings,
        RelaySettings,
        WorkerSettings,
    ):
        for name in model.model_fields:
            assert f"`{name}`" in text, f"{model.__name__}.{name} is not in docs/configuration.md"


def test_limits_are_constants_of_the_modules_that_are_named() -> None:
    modules = [
        path for folder in ("fedmezo", "fedmezo_core", "coordinator") for path in _python_in(folder)
    ]
    text = (ROOT / "docs/limits.md").read_text()
    limits = re.findall(r"((?:`[A-Z_]+`, )+)([\w/]+\.py)", text)
    assert len(limits) > 10
    for names, module in limits:
        files = [path for path in modules if path.as_posix().endswith(f"/{module}")]
        assert files, f"docs/limits.md names {module}, which is not there"
        for name in re.findall(r"[A-Z_]+", names):
            assert any(re.search(rf"\b{name}\b", path.read_text()) for path in files), (
                f"docs/limits.md says that {name} is in {module}"
            )


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_document_names_are_there(page: Path) -> None:
    folders = (
        "benchmarks|coordinator|deploy|examples|experiments|fedmezo|fedmezo_core|integrations|proto|"
        "tests|worker"
    )
    for path in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is not there"


def test_the_coordinator_files_in_the_documents_are_valid() -> None:
    files = [
        tomllib.loads(block)
        for page in (README, ROOT / "docs/operating.md")
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]
    assert len(files) == 2
    for settings in files:
        run = settings.pop("run") | {"model": settings["model"]}
        parse_contract(run, "the document")
        assert settings.keys() <= CoordinatorSettings.model_fields.keys()


def _text_of(pages: list[Path]) -> str:
    return "\n".join(page.read_text() for page in pages)


def _make_targets_in(text: str) -> set[str]:
    """Targets in code: a line that begins with `make`, or a code span that does."""
    return set(re.findall(r"(?:^|`)make\s+([a-z][a-z-]*)", text, flags=re.MULTILINE))


def _links_in(page: Path) -> list[str]:
    """Link targets of a page that lead into this tree; images count, code does not."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def _linked_from(page: Path) -> set[Path]:
    names = [target.partition("#")[0] for target in _links_in(page)]
    return {(page.parent / name).resolve() for name in names if name}


def _headings_in(page: Path) -> set[str]:
    """Anchors of a page's headings, as hosts make them from the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def _python_in(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_contract_that_is_shown_is_the_demos() -> None:
    page = ROOT / "docs/operating.md"
    [shown] = re.findall(r"^```toml\n(listen.*?)^```", page.read_text(), re.M | re.S)
    settings = tomllib.loads((ROOT / "deploy/demo/demo.toml").read_text())
    run = tomllib.loads(shown)["run"]
    demo = settings["coordinator"]["run"] | {"learning_rate": settings["learning_rate"]}
    # What depends on the workers and the data, and what only the demo needs.
    own = {"run_id", "workers_min", "quorum", "deadline_ms", "report_losses", "digest_every_rounds"}
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    for name in demo.keys() - own - {"lora", "task"}:
        assert run.get(name, defaults[name]) == demo[name], name
    assert run["lora"].items() >= demo["lora"].items()
    for name in ("template", "tokens_max", "verbalizers"):
        assert run["task"][name] == demo["task"][name], name


DAEMONS: dict[str, type[BaseModel]] = {
    "fedmezo-coordinator": CoordinatorSettings,
    "fedmezo-coordinator init": InitSettings,
    "fedmezo-coordinator preflight": CoordinatorPreflightSettings,
    "fedmezo-relay": RelaySettings,
    "fedmezo-worker": WorkerSettings,
    "fedmezo-worker preflight": WorkerPreflightSettings,
}


def _commands_shown() -> list[str]:
    """Each command of ours that a document shows, without its comment."""
    shown = []
    for page in [README, *DOCS]:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            shown += [line.partition("  #")[0] for line in lines if line.startswith("fedmezo")]
    return sorted(set(shown))


@pytest.mark.parametrize("line", _commands_shown())
def test_every_command_that_is_shown_is_understood(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "fedmezo":
        command = typer.main.get_command(app)
        while children := getattr(command, "commands", None):
            program, command = f"{program} {words[0]}", children[words.pop(0)]
        command.make_context(program, words)  # It raises an error for what it does not know.
        return
    if words and f"{program} {words[0]}" in DAEMONS:
        program = f"{program} {words.pop(0)}"
    known = {f"--{name.replace('_', '-')}" for name in DAEMONS[program].model_fields}
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert flags <= known | {"--config"}, flags - known

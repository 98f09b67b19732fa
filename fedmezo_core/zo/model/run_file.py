"""The file in an exported folder that says which run it comes from, and how its rows look."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmezo_core.config import RunConfig, sentence_of
from fedmezo_core.errors import ModelError

RUN_FILE: Final = "fedmezo.json"
"""Name of the file."""
_BYTES_MAX: Final = 4 << 20
_DIGEST: Final = r"^[0-9a-f]{64}$"


class ExportedEvaluation(BaseModel):
    """The run's own held-out result of weights in its journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int = Field(ge=0)
    loss: float
    """In nats: over rows (classification) or response tokens (instruction)."""
    accuracy: float
    auc: float | None = None
    rows: int = Field(ge=0)


class RunFile(BaseModel):
    """What an export remembers of its run. It names no path, worker or machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    contract: RunConfig
    """The run's contract, with the template and the verbalizers of its rows."""
    round: int = Field(ge=0)
    """The round after whose commit the weights were taken."""
    head: str = Field(pattern=_DIGEST)
    """Head of the journal after that round, in hex."""
    weights_digest: str = Field(pattern=_DIGEST)
    """Digest of the trained weights after that round, in hex."""
    base_digest: str = Field(pattern=_DIGEST)
    """Digest of the base that the run began from, in hex."""
    evaluations: tuple[ExportedEvaluation, ...] = ()
    """The run's own evaluations up to that round, oldest first."""

    def write(self, folder: Path) -> None:
        """Write the file into `folder`; raises `OSError` where the system does."""
        text = self.model_dump_json(indent=1, exclude_none=True)
        (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def read_run_file(folder: Path) -> RunFile | None:
    """The run file in `folder`; None if there is none.

    Raises `ModelError` for one that cannot be read, or that another version wrote.
    """
    path = folder / RUN_FILE
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _BYTES_MAX:
            raise ModelError(f"{path} is too long for what an export writes; export again.")
        return RunFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except ValidationError as error:
        raise ModelError(
            f"{sentence_of(error, str(path))} It is not what this version's export writes; export "
            "again."
        ) from None

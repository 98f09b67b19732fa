"""What another stack's configuration says of a run, checked where it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedmezo_core.config import sentence_of
from fedmezo_core.errors import ConfigError


def _check_whole_path(value: str) -> str:
    if value and not Path(value).is_absolute():
        raise ValueError("use the whole path of a file on the server, or nothing for no such file")
    return value


WholePath = Annotated[str, AfterValidator(_check_whole_path)]
"""A file on the server, whose working folder the stack chooses; empty for none."""


class StackSettings(BaseModel):
    """What every stack says beside the contract; a stack adds keys of its own."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    journal: WholePath = ""
    """File of the run's journal on the server; empty: where the stack says."""
    resume: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Factor on the learning rates with which a paused run goes on; 0: it stays paused."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Self:
        """The settings in `values`, whose keys are those above.

        Raises `ConfigError` with `where`, the key, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(sentence_of(error, where, kind=cls)) from None

"""A worker's data sets: rows with a name by which a run asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from fedmezo_core.errors import PolicyError
from fedmezo_core.layered_settings import UserPath

DATA_SET_NAME = r"^[a-z0-9][a-z0-9-]{0,63}$"


def check_whole_budget(
    *, epsilon: float | None, clip: float | None, ledger: Path | None, is_delta_given: bool
) -> None:
    """Raise `ValueError` if some settings of a privacy budget are there and others are not."""
    parts: dict[str, object] = {"privacy_clip": clip, "privacy_ledger": ledger}
    if epsilon is None:
        parts["privacy_delta"] = is_delta_given or None
        given = [name for name, value in parts.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]} needs privacy_epsilon; set both, or neither")
        return
    missing = [name for name, value in parts.items() if value is None]
    if missing:
        raise ValueError(f"privacy_epsilon needs {missing[0]}; set both")


def check_rows_to_evaluate_on(rows: Mapping[str, Path | None], evaluations: Path | None) -> None:
    """Raise `ValueError` for a file of evaluations without held-out rows, or among the `rows`.

    `rows`: the settings that name rows, among them `heldout`, with their values.
    """
    if evaluations is None:
        return
    if rows["heldout"] is None:
        raise ValueError("evaluations needs heldout, the rows to evaluate on; set both")
    written = evaluations.resolve()
    # A folder of evaluations has a file for each run.
    places = {written} if written.is_dir() else {written, written.parent}
    for key, path in rows.items():
        if path is not None and path.resolve() in places:
            raise ValueError(
                f"evaluations = {str(evaluations)!r} would be written among the rows of {key}; "
                "name another file"
            )


class DataSet(BaseModel):
    """Rows with a name. Its settings mean what those of the same names mean for `data`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: UserPath
    columns: dict[str, str] = {}
    heldout: UserPath | None = None
    evaluations: UserPath | None = None
    objective: str = ""
    privacy_epsilon: float | None = Field(default=None, gt=0, le=100, allow_inf_nan=False)
    privacy_delta: float = Field(default=1e-5, gt=0, lt=1)
    privacy_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    privacy_ledger: UserPath | None = None

    @model_validator(mode="after")
    def _whole(self) -> DataSet:
        check_whole_budget(
            epsilon=self.privacy_epsilon,
            clip=self.privacy_clip,
            ledger=self.privacy_ledger,
            is_delta_given="privacy_delta" in self.model_fields_set,
        )
        check_rows_to_evaluate_on({"path": self.path, "heldout": self.heldout}, self.evaluations)
        return self

    def settings(self) -> dict[str, Any]:
        """The settings of a worker whose only rows these are."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "path"}
        return {"data": self.path, **named}


SETTINGS_OF_ROWS = frozenset(DataSet.model_fields) - {"path"}
"""Settings that belong to a data set."""


def _check_some(data_sets: dict[str, DataSet]) -> dict[str, DataSet]:
    if not data_sets:
        raise ValueError("it is empty: name a file or folder of rows, or a table [data.NAME]")
    return data_sets


def _kind(value: object) -> str:
    return "" if isinstance(value, Mapping) else "file"


Data = Annotated[
    Annotated[UserPath, Tag("file")]
    # Without a word of its own in messages: a person writes data.reviews.path.
    | Annotated[
        dict[Annotated[str, Field(pattern=DATA_SET_NAME)], DataSet],
        AfterValidator(_check_some),
        Tag(""),
    ],
    Discriminator(_kind),
]
"""One data set without a name, by its path, or data sets by their names."""


def chosen(data_sets: Mapping[str, DataSet], wanted: str) -> DataSet:
    """The data set that a run asks for by the name `wanted`; empty: the only one.

    Raises `PolicyError`, which tells of no other data set.
    """
    if wanted in data_sets:
        return data_sets[wanted]
    if wanted:
        raise no_such_data_set(wanted)
    if len(data_sets) != 1:
        raise PolicyError(
            "The run names no data set, and this worker has several; begin a run whose data_set "
            "names the one that it is for."
        )
    return next(iter(data_sets.values()))


def no_such_data_set(wanted: str) -> PolicyError:
    """The refusal of a run that is for a data set which is not here."""
    return PolicyError(
        f"The run is for the data set {wanted}, and this worker has none of that name; add "
        f"[data.{wanted}] to its settings if it has such rows."
    )

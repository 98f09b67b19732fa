"""Checks of rows: labels, repeated rows, lengths in tokens, and rows as the model reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from fedmezo.preflight.check_report import Report, counted
from fedmezo_core.config import RunConfig, TaskConfig
from fedmezo_core.zo.data.encoding import Dataset, EncodedExample, RowEncoder
from fedmezo_core.zo.data.rows import Example, label_form, shown

CUT_SHARE_MAX: Final = 0.1
"""Share of rows that are cut from which on a person is warned."""
REPEATED_SHARE_MAX: Final = 0.01
"""Share of rows that another row repeats from which on a person is warned."""
LABEL_SHARE_MAX: Final = 0.9
"""Share of rows of one label from which on a person is warned."""
LABELS_SHOWN_MAX: Final = 10
EXAMPLE_CHARS_MAX: Final = 1500
"""Characters of a row that are shown from its beginning and its end together."""


def check_labels(report: Report, whose: str, rows: Sequence[Example], config: RunConfig) -> None:
    """How many rows there are, and how evenly their labels are spread.

    whose: a name for the rows, such as `data` or `heldout`. Only labels of the contract are named:
    another one is a piece of a private row.
    """
    task = config.task
    values: dict[str, Any] = {"rows": whose, "row_count": len(rows)}
    said = f"{whose}: {counted(len(rows), 'row')}"
    if task.kind == "classification":
        counts = _label_counts(rows, task)
        values["label_rows"] = counts
        said += ", " + _shares(counts, len(rows))
        absent = [label for label, count in counts.items() if not count]
        most = max(counts.values(), default=0)
        if sum(counts.values()) < len(rows):
            strange = len(rows) - sum(counts.values())
            report.failure(
                "labels",
                f"{said}; {counted(strange, 'row')} of another label than the run's verbalizers: "
                "correct them, or add verbalizers to the contract.",
                **values,
            )
            return
        if absent or most > LABEL_SHARE_MAX * len(rows):
            why = f"no row has {shown(absent[0])}" if absent else "nearly all rows are of one label"
            report.warning(
                "labels",
                f"{said}; {why}, so these rows teach a bias: add rows of the other labels if you "
                "have them.",
                **values,
            )
            return
    if len(rows) < config.batch_size and whose == "data":
        report.warning(
            "rows",
            f"{said}, fewer than the run's batch_size = {config.batch_size}: each answer is a mean "
            "over all of them; give more rows if you have them.",
            **values,
        )
        return
    report.ok("labels" if task.kind == "classification" else "rows", said, **values)


def check_repeated(
    report: Report,
    whose: str,
    rows: Sequence[Example],
    task: TaskConfig,
    heldout: Sequence[Example] = (),
    used: str = "trained on",
) -> None:
    """Whether rows repeat each other, or come back among the held-out rows.

    `used`: what the rows are for, as the end of "a row that is ...".
    """
    texts = Counter(_text_of(row, task) for row in rows)
    repeated = len(rows) - len(texts)
    judged = sum(_text_of(row, task) in texts for row in heldout)
    values = {"rows": whose, "repeated_count": repeated, "also_heldout_count": judged}
    if judged:
        report.warning(
            "repeated",
            f"{whose}: {counted(judged, 'held-out row')} with the text of a row that is {used}, "
            "which makes results look better than they are; remove them from one of the two.",
            **values,
        )
    elif repeated > REPEATED_SHARE_MAX * len(rows):
        report.warning(
            "repeated",
            f"{whose}: {counted(repeated, 'row')} of {len(rows):,} with the text of an earlier "
            "one, which so counts twice or more; remove them if that is not meant.",
            **values,
        )
    else:
        report.ok("repeated", f"{whose}: {counted(repeated, 'repeated row')}", **values)


def check_lengths(report: Report, whose: str, dataset: Dataset, config: RunConfig) -> None:
    """How long rows are in tokens, and how many of them are cut."""
    tokens_max = config.task.tokens_max
    lengths = sorted(example.token_count for example in dataset.examples)
    count = len(lengths)
    median, most = lengths[count // 2], lengths[min(count - 1, count * 9 // 10)]
    values = {
        "rows": whose,
        "median_tokens": median,
        "percentile_90_tokens": most,
        "longest_tokens": lengths[-1],
        "longest_before_cut_tokens": dataset.longest_token_count,
        "tokens_max": tokens_max,
        "cut_count": dataset.truncated_count,
        "cut_tokens": dataset.cut_token_count,
    }
    said = f"{whose}: half of the rows have up to {median} tokens, nine in ten up to {most}"
    cut = dataset.truncated_count
    if not cut:
        report.ok("tokens", f"{said}; the longest has {lengths[-1]}, and none is cut", **values)
        return
    share = 100 * cut / count
    said += (
        f"; cut to {tokens_max}: {counted(cut, 'row')} ({share:.2g} %), of which the longest had "
        f"{dataset.longest_token_count}"
    )
    if cut >= CUT_SHARE_MAX * count:
        report.warning(
            "tokens",
            f"{said}: make the rows shorter, or ask for a run with a larger task.tokens_max.",
            **values,
        )
    else:
        report.ok("tokens", said, **values)


def examples_of(
    encoder: RowEncoder, tokenizer: Any, rows: Sequence[Example], dataset: Dataset
) -> list[str]:
    """Three rows as the model reads them, with what is cut: the first, the longest, the shortest.

    Control characters are escaped, because what is in a row must not command a terminal.
    """
    lengths = [sum(map(len, row.values.values())) for row in rows]
    chosen = dict.fromkeys([0, lengths.index(max(lengths)), lengths.index(min(lengths))])
    return [
        _rendered(encoder, tokenizer, rows[number], dataset.examples[number]) for number in chosen
    ]


def _rendered(encoder: RowEncoder, tokenizer: Any, row: Example, example: EncodedExample) -> str:
    task = encoder.config
    prompt = tokenizer.decode(list(example.prompt))
    if task.kind == "classification":
        answer = list(task.verbalizers.values())[example.label]
    else:
        answer = tokenizer.decode(list(example.response))
    lines = [f"{_shortened(prompt)} -> {_shortened(answer)}   ({example.token_count} tokens)"]
    kept = encoder.characters_kept(row, example)
    lost = {column: row.values[column][kept:] for column in task.columns()}
    lines += [
        f"cut off {column}, {len(text):,} characters: {_shortened(text)}"
        for column, text in lost.items()
        if text
    ]
    return "\n".join(f"    {line}" for line in lines)


def _shortened(text: str) -> str:
    half = EXAMPLE_CHARS_MAX // 2
    if len(text) > 2 * half:
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _label_counts(rows: Sequence[Example], task: TaskConfig) -> dict[str, int]:
    """Rows of each of the contract's labels, by the rules by which they are encoded."""
    counts = dict.fromkeys(task.verbalizers, 0)
    forms = {label_form(label): label for label in task.verbalizers}
    for row in rows:
        label = row.values[task.label_column]
        label = label if label in counts else forms.get(label_form(label), "")
        if label in counts:
            counts[label] += 1
    return counts


def _shares(counts: dict[str, int], total: int) -> str:
    parts = [f"{100 * n / total:.0f} % {shown(label)}" for label, n in counts.items()]
    more = len(parts) - LABELS_SHOWN_MAX
    return ", ".join([*parts[:LABELS_SHOWN_MAX], *([f"and {more} more"] if more > 0 else [])])


def _text_of(row: Example, task: TaskConfig) -> tuple[str, ...]:
    return tuple(row.values[column] for column in task.columns())

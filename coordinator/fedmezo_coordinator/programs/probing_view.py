"""What `fedmezo probe` does and says; imports torch."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmezo_coordinator.coordinator_settings import CoordinatorSettings
from fedmezo_coordinator.programs.taking_home.start_adapter import fitted_adapter
from fedmezo_core.config import RunConfig
from fedmezo_core.zo.data.rows import read_rows
from fedmezo_core.zo.model.loading import SharedBases
from fedmezo_core.zo.party import open_party
from fedmezo_core.zo.probing.proposal import (
    ROUNDS_FACTOR_MAX,
    Proposal,
    forwards_of,
    with_enough_probes,
)
from fedmezo_core.zo.probing.readings import passes_allowed, probe_party


@dataclass(frozen=True)
class ProbeResult:
    """A proposal, and what it was made from."""

    config: RunConfig
    """The contract that it is for, with the proposed number of probes and rounds."""
    workers: int
    passes: int
    """Forward passes of one batch that it took."""
    proposal: Proposal


def probe_run(
    settings: CoordinatorSettings,
    run: RunConfig,
    data: Path,
    *,
    workers: int,
    passes: int | None,
    threads: int | None,
) -> ProbeResult:
    """Load the run's base as its parties do, measure on the rows of `data`, and propose.

    Progress goes to standard error. Raises as `open_party`, `read_rows` and `propose` do.
    """
    run = with_enough_probes(run)
    passes = passes_allowed(run, workers, passes)
    rows = read_rows(data, run.task)
    model = settings.model or run.model
    _tell(f"loading {model}")
    bases = SharedBases(keeps=True)
    with fitted_adapter(settings, run, threads, bases) as adapter:
        party = open_party(run, model, adapter=adapter, threads=threads, bases=bases)
    party.check_can_begin()
    proposal, taken = probe_party(
        party,
        rows,
        workers,
        passes_max=passes,
        threads=threads,
        row_states_max=settings.replica_row_states_max,
        told=_tell,
    )
    return ProbeResult(run, workers, taken, proposal)


def proposal_lines(result: ProbeResult) -> list[str]:
    """The result for a person: what was measured, and lines for the [run] table."""
    found, run = result.proposal, result.config
    total = forwards_of(run, result.workers)
    share = 100 * result.passes / total
    measured = (
        f"{result.passes} forward passes of {run.batch_size} rows, {share:.2g} % of the {total}"
    )
    common = f"{100 * found.signal_share:.0f} % of their square is the same on all batches"
    lines = [
        f"{measured} that {result.workers} workers do in {run.rounds} rounds",
        f"loss {found.loss:.4f} before the run, projected gradients {found.grad:.3g}; {common}",
        "each element moved by    costs    projected gradient   which differs by",
    ]
    for report in found.lengths:
        differs = "" if math.isinf(report.disagreement) else f"{100 * report.disagreement:.1f} %"
        row = f"{report.length:>21.2g}    {report.cost:<8.3g} {report.grad:<20.3g} {differs}"
        lines.append(row.rstrip())
    other = "plain" if run.normalized_step else "normalised"
    other_rate = found.values(normalized=not run.normalized_step)["learning_rate"]
    return [
        *lines,
        f"the random walk of the run may move each element by {found.walk_length:.2g}",
        "",
        f"# for {result.workers} workers; {other} steps would need learning_rate = {other_rate:g}",
        *(f"{key} = {_toml(value)}" for key, value in values_to_set(result).items()),
        "",
        _rounds_sentence(found, run.rounds),
    ]


def values_to_set(result: ProbeResult) -> dict[str, Any]:
    """Keys of the run's contract and the values that are proposed for them."""
    run = result.config
    return {
        **result.proposal.values(normalized=run.normalized_step),
        "normalized_step": run.normalized_step,
        "probes": run.probes,
        "rounds": run.rounds,
    }


def proposal_values(result: ProbeResult) -> dict[str, Any]:
    """The result for `--json`; the cost of a length whose loss was not finite is not finite."""
    return {
        "run": values_to_set(result),
        "workers": result.workers,
        "passes": result.passes,
        "run_passes": forwards_of(result.config, result.workers),
        **asdict(result.proposal),
    }


def _rounds_sentence(found: Proposal, rounds: int) -> str:
    if found.rounds_enough <= rounds:
        return f"rounds beyond about {found.rounds_enough} teach little"
    factor = found.rounds_enough / rounds
    much = f"{factor:.2g} times" if factor < ROUNDS_FACTOR_MAX else f"{factor:.0f} times or more"
    return (
        f"the task could use about {much} as many rounds or workers; probe again if you change "
        "them, because a longer run needs a smaller rate"
    )


def _toml(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _tell(line: str) -> None:
    print(f"probe: {line}", file=sys.stderr, flush=True)

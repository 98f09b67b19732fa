"""What the coordinator and a relay check before they accept an answer."""

from __future__ import annotations

from fedmezo_core.config import RunConfig
from fedmezo_core.errors import NumericError, ProtocolError, ScalarError
from fedmezo_core.events import AnswerReceived
from fedmezo_core.machines.aggregate import (
    all_to_binary32,
    bits_of,
    clip_of,
    step_factor,
    to_binary32,
)
from fedmezo_core.records import Scalars

ROWS_MAX = 2**40
"""Most rows of data that a worker may claim."""


def is_digest_round(config: RunConfig, round_: int) -> bool:
    """Whether answers of `round_` carry the digest of the weights that they were measured on."""
    return (round_ - 1) % config.digest_every_rounds == 0


def checked(event: AnswerReceived, learning_rate: float, config: RunConfig) -> Scalars:
    """The answer's scalars, rounded to binary32; raises the `ProtocolError` that refuses it.

    `learning_rate` is the assignment's.
    """
    ticket, scalars = event.ticket, event.scalars
    who = f"Worker {event.worker}, round {ticket.round}, slot {ticket.slot}:"
    if config.secure_aggregation and scalars.projected_grads:
        raise ScalarError(
            f"{who} {len(scalars.projected_grads)} projected gradients came in the clear, but this "
            "run adds them up masked; use a FedMeZO version with secure_aggregation."
        )
    if len(scalars.projected_grads) != config.scalars_per_answer:
        raise ScalarError(
            f"{who} {len(scalars.projected_grads)} projected gradients came, but the run has "
            f"{config.local_steps} local steps of {config.probes} probes; "
            f"send {config.pairs_per_answer}, one for each probe of each step."
        )
    limit = clip_of(config.projected_grad_abs_max)
    # A pool's seed can come more than once in an answer.
    repeats = len(scalars.projected_grads) if config.seed_policy == "pool" else 1
    largest, number = 0.0, -1
    for at, grad in enumerate(scalars.projected_grads):
        if not abs(grad) <= limit:  # NaN is not
            raise ScalarError(
                f"{who} projected gradient {at} is {grad!r}, but must be finite and at most "
                f"{config.projected_grad_abs_max!r} in size; clamp it to "
                "projected_grad_abs_max, or answer that it cannot be measured."
            )
        if abs(grad) > largest:
            largest, number = abs(grad), at
    try:
        # One answer alone has the largest coefficients, and the largest gradient the largest of
        # those: if that is finite, none can overflow at the commit.
        directions = config.probes * config.answers_max
        longest = (
            max(1.0, step_factor(config, directions, 0.0, 1.0)) if config.rate_directions else 1.0
        )
        if config.secure_aggregation:
            largest = limit  # Nobody sees it, but it is no larger.
        to_binary32(learning_rate * largest * repeats * longest / config.probes)
        grads = all_to_binary32(scalars.projected_grads)
    except NumericError:
        grad = largest if number < 0 else scalars.projected_grads[number]
        raise ScalarError(
            f"{who} projected gradient {max(number, 0)} is {grad!r}, which at "
            f"learning rate {learning_rate!r} gives no finite binary32 coefficient; start a run "
            "with a smaller learning_rate or projected_grad_abs_max."
        ) from None
    mean_loss = scalars.mean_loss
    if mean_loss is not None:
        if not config.report_losses:
            raise ProtocolError(
                f"{who} the answer carries a mean loss, but this run keeps losses private; "
                "send it without, or start a run with report_losses on."
            )
        try:
            mean_loss = to_binary32(mean_loss)
        except NumericError:
            raise ScalarError(
                f"{who} the mean loss is {scalars.mean_loss!r}, but must be a finite binary32 "
                "value; answer that it cannot be measured."
            ) from None
    digest64 = scalars.weights_digest64
    if not is_digest_round(config, ticket.round):
        digest64 = None
    elif digest64 is None or not 0 <= digest64 < 2**64:
        raise ProtocolError(
            f"{who} the answer must carry the first 64 bits of its weights digest in this "
            "round; send them as the assignment asks."
        )
    if (scalars.rows is not None) != (config.weighting == "rows"):
        raise ProtocolError(
            f"{who} the answer {'lacks' if scalars.rows is None else 'carries'} a count of rows, "
            f"but this run's weighting is {config.weighting!r}; use the same FedMeZO version."
        )
    if scalars.rows is not None and not 1 <= scalars.rows <= ROWS_MAX:
        raise ScalarError(f"{who} {scalars.rows} rows are claimed; send 1 to {ROWS_MAX}.")
    return Scalars(grads, mean_loss, digest64, scalars.rows)


def content_of(scalars: Scalars) -> tuple[bytes, bytes | None, int | None, int | None]:
    """A key that is equal for two answers if they are the same, bit for bit."""
    loss = None if scalars.mean_loss is None else bits_of((scalars.mean_loss,))
    return bits_of(scalars.projected_grads), loss, scalars.weights_digest64, scalars.rows

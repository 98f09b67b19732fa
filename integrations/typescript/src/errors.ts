/** The run cannot go on with this worker: the program ends with this sentence. */
export class StopError extends Error {
  override name = "StopError";
}

/** The connection is of no use any more: wait, catch up from the journal, connect again. */
export class DisconnectError extends Error {
  override name = "DisconnectError";

  constructor(
    message: string,
    /** The longest wait that the coordinator asked for, in milliseconds. */
    readonly retryAfterMs?: number,
  ) {
    super(message);
  }
}

/** The weights are not the run's: rebuild them from the base and the journal. */
export class DivergedError extends Error {
  override name = "DivergedError";
}

const TRY_AGAIN: readonly string[] = [
  "JournalBehindError",
  "NotReadyError",
  "UnknownWorkerError",
  "UnavailableError",
  "StartingError",
];

/**
 * What a session's or call's end means for this worker, by the reason that it gives (section 13).
 */
export function errorOf(reason: string, sentence: string, retryAfterMs?: number): Error {
  if (reason === "DivergedError") return new DivergedError(sentence);
  if (TRY_AGAIN.includes(reason)) return new DisconnectError(sentence, retryAfterMs);
  const advice =
    reason === "JournalCompactedError" ? " This worker takes no snapshots; use one that does." : "";
  return new StopError(`The coordinator refused (${reason}): ${sentence}${advice}`);
}

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

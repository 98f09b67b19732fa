/**
 * A worker's life in a run: discover, catch up, take part, and again after each lost connection.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { DisconnectError, DivergedError, StopError } from "./errors.js";
import { LossError } from "./measuring.js";
import type { GetRunResponse } from "./messages.js";
import type { Outcome, Reaction, Session, Work } from "./session.js";
import type { Connection, Coordinator, Listener } from "./transport.js";

const FIRST_WAIT_MS = 250;
const LONGEST_WAIT_MS = 10_000;
const LONGEST_ASKED_WAIT_MS = 60_000;
const GOODBYE_MS = 20_000;

/**
 * Calls a function until it succeeds, with the waits of section 13. A StopError ends the trying.
 */
export class Patience {
  private failures = 0;

  constructor(private readonly log: (line: string) => void) {}

  succeeded(): void {
    this.failures = 0;
  }

  async wait(error: Error): Promise<void> {
    const asked = error instanceof DisconnectError ? error.retryAfterMs : undefined;
    const bound =
      asked === undefined
        ? Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.failures++)
        : Math.min(LONGEST_ASKED_WAIT_MS, asked);
    this.log(`Trying again within ${bound} ms: ${error.message}`);
    await sleep(Math.random() * bound);
  }
}

/** Asks what the run is, as often as it takes. */
export async function discover(
  coordinator: Coordinator,
  runId: string,
  patience: Patience,
): Promise<GetRunResponse> {
  for (;;) {
    try {
      const run = await coordinator.getRun({ protocol_versions: [1], run_id: runId, round: "0" });
      patience.succeeded();
      return run;
    } catch (error) {
      if (!(error instanceof DisconnectError)) throw error;
      await patience.wait(error);
    }
  }
}

export interface WorkerOptions {
  readonly coordinator: Coordinator;
  readonly session: Session;
  readonly runId: string;
  readonly genesis: Uint8Array;
  /** Polls in place of a stream. */
  readonly polls: boolean;
  /** The coordinator's key that the operator expects. */
  readonly expectedKey: Uint8Array | undefined;
  /** Measures, or throws a LossError. */
  readonly measure: (work: Work) => Promise<Outcome>;
  readonly log: (line: string) => void;
}

export class Worker {
  private readonly patience: Patience;
  private connection: { act(reaction: Reaction): void } | undefined;
  private measuring: Promise<void> | undefined;
  private rebuilt = false;

  constructor(private readonly options: WorkerOptions) {
    this.patience = new Patience(options.log);
  }

  /** Takes part until the run is finished. Throws a StopError if it cannot go on. */
  async run(): Promise<void> {
    const { session, log } = this.options;
    while (!session.left) {
      try {
        await this.catchUp();
        await this.converse();
        if (!session.left) throw new DisconnectError("The coordinator ended the stream.");
      } catch (error) {
        if (error instanceof DivergedError) {
          if (this.rebuilt)
            throw new StopError(`The rebuilt weights differ again: ${error.message}`);
          log(`Building the weights again from the base and the journal: ${error.message}`);
          this.rebuilt = true;
          session.reset();
        } else if (error instanceof DisconnectError) {
          await this.patience.wait(error);
        } else {
          throw error;
        }
      }
    }
    await this.measuring;
  }

  private async catchUp(): Promise<void> {
    const { coordinator, session, runId, genesis, expectedKey, log } = this.options;
    const run = await coordinator.getRun({
      protocol_versions: [1],
      run_id: runId,
      round: String(session.round),
    });
    if (Buffer.compare(run.genesis ?? new Uint8Array(), genesis) !== 0) {
      throw new StopError(
        `Another run is served at this address under the name ${runId}: its first record has ` +
          "other bytes. Start a new worker for it.",
      );
    }
    const key = run.checkpoint_key?.length ? run.checkpoint_key : undefined;
    if (key && key.length !== 32) {
      throw new StopError(`The coordinator's key has ${key.length} bytes; an Ed25519 key has 32.`);
    }
    if (expectedKey && Buffer.compare(key ?? new Uint8Array(), expectedKey) !== 0) {
      const [theirs, wanted] = [key ?? [], expectedKey].map((k) => Buffer.from(k).toString("hex"));
      throw new StopError(
        `The coordinator signs with ${theirs ? `the key ${theirs}` : "no key"}, and --expect-key ` +
          `names ${wanted}. Ask its operator.`,
      );
    }
    session.key = key;
    if (run.needs_snapshot) {
      throw new StopError(
        "The journal no longer holds all commits, and this worker takes no snapshots. Use one " +
          "that does.",
      );
    }
    const before = session.round;
    for (;;) {
      const page = await coordinator.readJournal({
        run_id: runId,
        commits_only: true,
        from_round: String(session.round + 1n),
      });
      const entries = page.entries ?? [];
      if (entries.length === 0) break;
      const round = session.round;
      for (const { record } of entries) session.apply(record ?? new Uint8Array());
      if (session.round === round) throw new DisconnectError("A page of the journal led nowhere.");
    }
    if (session.round > before) log(`Read the journal up to round ${session.round}.`);
  }

  /** One connection, from its hello to its end. */
  private converse(): Promise<void> {
    const { coordinator, session, polls, log } = this.options;
    return new Promise((resolve, reject) => {
      let over = false;
      let broken = false;
      let goodbye: NodeJS.Timeout | undefined;
      const finish = (error?: Error): void => {
        if (over) return;
        over = true;
        clearTimeout(goodbye);
        this.connection = undefined;
        session.close();
        // After the last message it does not matter how the stream ends.
        if (error === undefined || session.left) resolve();
        else reject(error);
      };
      const act = (reaction: Reaction): void => {
        for (const message of reaction.send) connection.send(message);
        if (reaction.says) log(reaction.says);
        if (reaction.work) this.start(reaction.work);
        if (reaction.left) {
          connection.end();
          goodbye = setTimeout(() => void connection.cancel().then(() => finish()), GOODBYE_MS);
        }
      };
      const listener: Listener = {
        message: (message) => {
          if (over || broken) return;
          try {
            const round = session.round;
            act(session.receive(message));
            if (message.welcome) this.patience.succeeded();
            if (message.ack) this.rebuilt = false;
            if (session.round > round) log(`Round ${session.round} is committed.`);
          } catch (error) {
            broken = true;
            this.connection = undefined;
            void connection.cancel().then(() => finish(error as Error));
          }
        },
        // A connection that we end ourselves ends with our own reason.
        closed: (error) => void (broken || finish(error)),
        busy: () => session.busy,
      };
      const hello = session.open();
      const connection: Connection = polls
        ? coordinator.poll(hello, listener)
        : coordinator.stream(hello, listener);
      this.connection = { act };
    });
  }

  private start(work: Work): void {
    this.measuring = this.measureAndAnswer(work);
  }

  private async measureAndAnswer(work: Work): Promise<void> {
    const { session, measure, log } = this.options;
    let outcome: Outcome;
    try {
      outcome = await measure(work);
    } catch (error) {
      const what = (error as Error).message;
      log(`Round ${work.round} could not be measured: ${what}`);
      // What a forward pass says may quote data; only our own sentence travels.
      const reason = error instanceof LossError ? what : "the forward pass failed";
      outcome = { kind: "unable", reason };
    }
    const reaction = session.finish(work, outcome);
    if (this.connection) this.connection.act(reaction);
    else if (reaction.work) this.start(reaction.work);
  }
}

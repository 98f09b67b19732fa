/**
 * A worker's side of a session, without a network: messages in, messages out (docs/protocol.md,
 * sections 8 and 10).
 */
import type { Contract } from "./contract.js";
import { DisconnectError, errorOf, StopError } from "./errors.js";
import { digest64 } from "./hashing.js";
import type { Weights } from "./manifest.js";
import type { Measurement, MeasurementPlan } from "./measuring.js";
import type {
  Ack,
  Answer,
  Assign,
  CommitNotice,
  Finished,
  Refused,
  SessionRequest,
  SessionResponse,
  Ticket,
  Welcome,
} from "./messages.js";
import { checkSignature, decodeCommit, headAfter, NO_HEAD, type CommitLimits } from "./records.js";

/** What a worker is in a run. The digests are its own, compared with the genesis's. */
export interface Membership {
  readonly worker: string;
  readonly contract: Contract;
  /** Record 0, as it was written. */
  readonly genesis: Uint8Array;
  readonly manifestDigest: Uint8Array;
  readonly baseDigest: Uint8Array;
  readonly tokenizerDigest: Uint8Array;
  /** Count of the worker's rows. */
  readonly rows: number;
}

/** A measurement to make. */
export interface Work {
  readonly round: bigint;
  readonly plan: MeasurementPlan;
  /** The weights to measure at: a copy, so that commits do not change them. */
  readonly weights: readonly Float32Array[];
  /** Whether its answer can still count. */
  wanted(): boolean;
}

/** How a measurement ended. */
export type Outcome =
  | { readonly kind: "measured"; readonly measurement: Measurement }
  | { readonly kind: "unable"; readonly reason: string }
  | { readonly kind: "cut short" };

/** What to do after a message or a measurement. */
export interface Reaction {
  readonly send: readonly SessionRequest[];
  readonly work?: Work;
  /** The last message was sent: end the worker's side. */
  readonly left?: boolean;
  /** Something that a person should know. */
  readonly says?: string;
}

type AnswerBody = Omit<Answer, "ticket">;

interface Task extends Work {
  readonly key: string;
  readonly proof: Pick<Answer, "weights_digest64" | "head64">;
  ticket: Ticket;
}

const NOTHING: Reaction = { send: [] };
const SEEDS = 1n << 64n;
const REASON_CHARACTERS_MAX = 512;

function sameBytes(left: Uint8Array | undefined, right: Uint8Array): boolean {
  return left !== undefined && Buffer.compare(left, right) === 0;
}

export class Session {
  private readonly limits: CommitLimits;
  private readonly genesisHead: Buffer;
  private readonly answers = new Map<
    string,
    { readonly round: bigint; readonly body: AnswerBody }
  >();
  private current: Task | undefined;
  /** The newest assignment, which waits for the current measurement to end. */
  private next: Task | undefined;
  /** Counts rebuilds: what was measured before one does not count. */
  private generation = 0;
  private state: "offline" | "greeting" | "online" | "left" = "offline";
  private heldRound = 0n;
  private head: Buffer;
  /** Head before the last commit, if there was one. */
  private headBefore: Buffer | undefined;
  private epoch = 0;
  private welcomed: { readonly round: bigint; readonly head: Uint8Array } | undefined;
  /** The coordinator's Ed25519 key, if heads are signed. */
  key: Uint8Array | undefined;

  constructor(
    private readonly membership: Membership,
    private readonly weights: Weights,
  ) {
    const { contract } = membership;
    this.limits = {
      runsMax: contract.sharedSeeds ? 1 : contract.cohortSizeMax,
      pairsOfRunMax: contract.localSteps * contract.probes,
    };
    this.genesisHead = headAfter(NO_HEAD, membership.genesis);
    this.head = this.genesisHead;
  }

  /** The last round that the weights hold. */
  get round(): bigint {
    return this.heldRound;
  }

  get online(): boolean {
    return this.state === "online";
  }

  get left(): boolean {
    return this.state === "left";
  }

  /** Whether a measurement runs. */
  get busy(): boolean {
    return this.current !== undefined;
  }

  /** A stream was opened: the first message. */
  open(): SessionRequest {
    const { worker, contract, manifestDigest, baseDigest, tokenizerDigest } = this.membership;
    this.state = "greeting";
    this.welcomed = undefined;
    return {
      hello: {
        protocol_version: 1,
        run_id: contract.runId,
        worker,
        manifest_digest: manifestDigest,
        base_digest: baseDigest,
        tokenizer_digest: tokenizerDigest,
        recipe: contract.recipe,
        round: String(this.heldRound),
        head: this.head,
      },
    };
  }

  /** The stream ended. Measurements go on. */
  close(): void {
    if (this.state !== "left") this.state = "offline";
  }

  /** Throws the weights away: back to the base. */
  reset(): void {
    this.weights.reset();
    this.heldRound = 0n;
    this.head = this.genesisHead;
    this.headBefore = undefined;
    this.answers.clear();
    this.next = undefined;
    this.generation++;
    this.state = "offline";
  }

  /** Checks and applies a commit, from the journal or a session. Returns whether it was news. */
  apply(record: Uint8Array, signature?: Uint8Array): boolean {
    const commit = decodeCommit(record, this.limits);
    if (commit.round <= this.heldRound) {
      const again = this.headBefore && headAfter(this.headBefore, record);
      if (commit.round === this.heldRound && again && !sameBytes(again, this.head)) {
        throw new DisconnectError(`The coordinator sent a second commit of round ${commit.round}.`);
      }
      return false;
    }
    if (commit.round !== this.heldRound + 1n) {
      throw new DisconnectError(
        `The commit of round ${commit.round} came after that of round ${this.heldRound}.`,
      );
    }
    const head = headAfter(this.head, record);
    const { welcomed } = this;
    if (welcomed?.round === commit.round && !sameBytes(welcomed.head, head)) {
      throw this.anotherHistory(commit.round);
    }
    if (this.key && welcomed && signature && commit.round > welcomed.round) {
      const { runId } = this.membership.contract;
      checkSignature(this.key, runId, commit.round, head, signature);
    }
    this.weights.apply(commit);
    this.headBefore = this.head;
    this.head = head;
    this.heldRound = commit.round;
    for (const [key, answer] of this.answers) {
      if (answer.round <= this.heldRound) this.answers.delete(key);
    }
    return true;
  }

  receive(message: SessionResponse): Reaction {
    const { state } = this;
    if (message.welcome && state === "greeting") return this.onWelcome(message.welcome);
    if (message.ended) throw errorOf(message.ended.reason ?? "", message.ended.message ?? "");
    if ((message.ack || message.refused) && state === "left") return NOTHING;
    const kind = Object.keys(message)[0];
    if (kind === undefined) {
      throw new StopError(
        "The coordinator sent a message of a kind that this worker does not know; it is of " +
          "another version. Use a newer worker.",
      );
    }
    if (state !== "online" || message.welcome) {
      throw new DisconnectError(`The message ${kind} has no place in the state ${state}.`);
    }
    if (message.commit) return this.onCommit(message.commit);
    if (message.assign) return this.onAssign(message.assign);
    if (message.ack) return this.onAck(message.ack);
    if (message.refused) return this.onRefused(message.refused);
    return this.onFinished(message.finished ?? {});
  }

  /** A measurement ended. */
  finish(work: Work, outcome: Outcome): Reaction {
    const task = work as Task;
    this.current = undefined;
    const send: SessionRequest[] = [];
    if (task.wanted() && outcome.kind !== "cut short") {
      const now = this.online && task.ticket.epoch === this.epoch;
      if (outcome.kind === "measured") {
        const body = this.answerOf(task, outcome.measurement);
        this.answers.set(task.key, { round: task.round, body });
        if (now) send.push({ answer: { ticket: task.ticket, ...body } });
      } else if (now) {
        const reason = outcome.reason.slice(0, REASON_CHARACTERS_MAX);
        send.push({ unable: { ticket: task.ticket, reason } });
      }
    }
    const begun = this.begin(this.next);
    return begun ? { send, work: begun } : { send };
  }

  /** The task that is to be measured now, if it can still count. */
  private begin(task: Task | undefined): Task | undefined {
    this.next = undefined;
    this.current = task?.wanted() ? task : undefined;
    return this.current;
  }

  private answerOf(task: Task, measurement: Measurement): AnswerBody {
    const { contract, rows } = this.membership;
    return {
      projected_grads: [...measurement.projectedGrads],
      ...(contract.reportLosses ? { mean_loss: measurement.meanLoss } : {}),
      ...(contract.weightsByRows ? { rows: String(rows) } : {}),
      ...task.proof,
    };
  }

  private anotherHistory(round: bigint): StopError {
    return new StopError(
      `The coordinator's head after round ${round} is not the one of these weights: it serves ` +
        "another history of this run. Ask its operator, or begin again from the base.",
    );
  }

  private onWelcome(welcome: Welcome): Reaction {
    const round = BigInt(welcome.round ?? 0);
    const epoch = welcome.epoch ?? 0;
    const head = welcome.head ?? new Uint8Array();
    if (round < this.heldRound || epoch < this.epoch) {
      throw new DisconnectError(
        `The coordinator's journal went back: it is at round ${round} of start ${epoch}, and ` +
          `this worker has seen round ${this.heldRound} of start ${this.epoch}.`,
      );
    }
    if (round === this.heldRound && !sameBytes(head, this.head)) throw this.anotherHistory(round);
    if (this.key) {
      const signature = welcome.signature ?? new Uint8Array();
      checkSignature(this.key, this.membership.contract.runId, round, head, signature);
    }
    this.epoch = epoch;
    this.welcomed = { round, head };
    this.state = "online";
    return NOTHING;
  }

  private onCommit(notice: CommitNotice): Reaction {
    this.apply(notice.record ?? new Uint8Array(), notice.signature ?? new Uint8Array());
    return NOTHING;
  }

  private onAssign(assign: Assign): Reaction {
    const { contract } = this.membership;
    const { epoch = 0, slot = 0 } = assign.ticket ?? {};
    const round = BigInt(assign.ticket?.round ?? 0);
    if (epoch !== this.epoch || round !== this.heldRound + 1n) {
      throw new DisconnectError(
        `An assignment of round ${round} of start ${epoch} came after round ${this.heldRound} of ` +
          `start ${this.epoch}.`,
      );
    }
    const firstSeed = BigInt(assign.first_seed ?? 0);
    const steps = assign.steps ?? 0;
    const offsets = assign.seed_offsets ?? [];
    const eps = assign.eps ?? contract.eps;
    const rate = assign.learning_rate ?? contract.learningRate;
    const probes = steps * contract.probes;
    const refuse = (what: string): StopError =>
      new StopError(
        `The assignment of round ${round} has ${what}; the coordinator is of another version. ` +
          "Use a newer worker.",
      );
    if (steps < 1 || steps > contract.localSteps) throw refuse(`${steps} local steps`);
    if (offsets.length !== 0 && offsets.length !== probes) {
      throw refuse(`${offsets.length} seed offsets for ${probes} probes`);
    }
    const lastOffset = offsets.length > 0 ? Math.max(...offsets) : probes - 1;
    if (firstSeed + BigInt(lastOffset) >= SEEDS) throw refuse("a seed that reaches 2^64");
    if (!(Number.isFinite(eps) && eps > 0)) throw refuse(`eps = ${eps}`);
    if (!(Number.isFinite(rate) && rate > 0)) throw refuse(`learning_rate = ${rate}`);

    const ticket: Ticket = { epoch, round: String(round), slot };
    const wantDigest = assign.want_digest ?? false;
    const key = JSON.stringify([
      String(round),
      slot,
      String(firstSeed),
      offsets,
      rate,
      eps,
      wantDigest,
    ]);
    const known = this.answers.get(key);
    if (known) return { send: [{ answer: { ticket, ...known.body } }] };
    const same = [this.current, this.next].find((task) => task?.key === key && task.wanted());
    if (same) {
      same.ticket = ticket;
      return NOTHING;
    }
    const { generation } = this;
    const task: Task = {
      key,
      ticket,
      round,
      proof: wantDigest
        ? { weights_digest64: String(digest64(this.weights.digest())) }
        : { head64: String(digest64(this.head)) },
      plan: {
        firstSeed,
        seedOffsets: offsets,
        probes,
        eps,
        oneSided: contract.oneSided,
        projectedGradAbsMax: contract.projectedGradAbsMax,
      },
      weights: this.weights.copy(),
      wanted: () => round === this.heldRound + 1n && generation === this.generation,
    };
    if (this.current !== undefined) {
      this.next = task;
      return NOTHING;
    }
    const work = this.begin(task);
    return work ? { send: [], work } : NOTHING;
  }

  private onAck(ack: Ack): Reaction {
    const round = BigInt(ack.ticket?.round ?? 0) - 1n;
    const known =
      round === this.heldRound
        ? this.head
        : round === this.heldRound - 1n
          ? this.headBefore
          : undefined;
    if (known && !sameBytes(ack.head, known)) throw this.anotherHistory(round);
    return NOTHING;
  }

  private onRefused({ reason = "", message = "", ticket }: Refused): Reaction {
    if (reason === "UnknownWorkerError") throw new DisconnectError(message);
    if (reason === "StaleTicketError" || reason === "EquivocationError") return NOTHING;
    return {
      send: [],
      says: `The answer of round ${ticket?.round ?? 0} was refused (${reason}): ${message}`,
    };
  }

  private onFinished({ round: last }: Finished): Reaction {
    const round = BigInt(last ?? 0);
    if (round !== this.heldRound) {
      throw new DisconnectError(
        `The run is said to end after round ${round}, and these weights are those of round ` +
          `${this.heldRound}.`,
      );
    }
    this.state = "left";
    this.next = undefined;
    return {
      send: [{ weights_report: { round: String(round), weights_digest: this.weights.digest() } }],
      left: true,
    };
  }
}

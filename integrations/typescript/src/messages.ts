/** The messages of proto/fedmezo_proto/v1, as far as a worker uses them, and their bytes. */
import { fileURLToPath } from "node:url";
import protobuf from "protobufjs";

export interface Ticket {
  epoch?: number;
  round?: string;
  slot?: number;
}
export interface Hello {
  protocol_version: number;
  run_id: string;
  worker: string;
  manifest_digest: Uint8Array;
  base_digest: Uint8Array;
  tokenizer_digest: Uint8Array;
  recipe: string;
  round: string;
  head: Uint8Array;
}
export interface Answer {
  ticket: Ticket;
  projected_grads: number[];
  mean_loss?: number;
  weights_digest64?: string;
  rows?: string;
  head64?: string;
}
export interface Unable {
  ticket: Ticket;
  reason: string;
}
export interface WeightsReport {
  round: string;
  weights_digest: Uint8Array;
}
/** Exactly one member is set. */
export interface SessionRequest {
  hello?: Hello;
  answer?: Answer;
  unable?: Unable;
  weights_report?: WeightsReport;
}

export interface Welcome {
  epoch?: number;
  round?: string;
  head?: Uint8Array;
  signature?: Uint8Array;
}
export interface CommitNotice {
  record?: Uint8Array;
  signature?: Uint8Array;
}
export interface Assign {
  ticket?: Ticket;
  first_seed?: string;
  steps?: number;
  want_digest?: boolean;
  deadline_ms?: string;
  learning_rate?: number;
  eps?: number;
  seed_offsets?: number[];
}
export interface Ack {
  ticket?: Ticket;
  head?: Uint8Array;
}
export interface Refused {
  ticket?: Ticket;
  reason?: string;
  message?: string;
}
export interface Finished {
  round?: string;
}
export interface Ended {
  reason?: string;
  message?: string;
}
export interface SessionResponse {
  welcome?: Welcome;
  commit?: CommitNotice;
  assign?: Assign;
  ack?: Ack;
  refused?: Refused;
  finished?: Finished;
  ended?: Ended;
}

export interface GetRunRequest {
  protocol_versions: number[];
  run_id: string;
  round: string;
}
export interface GetRunResponse {
  protocol_version?: number;
  genesis?: Uint8Array;
  round?: string;
  epoch?: number;
  checkpoint_key?: Uint8Array;
  head?: Uint8Array;
  signature?: Uint8Array;
  needs_snapshot?: boolean;
}
export interface ReadJournalRequest {
  run_id: string;
  commits_only: boolean;
  from_round: string;
}
export interface ReadJournalResponse {
  entries?: { seqno?: string; record?: Uint8Array }[];
}
export interface PollSessionRequest {
  token: Uint8Array;
  messages: SessionRequest[];
  wait_ms: number;
  leave: boolean;
}
export interface PollSessionResponse {
  token?: Uint8Array;
  messages?: SessionResponse[];
  lease_ms?: number;
}

export interface Verbalizer {
  label?: string;
  word?: string;
}
export interface TaskConfig {
  kind?: string;
  template?: string;
  label_column?: string;
  verbalizers?: Verbalizer[];
  response_column?: string;
  tokens_max?: number;
  objective?: string;
  generated_tokens_max?: number;
  template_version?: number;
}
export interface LoraConfig {
  rank?: number;
  alpha?: number;
  target_modules?: string[];
  freeze_a?: boolean;
  output_rank?: number;
}
/** journal.proto says what each field means. Numbers of 64 bits are decimal text. */
export interface RunConfig {
  run_id?: string;
  model?: string;
  task?: TaskConfig;
  lora?: LoraConfig;
  seed?: string;
  rounds?: string;
  local_steps?: number;
  batch_size?: number;
  distribution?: string;
  eps?: number;
  learning_rate?: number;
  projected_grad_abs_max?: number;
  dtype?: string;
  rounding?: string;
  workers_min?: number;
  quorum?: number;
  cohort_size_max?: number;
  deadline_ms?: string;
  digest_every_rounds?: number;
  report_losses?: boolean;
  probes?: number;
  estimator?: string;
  normalized_step?: boolean;
  schedule?: string;
  warmup_rounds?: string;
  final_rate_fraction?: number;
  eps_follows_rate?: boolean;
  weight_decay?: number;
  weighting?: string;
  personal_rate?: string;
  personal_rate_amplitude?: number;
  seed_policy?: string;
  pool_size?: number;
  pool_sampling?: string;
  rebase_every_rounds?: number;
  train?: string[];
  pause_loss_factor?: number;
  pause_rounds?: number;
  early_stop_evaluations?: number;
  buffer_answers?: number;
  staleness_max_rounds?: number;
  staleness_exponent?: number;
  clip_median_factor?: number;
  rate_directions?: number;
  base_forms?: string[];
}
export interface Genesis {
  config?: RunConfig;
  manifest_digest?: Uint8Array;
  base_digest?: Uint8Array;
  tokenizer_digest?: Uint8Array;
  trainable_elements?: string;
  tokenizer_parts?: Uint8Array[];
}
export interface Committed {
  round?: string;
  runs?: { first_seed?: string; coefficients?: number[] }[];
  rounding_seed?: string;
  decay?: number;
  from_base?: boolean;
  staleness?: number[];
  slots?: number[];
}
export interface RecordKinds {
  genesis?: Genesis;
  committed?: Committed;
}

/**
 * A message type: JavaScript objects with the field names of the .proto files, to bytes and back.
 */
export interface Codec<Message> {
  encode(message: Message): Buffer;
  /** A field that the bytes lack is absent. Throws an Error for bytes that are no such message. */
  decode(bytes: Uint8Array): Message;
}

const PROTO_ROOT = fileURLToPath(new URL("../../../../proto/", import.meta.url));

function load(): protobuf.Root {
  const root = new protobuf.Root();
  root.resolvePath = (_origin, target) => PROTO_ROOT + target;
  return root.loadSync("fedmezo_proto/v1/coordinator.proto", { keepCase: true });
}

const root = load();

function codec<Message extends object>(name: string): Codec<Message> {
  const type = root.lookupType(`fedmezo.v1.${name}`);
  return {
    encode: (message) => Buffer.from(type.encode(type.fromObject(message)).finish()),
    decode: (bytes) =>
      type.toObject(type.decode(bytes), { longs: String, enums: String }) as Message,
  };
}

export const codecs = {
  getRunRequest: codec<GetRunRequest>("GetRunRequest"),
  getRunResponse: codec<GetRunResponse>("GetRunResponse"),
  readJournalRequest: codec<ReadJournalRequest>("ReadJournalRequest"),
  readJournalResponse: codec<ReadJournalResponse>("ReadJournalResponse"),
  sessionRequest: codec<SessionRequest>("SessionRequest"),
  sessionResponse: codec<SessionResponse>("SessionResponse"),
  pollSessionRequest: codec<PollSessionRequest>("PollSessionRequest"),
  pollSessionResponse: codec<PollSessionResponse>("PollSessionResponse"),
  runConfig: codec<RunConfig>("RunConfig"),
  record: codec<RecordKinds>("Record"),
} as const;

/** The values that an enumeration of journal.proto has, without the one that means "not set". */
export function enumValues(name: string): readonly string[] {
  const values = root.lookupEnum(`fedmezo.v1.${name}`).values;
  return Object.keys(values).filter((value) => values[value] !== 0);
}

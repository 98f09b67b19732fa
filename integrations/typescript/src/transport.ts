/** The coordinator's service over gRPC (docs/protocol.md, sections 2, 12 and 13). */
import {
  Client,
  credentials,
  status,
  type ClientOptions,
  type Metadata,
  type ServiceError,
} from "@grpc/grpc-js";
import { DisconnectError, errorOf } from "./errors.js";
import {
  codecs,
  type Codec,
  type GetRunRequest,
  type GetRunResponse,
  type PollSessionRequest,
  type PollSessionResponse,
  type ReadJournalRequest,
  type ReadJournalResponse,
  type SessionRequest,
  type SessionResponse,
} from "./messages.js";

const SERVICE = "/fedmezo.v1.CoordinatorService";
const UNARY_DEADLINE_MS = 20_000;
const IDLE_WAIT_MS = 20_000;
const BUSY_WAIT_MS = 500;
const GOODBYE_DEADLINE_MS = 5_000;

const LOST_CONNECTION: readonly status[] = [
  status.UNAVAILABLE,
  status.DEADLINE_EXCEEDED,
  status.CANCELLED,
  status.INTERNAL,
  status.UNKNOWN,
];
function metadataText(metadata: Metadata | undefined, key: string): string | undefined {
  const value = metadata?.get(key)[0];
  return value === undefined ? undefined : String(value);
}

/** What a failed call means for this worker. */
export function meaningOf(error: Partial<ServiceError>): Error {
  const reason = metadataText(error.metadata, "fedmezo-reason");
  const code = error.code ?? status.UNKNOWN;
  const sentence = error.details || error.message || status[code];
  if (reason === undefined && LOST_CONNECTION.includes(code)) return new DisconnectError(sentence);
  const wait = Number(metadataText(error.metadata, "fedmezo-retry-after-ms"));
  return errorOf(reason ?? status[code], sentence, wait > 0 ? wait : undefined);
}

/** A way to carry a session's messages. */
export interface Connection {
  send(message: SessionRequest): void;
  /** The worker has sent its last message. */
  end(): void;
  /** Ends the connection now, in the midst of a conversation. */
  cancel(): Promise<void>;
}

export interface Listener {
  message(message: SessionResponse): void;
  /** The connection is over; without an error it ended as it should. */
  closed(error?: Error): void;
  /** Whether an answer is being measured, so that a poll should not wait long. */
  busy(): boolean;
}

export class Coordinator {
  private readonly client: Client;

  /** `rootCertificates`: PEM certificates; undefined means a plain connection. */
  constructor(address: string, rootCertificates: Buffer | undefined) {
    const options: ClientOptions = {
      "grpc.max_receive_message_length": 9 * 1024 * 1024,
      "grpc.keepalive_time_ms": 60_000,
      "grpc.keepalive_timeout_ms": 20_000,
      "grpc.keepalive_permit_without_calls": 1,
      "grpc.initial_reconnect_backoff_ms": 250,
      "grpc.max_reconnect_backoff_ms": 10_000,
    };
    this.client = new Client(
      address,
      rootCertificates === undefined
        ? credentials.createInsecure()
        : credentials.createSsl(rootCertificates),
      options,
    );
  }

  getRun(request: GetRunRequest): Promise<GetRunResponse> {
    return this.unary("GetRun", codecs.getRunRequest, codecs.getRunResponse, request);
  }

  readJournal(request: ReadJournalRequest): Promise<ReadJournalResponse> {
    return this.unary(
      "ReadJournal",
      codecs.readJournalRequest,
      codecs.readJournalResponse,
      request,
    );
  }

  close(): void {
    this.client.close();
  }

  /** Opens a stream and sends the first message. */
  stream(hello: SessionRequest, listener: Listener): Connection {
    const call = this.client.makeBidiStreamRequest<SessionRequest, SessionResponse>(
      `${SERVICE}/Session`,
      codecs.sessionRequest.encode,
      codecs.sessionResponse.decode,
    );
    call.on("data", (message: SessionResponse) => listener.message(message));
    call.on("error", () => undefined); // The status says the same.
    call.on("status", (ended) => {
      if (ended.code === status.OK) listener.closed();
      else listener.closed(meaningOf(ended));
    });
    call.write(hello);
    return {
      send: (message) => void call.write(message),
      end: () => void call.end(),
      cancel: () => {
        call.cancel();
        return Promise.resolve();
      },
    };
  }

  /** Carries a session in unary calls, one after the other. */
  poll(hello: SessionRequest, listener: Listener): Connection {
    let token: Uint8Array = new Uint8Array();
    let leaving = false;
    let open = true;
    const outgoing = [hello];
    const call = (request: PollSessionRequest, deadlineMs: number): Promise<PollSessionResponse> =>
      this.unary(
        "PollSession",
        codecs.pollSessionRequest,
        codecs.pollSessionResponse,
        request,
        deadlineMs,
      );
    const turn = async (): Promise<void> => {
      while (open) {
        const leave = leaving;
        const wait_ms = leave ? 0 : listener.busy() ? BUSY_WAIT_MS : IDLE_WAIT_MS;
        const response = await call(
          { token, messages: outgoing.splice(0), wait_ms, leave },
          IDLE_WAIT_MS + UNARY_DEADLINE_MS,
        );
        token = response.token ?? new Uint8Array();
        for (const message of response.messages ?? []) if (open) listener.message(message);
        if (leave) open = false;
      }
    };
    // The caller keeps the connection before its first message comes.
    setImmediate(
      () =>
        void turn().then(
          () => listener.closed(),
          (error: Error) => listener.closed(error),
        ),
    );
    return {
      send: (message) => void outgoing.push(message),
      end: () => void (leaving = true),
      cancel: async () => {
        open = false;
        const goodbye = { token, messages: [], wait_ms: 0, leave: true };
        // Without it the coordinator would wait until the lease is over.
        await call(goodbye, GOODBYE_DEADLINE_MS).catch(() => undefined);
      },
    };
  }

  private unary<Request, Response>(
    method: string,
    request: Codec<Request>,
    response: Codec<Response>,
    message: Request,
    deadlineMs = UNARY_DEADLINE_MS,
  ): Promise<Response> {
    return new Promise((resolve, reject) => {
      this.client.makeUnaryRequest<Request, Response>(
        `${SERVICE}/${method}`,
        request.encode,
        response.decode,
        message,
        { deadline: Date.now() + deadlineMs },
        (error, value) => {
          if (error) reject(meaningOf(error));
          else resolve(value as Response);
        },
      );
    });
  }
}

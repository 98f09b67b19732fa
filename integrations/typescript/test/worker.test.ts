import assert from "node:assert/strict";
import { test } from "node:test";
import {
  Metadata,
  Server,
  ServerCredentials,
  status,
  type sendUnaryData,
  type ServerDuplexStream,
  type ServerUnaryCall,
} from "@grpc/grpc-js";
import { StopError } from "../src/errors.js";
import {
  codecs,
  type Codec,
  type PollSessionRequest,
  type PollSessionResponse,
  type SessionRequest,
  type SessionResponse,
} from "../src/messages.js";
import { Coordinator } from "../src/transport.js";
import { Worker } from "../src/worker.js";
import { assign, commit, commits, digests, genesisRecord, newWorker, welcome } from "./run.js";

/**
 * What the coordinator says to each message: round 1 was missed, round 2 is measured, 3 ends it.
 */
function reply(message: SessionRequest): SessionResponse[] {
  if (message.hello?.round === "1") return [welcome(1), assign(2)];
  if (message.answer) {
    return [commit(2), commit(3), { finished: { round: "3" } }];
  }
  return [];
}

function method(
  name: string,
  request: Codec<never>,
  response: Codec<never>,
  stream = false,
): object {
  return {
    path: `/fedmezo.v1.CoordinatorService/${name}`,
    requestStream: stream,
    responseStream: stream,
    requestDeserialize: request.decode,
    requestSerialize: request.encode,
    responseSerialize: response.encode,
    responseDeserialize: response.decode,
  };
}

/**
 * Serves the run of docs/vectors until the worker has left. The first calls fail in `failures`'
 * ways.
 */
async function serve(
  failures: { code: status; reason?: string }[],
): Promise<{ server: Server; address: string; received: SessionRequest[] }> {
  const received: SessionRequest[] = [];
  const waiting: SessionResponse[] = [];
  const server = new Server();
  const service = {
    GetRun: method(
      "GetRun",
      codecs.getRunRequest as Codec<never>,
      codecs.getRunResponse as Codec<never>,
    ),
    ReadJournal: method(
      "ReadJournal",
      codecs.readJournalRequest as Codec<never>,
      codecs.readJournalResponse as Codec<never>,
    ),
    Session: method(
      "Session",
      codecs.sessionRequest as Codec<never>,
      codecs.sessionResponse as Codec<never>,
      true,
    ),
    PollSession: method(
      "PollSession",
      codecs.pollSessionRequest as Codec<never>,
      codecs.pollSessionResponse as Codec<never>,
    ),
  };
  server.addService(
    service as never,
    {
      GetRun: (_: unknown, callback: sendUnaryData<unknown>) => {
        const failure = failures.shift();
        if (!failure)
          return callback(null, { protocol_version: 1, genesis: genesisRecord, round: "1" });
        const metadata = new Metadata();
        if (failure.reason) metadata.set("fedmezo-reason", failure.reason);
        metadata.set("fedmezo-retry-after-ms", "1");
        callback({ code: failure.code, details: "a sentence", metadata });
      },
      ReadJournal: (
        call: ServerUnaryCall<{ from_round?: string }, unknown>,
        callback: sendUnaryData<unknown>,
      ) =>
        callback(null, {
          entries: call.request.from_round === "1" ? [{ record: commits[0] }] : [],
        }),
      Session: (call: ServerDuplexStream<SessionRequest, SessionResponse>) => {
        call.on("data", (message: SessionRequest) => {
          received.push(message);
          for (const response of reply(message)) call.write(response);
        });
        call.on("end", () => call.end());
      },
      PollSession: (
        call: ServerUnaryCall<PollSessionRequest, PollSessionResponse>,
        callback: sendUnaryData<PollSessionResponse>,
      ) => {
        for (const message of call.request.messages ?? []) {
          received.push(message);
          waiting.push(...reply(message));
        }
        callback(null, { token: Buffer.alloc(16, 1), messages: waiting.splice(0) });
      },
    } as never,
  );
  const port = await new Promise<number>((resolve, reject) =>
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    ),
  );
  return { server, address: `127.0.0.1:${port}`, received };
}

for (const polls of [false, true]) {
  const way = polls ? "by polls" : "over a stream";
  test(`a worker catches up, answers and leaves, ${way}`, async () => {
    const { server, address, received } = await serve([
      { code: status.UNAVAILABLE, reason: "StartingError" },
      { code: status.INTERNAL },
    ]);
    const coordinator = new Coordinator(address, undefined);
    const { session, weights } = newWorker();
    const lines: string[] = [];
    await new Worker({
      coordinator,
      session,
      runId: "vectors",
      genesis: genesisRecord,
      polls,
      expectedKey: undefined,
      measure: () =>
        Promise.resolve({
          kind: "measured",
          measurement: { projectedGrads: [1, 2, 3, 4], meanLoss: 0.5 },
        }),
      log: (line) => void lines.push(line),
    }).run();
    coordinator.close();
    server.forceShutdown();
    assert.deepEqual(
      received.map((message) => Object.keys(message)[0]),
      ["hello", "answer", "weights_report"],
    );
    assert.equal(weights.digest().toString("hex"), digests[3]);
    assert.equal(lines.filter((line) => line.startsWith("Trying again")).length, 2);
  });
}

test("a refusal that no waiting mends stops the worker", async () => {
  const { server, address } = await serve([{ code: status.NOT_FOUND, reason: "WrongRunError" }]);
  const coordinator = new Coordinator(address, undefined);
  const { session } = newWorker();
  const worker = new Worker({
    coordinator,
    session,
    runId: "vectors",
    genesis: genesisRecord,
    polls: false,
    expectedKey: undefined,
    measure: () => Promise.reject(new Error("nothing is measured")),
    log: () => undefined,
  });
  await assert.rejects(
    worker.run(),
    (error) => error instanceof StopError && /WrongRunError/.test(error.message),
  );
  coordinator.close();
  server.forceShutdown();
});

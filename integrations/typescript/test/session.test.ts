import assert from "node:assert/strict";
import { test } from "node:test";
import { DisconnectError, DivergedError, StopError } from "../src/errors.js";
import { digest64 } from "../src/hashing.js";
import { codecs, type SessionRequest } from "../src/messages.js";
import type { Outcome, Session } from "../src/session.js";
import { assign, commit, commits, digests, heads, newWorker, welcome } from "./run.js";
import { vectors } from "./vectors.js";

const MEASURED: Outcome = {
  kind: "measured",
  measurement: { projectedGrads: [3.5, -1.25, 0.5, 8], meanLoss: Math.fround(0.69) },
};

function online(): ReturnType<typeof newWorker> {
  const worker = newWorker();
  worker.session.open();
  worker.session.receive(welcome(0));
  return worker;
}

test("the hello and the answer say what those of docs/vectors say", () => {
  const { messages } = vectors("session.json");
  const said = (says: string): SessionRequest => {
    const message = messages.find((known: { says: string }) => known.says.startsWith(says));
    return codecs.sessionRequest.decode(Buffer.from(message.bytes, "hex"));
  };
  const sent = (message: SessionRequest): SessionRequest =>
    codecs.sessionRequest.decode(codecs.sessionRequest.encode(message));
  const { session } = newWorker();
  // Fields that are 0 may be written or left out.
  const { hello } = said("introduces w1");
  assert.deepEqual(sent(session.open()).hello, { ...hello, round: "0" });
  session.receive(welcome(0));
  const { work } = session.receive(assign(1, { want_digest: true }));
  assert.ok(work);
  const { answer } = said("with the digest");
  assert.deepEqual(sent(session.finish(work, MEASURED).send[0]).answer, {
    ...answer,
    ticket: { ...answer?.ticket, slot: 0 },
  });
});

test("a run to its end", () => {
  const { session, weights } = online();
  for (const round of [1, 2, 3]) {
    assert.deepEqual(session.receive(commit(round)).send, []);
    assert.deepEqual(session.receive(commit(round)).send, [], "a commit that comes twice");
    assert.equal(weights.digest().toString("hex"), digests[round]);
  }
  const end = session.receive({ finished: { round: "3" } });
  assert.ok(end.left && session.left);
  assert.equal(
    Buffer.from(end.send[0].weights_report?.weights_digest ?? []).toString("hex"),
    digests[3],
  );
});

test("an answer names the digest if it is wanted, and the head otherwise", () => {
  const { session, weights } = online();
  const first = session.receive(assign(1)).work;
  assert.ok(first);
  const [plain] = session.finish(first, MEASURED).send;
  assert.equal(plain.answer?.head64, String(digest64(heads[0])));
  assert.equal(plain.answer?.weights_digest64, undefined);
  const second = session.receive(assign(1, { want_digest: true })).work;
  assert.ok(second, "another wish is another measurement");
  const [proved] = session.finish(second, MEASURED).send;
  assert.equal(proved.answer?.weights_digest64, String(digest64(weights.digest())));
  assert.equal(proved.answer?.head64, undefined);
});

test("a repeated assignment gets the same answer, with the new ticket", () => {
  const { session } = online();
  const { work } = session.receive(assign(1));
  assert.ok(work);
  assert.equal(session.receive(assign(1)).work, undefined, "it is measured already");
  session.close();
  assert.deepEqual(session.finish(work, MEASURED).send, [], "nobody is there to hear it");
  session.open();
  session.receive(welcome(0, 2));
  const again = session.receive(assign(1, { ticket: { epoch: 2, round: "1" } }));
  assert.equal(again.work, undefined);
  assert.deepEqual(again.send[0].answer?.ticket, { epoch: 2, round: "1", slot: 0 });
  assert.deepEqual(again.send[0].answer?.projected_grads, [3.5, -1.25, 0.5, 8]);
});

test("a commit overtakes a measurement, and does not move its weights", () => {
  const { session, weights } = online();
  const { work } = session.receive(assign(1));
  assert.ok(work);
  session.receive(commit(1));
  assert.equal(work.wanted(), false);
  assert.ok(work.weights.every((values) => values.every((value) => value === 0)));
  assert.equal(weights.digest().toString("hex"), digests[1]);
  assert.equal(session.receive(assign(2)).work, undefined, "one measurement at a time");
  const reaction = session.finish(work, MEASURED);
  assert.deepEqual(reaction.send, []);
  assert.equal(reaction.work?.round, 2n);
});

test("a worker that cannot measure says so in at most 512 characters", () => {
  const { session } = online();
  const { work } = session.receive(assign(1));
  assert.ok(work);
  const [message] = session.finish(work, { kind: "unable", reason: "x".repeat(600) }).send;
  assert.equal(message.unable?.reason.length, 512);
});

const other = Buffer.alloc(32, 7);
const longer = codecs.record.encode({ committed: { round: "1", decay: 0.5 } });
const cases: readonly (readonly [
  string,
  new (what: string) => Error,
  (session: Session) => unknown,
])[] = [
  ["a gap", DisconnectError, (s) => s.receive(commit(2))],
  [
    "a second history",
    DisconnectError,
    (s) => [commit(1), { commit: { record: longer } }].map((m) => s.receive(m)),
  ],
  ["an assignment of a later round", DisconnectError, (s) => s.receive(assign(2))],
  [
    "an assignment of another start",
    DisconnectError,
    (s) => s.receive(assign(1, { ticket: { epoch: 2, round: "1" } })),
  ],
  ["an end of another round", DisconnectError, (s) => s.receive({ finished: { round: "3" } })],
  ["a second welcome", DisconnectError, (s) => s.receive(welcome(0))],
  [
    "a worker that was sent away",
    DisconnectError,
    (s) => s.receive({ refused: { reason: "UnknownWorkerError" } }),
  ],
  [
    "a session that ended as diverged",
    DivergedError,
    (s) => s.receive({ ended: { reason: "DivergedError" } }),
  ],
  ["no steps", StopError, (s) => s.receive(assign(1, { steps: 0 }))],
  ["two steps", StopError, (s) => s.receive(assign(1, { steps: 2 }))],
  ["offsets of another count", StopError, (s) => s.receive(assign(1, { seed_offsets: [1] }))],
  [
    "a seed beyond 64 bits",
    StopError,
    (s) => s.receive(assign(1, { first_seed: "18446744073709551613" })),
  ],
  ["an eps of 0", StopError, (s) => s.receive(assign(1, { eps: 0 }))],
  ["an infinite rate", StopError, (s) => s.receive(assign(1, { learning_rate: Infinity }))],
  ["an unknown kind", StopError, (s) => s.receive({})],
  [
    "an acknowledgement of another head",
    StopError,
    (s) => s.receive({ ack: { ticket: { round: "1" }, head: other } }),
  ],
];
for (const [what, kind, act] of cases) {
  test(`${what}: ${kind.name}`, () => {
    const { session, weights } = online();
    assert.throws(() => act(session), kind);
    assert.ok([digests[0], digests[1]].includes(weights.digest().toString("hex")));
  });
}

test("a welcome of another history stops, and one that went back waits", () => {
  const { session } = online();
  session.receive(commit(1));
  session.close();
  session.open();
  assert.throws(() => session.receive(welcome(0)), DisconnectError);
  session.open();
  assert.throws(() => session.receive(welcome(1, 0)), DisconnectError);
  session.open();
  assert.throws(
    () => session.receive({ welcome: { epoch: 1, round: "1", head: other } }),
    StopError,
  );
  session.open();
  session.receive({ welcome: { epoch: 1, round: "2", head: other } });
  assert.throws(() => session.receive(commit(2)), StopError);
});

test("what was measured before a rebuild does not count", () => {
  const { session } = online();
  const { work } = session.receive(assign(1));
  assert.ok(work);
  session.reset();
  session.open();
  session.receive(welcome(0));
  assert.equal(work.wanted(), false);
  assert.equal(session.receive(assign(1)).work, undefined, "one measurement at a time");
  const reaction = session.finish(work, MEASURED);
  assert.deepEqual(reaction.send, []);
  assert.ok(reaction.work?.wanted());
});

test("a rebuild begins from the base, and the journal leads back", () => {
  const { session, weights } = online();
  session.receive(commit(1));
  session.reset();
  assert.equal(session.round, 0n);
  for (const record of commits) assert.ok(session.apply(record));
  assert.equal(weights.digest().toString("hex"), digests[3]);
});

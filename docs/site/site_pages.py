"""Pages of the documentation site that no file holds: the reference, and the files that pages link.

MkDocs calls `on_files` and `on_page_markdown` (`hooks` in mkdocs.yml). The documents are written to
be read in the repository, too, so their links lead to files there. Here each of those files becomes
a page, and the links are turned to it.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.site.reference import reference_pages

ROOT = Path(__file__).parents[2]
HOME = {"README.md": "index.md", "docs/README.md": "documents.md"}
"""Files of the repository whose pages have other names."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)", re.DOTALL)
FENCED = re.compile(r"^(`{3,}).*?^\1", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".proto": "protobuf", ".toml": "toml", ".sh": "sh", ".yaml": "yaml"}


def site_path(path: str) -> str:
    """The page or picture of the site that stands for a file of the repository."""
    if path in HOME:
        return HOME[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def repository_path(uri: str) -> str:
    """The file of the repository that a page stands for."""
    for path, page in HOME.items():
        if uri == page:
            return path
    if uri.startswith("source/"):
        path = uri.removeprefix("source/")
        return path if (ROOT / path).is_file() else path.removesuffix(".md")
    return f"docs/{uri}"


def links_in(text: str, path: str) -> Iterator[str]:
    """Files and folders of the repository that the document at `path` links to."""
    for _, target, _ in LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:"):
            yield _target(path, target)


def _target(path: str, target: str) -> str:
    """A link's target as a path in the repository; a folder with a README stands for that."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    readme = f"{found}/README.md"
    return readme if (ROOT / readme).is_file() else found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file of the documents' folder holds."""
    for home in HOME.values():
        _remove(files, home)
    _remove(files, "README.md")
    waiting = [*HOME, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        source = ROOT / path
        if not source.is_file():
            continue
        if path in HOME or not path.startswith("docs/"):
            files.append(File.generated(config, site_path(path), content=_shown(source)))
        if source.suffix == ".md":
            new = set(links_in(source.read_text(), path)) - seen
            seen |= new
            waiting += new
    for uri, text in reference_pages():
        files.append(File.generated(config, uri, content=text))
    return files


def _remove(files: Files, uri: str) -> None:
    found = files.get_file_from_path(uri)
    if found is not None:
        files.remove(found)


def _shown(source: Path) -> str:
    """A file as a page: a document as it is, anything else as code."""
    text = source.read_text()
    if source.suffix == ".md":
        return text
    name = source.relative_to(ROOT).as_posix()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    language = LANGUAGES.get(source.suffix, "text")
    return f"# {name}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository to their pages; leave out those without one."""
    path = repository_path(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        opening, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        uri = site_path(_target(path, target))
        if files.get_file_from_path(uri) is None:
            return opening.strip("![](")  # A folder, or a file that is no text.
        return f"{opening}{_relative(uri, page.file.src_uri)}{anchor})"

    turned_text, end = "", 0
    for fenced in FENCED.finditer(markdown):
        turned_text += LINK.sub(turned, markdown[end : fenced.start()]) + fenced[0]
        end = fenced.end()
    return turned_text + LINK.sub(turned, markdown[end:])


def _relative(uri: str, page: str) -> str:
    return PurePosixPath(os.path.relpath(uri, posixpath.dirname(page) or ".")).as_posix()

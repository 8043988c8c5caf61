"""Builds over 200 MB of mixed text from Debian packages: five sources, each in another format.

In: packages of the machine's own Debian mirror (apt-get download), or .deb files that are there already.
Out: OUTPUT/text/SOURCE/..., OUTPUT/licences/PACKAGE.txt and OUTPUT/shard.yaml, the settings that `blt shard` reads
them with. The same packages give the same text. README.md beside this file says what it is and under what licences;
nothing of it is shipped with the sources of this repository.

    python data/fetch_mixed.py OUTPUT [--debs DIRECTORY]
    blt shard --config OUTPUT/shard.yaml output=OUTPUT/documents
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = ("debian-handbook", "gnome-user-docs", "manpages-zh", "linux-doc-6.1", "linux-source-6.1")
# About 105 MB of C; the whole kernel is over 1 GB.
KERNEL_DIRECTORIES = ("block", "crypto", "fs", "init", "ipc", "kernel", "lib", "mm", "net", "security")

# Elements of XHTML and of Mallard (GNOME's help) that hold no prose: style, navigation, names of revisions and authors.
_LEFT_OUT = {"head", "info", "script", "style"}
_NAVIGATION = {"banner", "docnav"}
_PREFORMATTED = {"pre", "screen"}
_BLOCKS = {
    *("body", "div", "p", "h1", "h2", "h3", "h4", "h5", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr"),
    *("page", "section", "title", "subtitle", "item", "list", "steps", "terms", "note", "example", "media"),
    *_PREFORMATTED,
}

# A few documents are not UTF-8: their bytes go into the JSON as they are, for the reader to find.
_BROKEN = "surrogateescape"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where in its package it stood."""

    id: str
    language: str
    text: str


def main() -> None:
    """Fetch, extract and print the figures of each source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--debs", type=Path, metavar="DIRECTORY", help="packages that are there: nothing is fetched")
    options = parser.parse_args()
    output: Path = options.output.resolve()
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output}: is not empty; give a directory that is, or none")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix="unpacked-") as unpacked:
        roots = {name: unpack(name, options.debs, Path(unpacked)) for name in PACKAGES}
        write_sources(roots, output / "text")
        for name, root in roots.items():
            copyright_file = root / "usr/share/doc" / name / "copyright"
            (output / "licences").mkdir(exist_ok=True)
            shutil.copy(copyright_file, output / "licences" / f"{name}.txt")
    (output / "shard.yaml").write_text(shard_settings(output / "text"))
    for source in sorted((output / "text").iterdir()):
        files = [path for path in source.rglob("*") if path.is_file()]
        print(
            f"{source.name}: {len(files)} files, {sum(path.stat().st_size for path in files)} bytes as they are stored"
        )


def unpack(name: str, debs: Path | None, directory: Path) -> Path:
    """The directory that the package `name` was unpacked into; SystemExit if it cannot be had."""
    if debs is None:
        subprocess.run(["apt-get", "download", name], cwd=directory, check=True, stdout=sys.stderr)
    found = sorted((debs or directory).glob(f"{name}_*.deb"))
    if not found:
        sys.exit(f"{debs}: no {name}_*.deb here")
    root = directory / name
    subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(root)], check=True)
    print(found[-1].name)
    return root


def write_sources(roots: dict[str, Path], text: Path) -> None:
    """Every source in its own directory below `text`, each in a format of its own."""
    handbook = list(handbook_pages(roots["debian-handbook"] / "usr/share/doc/debian-handbook/html"))
    for language in sorted({page.language for page in handbook}):
        lines = json_lines(page for page in handbook if page.language == language)
        zstd = pa.Codec("zstd", compression_level=9)
        _write(text / "handbook" / f"{language}.jsonl.zst", zstd.compress(lines, asbytes=True))
    write_parquet(text / "gnome-help" / "pages.parquet", gnome_pages(roots["gnome-user-docs"] / "usr/share/help"))
    for path, content in unzipped_files(roots["manpages-zh"] / "usr/share/man"):
        _write(text / "manpages-zh" / f"{path}.txt", content)
    documentation = kernel_documents(roots["linux-doc-6.1"] / "usr/share/doc/linux-doc-6.1")
    _write(text / "kernel-doc" / "documents.jsonl", json_lines(documentation))
    for path, content in kernel_code(roots["linux-source-6.1"] / "usr/src/linux-source-6.1.tar.xz"):
        _write(text / "kernel-code" / path, content)


def handbook_pages(root: Path) -> Iterator[Document]:
    """The Debian Administrator's Handbook, a document for each page of each of its languages."""
    for path in sorted(root.glob("*/*.html")):
        yield Document(id=str(path.relative_to(root)), language=path.parent.name, text=plain_text(path))


def gnome_pages(root: Path) -> Iterator[Document]:
    """GNOME's help, a document for each page of each of its languages."""
    for path in sorted(root.glob("*/*/*.page")):
        name = path.relative_to(root)
        yield Document(id=str(name), language=name.parts[0], text=plain_text(path))


def kernel_documents(root: Path) -> Iterator[Document]:
    """The kernel's documentation; what is in Documentation/ stands, for the most part, in html/_sources/ once more."""
    for path in sorted((root / "html/_sources").rglob("*.txt")):
        yield Document(id=str(path.relative_to(root)), language="en", text=path.read_text(encoding="utf-8"))
    for name, content in unzipped_files(root / "Documentation"):
        yield Document(id=f"Documentation/{name}", language="en", text=content.decode(errors=_BROKEN))


def kernel_code(archive: Path) -> Iterator[tuple[str, bytes]]:
    """C files below KERNEL_DIRECTORIES, and their contents, as they stand in the archive."""
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if member.isfile() and path.split("/")[0] in KERNEL_DIRECTORIES and path.endswith((".c", ".h")):
                content = tar.extractfile(member)
                assert content is not None
                yield path, content.read()


def unzipped_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Path below `root`, without .gz, and content of each .gz file."""
    for path in sorted(root.rglob("*.gz")):
        if not path.is_symlink():
            yield str(path.relative_to(root).with_suffix("")), gzip.decompress(path.read_bytes())


def plain_text(path: Path) -> str:
    """The prose of an XHTML or Mallard page: a line for each paragraph, white space made one space but in listings."""
    parts = ["\n"]
    _collect(ET.parse(path).getroot(), parts, preformatted=False)
    lines = "".join(parts).split("\n")
    kept = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(kept) + "\n" if kept else ""


def _collect(element: ET.Element, parts: list[str], preformatted: bool) -> None:
    """Append the text of an element: a newline before and after blocks, other white space as it is to be."""
    name = str(element.tag).rpartition("}")[2]
    if name in _LEFT_OUT or _NAVIGATION & {element.get("id"), *element.get("class", "").split()}:
        return
    if name in _BLOCKS:
        parts.append("\n")
    inside = preformatted or name in _PREFORMATTED
    _append(parts, element.text, inside)
    for child in element:
        _collect(child, parts, inside)
        _append(parts, child.tail, inside)
    if name in _BLOCKS:
        parts.append("\n")


def _append(parts: list[str], text: str | None, preformatted: bool) -> None:
    """Append text, its runs of white space made one space, and none at the start of a line, unless preformatted."""
    if not text or preformatted:
        parts.append(text or "")
        return
    words = " ".join(text.split())
    before = " " if text[0].isspace() and not parts[-1].endswith(("\n", " ")) else ""
    after = " " if words and text[-1].isspace() else ""
    parts.append(before + words + after)


def json_lines(documents: Iterable[Document]) -> bytes:
    """The documents as JSON, one a line."""
    records = ({"id": d.id, "language": d.language, "text": d.text} for d in documents)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(errors=_BROKEN)


def write_parquet(path: Path, documents: Iterable[Document]) -> None:
    """The documents as a Parquet file of columns id, language and text."""
    rows = list(documents)
    table = pa.table({name: [getattr(row, name) for row in rows] for name in ("id", "language", "text")})
    path.parent.mkdir(parents=True)
    pq.write_table(table, path, row_group_size=2000, compression="zstd")


def shard_settings(text: Path) -> str:
    """Settings of `blt shard` for all sources below `text`."""
    formats = {"manpages-zh": "txt", "kernel-code": "binary"}
    sources = [
        {"name": path.name, "input": [str(path)], "format": formats.get(path.name, "auto")}
        for path in sorted(text.iterdir())
    ]
    lines = "\n".join(f"  - {json.dumps(source)}" for source in sources)
    head = "# Written by data/fetch_mixed.py. Over a third of kernel-doc is there twice."
    return f"{head}\ndedup: true\nsources:\n{lines}\n"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    main()

"""The words that character tasks are made of: a corpus in, its commonest words of some lengths out."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from blt.errors import DataError
from pipelines.shard.config import SourceConfig
from pipelines.shard.files import find_files
from pipelines.shard.plan import Unit
from pipelines.shard.reader import Rejected, UnitReader

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 2**26

_WORD = re.compile(r"(?<![\w'\u2019])[^\W\d_]+(?![\w'\u2019])")
"""A run of letters of any script with no digit, underscore or apostrophe beside it."""


def read_texts(source: SourceConfig, most_bytes: int) -> Iterator[str]:
    """The texts of a source, in the order of its files, until `most_bytes` are read. DataError if there is none.

    Rows that are no documents are passed over and counted in the log, as is text that is not read.
    """
    num_bytes = num_documents = num_rejected = 0
    for rank, file in enumerate(find_files(source)):
        for row in UnitReader(Unit(file=file, rank=rank), source, MAX_LINE_BYTES):
            if isinstance(row, Rejected):
                num_rejected += row.rows
                continue
            if num_bytes >= most_bytes:
                break
            num_bytes, num_documents = num_bytes + len(row.text), num_documents + 1
            yield row.text.decode("utf-8", "replace")
    logger.info("words from documents=%d bytes=%d rejected_rows=%d", num_documents, num_bytes, num_rejected)
    if not num_documents:
        raise DataError(f"{', '.join(source.input)}: no document to take words from ({num_rejected} rows rejected)")


def common_words(texts: Iterable[str], *, min_letters: int, max_letters: int, most: int) -> tuple[str, ...]:
    """The commonest words, the commonest first, equally common ones by their letters.

    Words with a capital letter are left out, since most are names, and so are words of one letter repeated.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
    fitting = [
        word
        for word in counts
        if min_letters <= len(word) <= max_letters and word == word.lower() and len(set(word)) > 1
    ]
    return tuple(sorted(fitting, key=lambda word: (-counts[word], word))[:most])

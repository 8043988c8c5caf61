"""Bytes and text as a person sees them: bytes in as they come, whole characters out, with what is none made visible."""

import codecs
import unicodedata
from collections.abc import Sequence

PATCH_BORDER = "│"
"""Stands before the first byte of a patch."""

_HIDDEN = ("Cc", "Cf", "Cs", "Cn")


def visible(text: str) -> str:
    """The text with control characters, half surrogates and the like as escapes; newlines and tabs stay."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _HIDDEN and c not in "\n\t" else c
        for c in text
    )


class ShownText:
    """UTF-8 text that comes in pieces, cut anywhere; a character is shown once it is whole.

    Bytes that are no UTF-8 are shown as U+FFFD; with `patches`, which marks where patches start and reads each patch by
    itself, as escapes, so that a character that is cut by a border is seen byte by byte. `escape` is for terminals,
    which obey control characters: these are shown as escapes too.
    """

    def __init__(self, *, patches: bool = False, escape: bool = False) -> None:
        self._patches, self._escape = patches, escape
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace" if patches else "replace")

    def add(self, data: bytes, starts: Sequence[bool]) -> str:
        """What can be shown now that these bytes are there; `starts` says of each whether it starts a patch."""
        if not self._patches:
            return self._decoded(data)
        shown = ""
        for byte, starts_patch in zip(data, starts, strict=True):
            if starts_patch:
                shown += self.end() + PATCH_BORDER
            shown += self._decoded(bytes([byte]))
        return shown

    def end(self) -> str:
        """What is left of a character that does not become whole."""
        return self._decoded(b"", final=True)

    def _decoded(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        return visible(text) if self._escape else text

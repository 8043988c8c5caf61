"""What makes bytes unfit to be a document, in the words of the quarantine."""


def refused(text: bytes | bytearray, max_line_bytes: int, keep_invalid: bool) -> str | None:
    """Why `text` cannot be a document, or None."""
    if len(text) > max_line_bytes:
        return too_long(len(text), max_line_bytes)
    if keep_invalid:
        return None
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 (byte {error.start})"
    return None


def too_long(size_bytes: int, max_line_bytes: int) -> str:
    return f"longer than max_line_bytes={max_line_bytes}: {size_bytes} bytes or more"

"""HTML pages that need nothing else: templates and values in, the text of a page out, and into its file at once.

Every value goes through the templates' escaping, so that no text becomes markup; what a page holds beside values (its
style and its script) stands in the templates' directory.
"""

import functools
import hashlib
from pathlib import Path

import jinja2

from blt.checkpoint import replace_file
from jobs.shown_text import visible
from pipelines.storage import Storage

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **values: object) -> str:
    """The page that a template makes of these values; every name that it uses has to be among them."""
    return _environment().get_template(template).render(**values)


def template_fingerprint() -> str:
    """Hex sha256 of all templates: a page made with others is not up to date."""
    digest = hashlib.sha256()
    for path in sorted(TEMPLATES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_page(output: str, page: str) -> None:
    """Make or replace the file, or the object of s3://, at once: a reader finds it whole."""
    data = page.encode("utf-8", "backslashreplace")
    if "://" in output:
        directory, _, name = output.rpartition("/")
        Storage(directory).write_replace(name, data)
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(data))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["visible"] = visible
    return environment

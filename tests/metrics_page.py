"""The metrics page of the Ray that this process is on."""

import time
import urllib.request
from collections.abc import Callable, Mapping

import ray

_SECONDS_TO_APPEAR = 100.0
"""Tests that wait for figures have a timeout above it."""


def wait_for_figures(figures_of: Callable[[str], dict[str, float]], wanted: Mapping[str, object]) -> dict[str, float]:
    """Look until those that are found in the page's text have what is wanted among them; all that are found then."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not _holds(found := figures_of(_text()), wanted):
        assert time.monotonic() < deadline, f"{found}, wanted {wanted}"
        time.sleep(0.2)
    return found


def _holds(found: Mapping[str, float], wanted: Mapping[str, object]) -> bool:
    return all(name in found and found[name] == value for name, value in wanted.items())


def _text() -> str:
    """Nothing where the page does not answer: Ray's agent may be busy or not there yet."""
    port = ray.nodes()[0]["MetricsExportPort"]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            return str(page.read().decode())
    except OSError:
        return ""

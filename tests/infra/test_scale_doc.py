"""docs/scale.md: its tables are those that infra/scale.py prints, and what they rest on holds together."""

import re

import pytest

from infra.scale import TABLES, Assumed, Measured, main, run_of
from tests.infra.tools import ROOT

DOCUMENT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
ASSUMED = Assumed()


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_that_are_printed(name: str) -> None:
    assert TABLES[name](ASSUMED) in DOCUMENT, "python -m infra.scale prints what belongs there"


def test_measured_figures_are_those_of_the_other_page() -> None:
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    (feed,) = re.findall(r"^\| text per CPU-second, whole feed \| (\d+) MB", performance, re.MULTILINE)
    (stored,) = re.findall(r"`stored_beyond_text` \(([\d.]+) in all", performance)
    measured = Measured()
    assert measured.feed_bytes_per_core_second == float(feed) * 1e6
    assert measured.stored_bytes_per_byte == float(stored)


@pytest.mark.parametrize("name", ["blt_1b", "blt_8b"])
def test_more_gpus_and_slower_networks(name: str) -> None:
    few, many = run_of(name, 8, ASSUMED), run_of(name, 64, ASSUMED)
    assert many.bytes_per_second(ASSUMED) == pytest.approx(8 * few.bytes_per_second(ASSUMED))
    assert many.update_bytes == few.update_bytes
    assert many.traffic.total < few.traffic.total, "fewer micro-batches for each"
    assert many.network_seconds(ASSUMED, 1e9) == pytest.approx(4 * many.network_seconds(ASSUMED, 4e9))


def test_prices_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--gpu-hour", "6"])
    shown = capsys.readouterr().out
    assert "1,990 GPU-h, $11,900" in shown
    assert "1,990 GPU-h, $5,960" in DOCUMENT

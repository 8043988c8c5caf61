"""Credentials that a user puts in the wrong place: every command refuses them without showing them."""

import json

import pytest

from jobs.cluster.places import PLACES
from jobs.command_line import main

PLANTED = "planted-secret-value"
URIS = (f"s3://key:{PLANTED}@bucket/x", f"https://bucket.example/x?X-Amz-Signature={PLANTED}")
GIVEN: dict[str, tuple[str, ...]] = {
    "shard": ("input=[s3://b/i]", "output=s3://b/o"),
    "train-entropy": ("--config", "entropy_100m", "documents=s3://b/d", "output=s3://b/o"),
    "calibrate": ("documents=s3://b/d", "entropy_model=s3://b/e", "output=s3://b/o"),
    "patch": ("documents=s3://b/d", "output=s3://b/o"),
    "train": ("--config", "blt_400m", "data=s3://b/d", "output=s3://b/o"),
    "eval": ("model=s3://b/m", "input=[s3://b/i]", "output=s3://b/o"),
    "eval harness": ("model=s3://b/m", "tasks=[a]"),
    "eval characters": ("model=s3://b/m", "words=[s3://b/w]"),
    "generate": ("model=s3://b/m",),
    "bench patch": ("documents=s3://b/d", "entropy_model=s3://b/e"),
    "bench feed": (),
    "bench goodput": (),
    "bench generate": (),
}
"""What each command must be given."""


PLACES_TRIED = [
    (command, key)
    for command in GIVEN
    for key in PLACES[command]
    if (command, key) != ("bench patch", "patch.reuse_entropies")  # refused with any value
]


def test_every_command_with_places_is_tried() -> None:
    assert set(GIVEN) == {command for command, keys in PLACES.items() if keys}


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize(("command", "key"), PLACES_TRIED)
def test_in_an_uri(command: str, key: str, uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is done, so that it is in no log, record or request."""
    given = list(GIVEN[command])
    if key in ("sources.input", "data"):  # in place of input
        given = [one for one in given if not one.startswith("input=")]
    setting = f"sources=[{{name: a, input: '{uri}'}}]" if key == "sources.input" else f"{key}={uri}"
    assert main([*command.split(), "--verbose", *given, setting]) == 2
    captured = capfd.readouterr()
    assert "carries credentials" in json.loads(captured.out.splitlines()[-1])["error"]
    assert PLANTED not in captured.out + captured.err


@pytest.mark.parametrize("setting", ["seed={}", "sources=[{{name: {}}}]", "valid_fraction=[{}]"])
def test_where_it_does_not_belong(setting: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The error shows what was given, without what stands before the host; so does the detailed log."""
    given = ("shard", "--verbose", "input=[x]", f"output={URIS[0]}")
    assert main([*given, setting.format(URIS[0])]) == 2
    captured = capfd.readouterr()
    assert "Traceback" in captured.err
    assert PLANTED not in captured.out + captured.err

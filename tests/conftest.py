"""Test session setup: environment variables that Ray and Torch read at import, threads, hypothesis settings.

Markers are declared in pyproject.toml. Fixtures that only one part of the tree needs live in that part's conftest.py.
"""

import contextlib
import os
from collections.abc import Iterator

# Before any test imports ray: it reads these once. Local sessions listen on loopback alone, so they need no token.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # report() waits for this poll: 2 s by default
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compute threads that wait let others have the cores: tests run many processes on few of them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Parity tests build transformers models from configurations, never from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from tests.s3_server import S3Server, s3_environment, s3_server

torch.set_num_threads(min(2, os.cpu_count() or 1))

# A first example pays for imports and kernels, so wall time says nothing; the same examples on every machine.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


SHARED_RAY = pytest.StashKey[contextlib.ExitStack]()


@pytest.fixture(scope="session")
def ray_local(request: pytest.FixtureRequest) -> Iterator[None]:
    """An embedded Ray of 4 CPUs, shared by all tests marked `ray` of a session."""
    if any("s3" in item.fixturenames for item in request.session.items if isinstance(item, pytest.Function)):
        request.getfixturevalue("s3")  # first, because Ray's workers keep the environment of their start
    with contextlib.ExitStack() as shared:
        request.config.stash[SHARED_RAY] = shared
        _begin_ray(shared)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin the shared Ray again after a test with raylets of its own, which ends the one that its process is on."""
    shared = item.config.stash.get(SHARED_RAY, None)
    if shared is None or "ray_local" not in getattr(item, "fixturenames", ()):
        return
    import ray

    if not ray.is_initialized():
        shared.close()
        _begin_ray(shared)


def _begin_ray(shared: contextlib.ExitStack) -> None:
    from jobs.ray_session import ray_session

    shared.enter_context(ray_session(num_cpus=4))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, shared by all tests marked `s3` of a session. The environment names it from then on, to this
    process and to those that it starts, Ray's workers among them; each test takes a prefix of its own.
    """
    with s3_server(tmp_path_factory.mktemp("s3")) as server, s3_environment(server.environment):
        yield server

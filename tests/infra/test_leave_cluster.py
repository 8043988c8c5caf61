"""A pod that is deleted: Ray is told, the node ends once nothing runs on it, and waiting for it has an end."""

import socket
import time
from collections.abc import Iterator

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from infra.docker.leave_cluster import alive, answers, leave, main, node_at
from tests.raylets import raylets

ALIVE, DEAD = GcsNodeInfo.GcsNodeState.ALIVE, GcsNodeInfo.GcsNodeState.DEAD


def node(id: int, address: str, state: int = ALIVE) -> GcsNodeInfo:
    return GcsNodeInfo(node_id=bytes([id]), node_manager_address=address, state=state)  # type: ignore[arg-type]


def test_the_node_at_an_address() -> None:
    nodes = [node(1, "10.0.0.1"), node(2, "10.0.0.2", DEAD), node(3, "10.0.0.2")]
    assert node_at(nodes, "10.0.0.2") == "03"
    with pytest.raises(ValueError, match=r"0 live nodes at 10\.0\.0\.3, expected one"):
        node_at(nodes, "10.0.0.3")
    with pytest.raises(ValueError, match=r"2 live nodes at 10\.0\.0\.1"):
        node_at([*nodes, node(4, "10.0.0.1")], "10.0.0.1")


def test_a_cluster_that_goes_as_a_whole_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert answers(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main(60) == 0
    assert f"no head at {address}" in capsys.readouterr().err


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with raylets(head_cpus=0, nodes=2) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_leaves(cluster: Cluster) -> None:
    """One without work ends by itself; one with work is left at the deadline, and takes no new work."""

    @ray.remote(num_cpus=1)
    class Work:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    gcs = GcsClient(address=cluster.address)
    actor = Work.remote()
    busy: str = ray.get(actor.node.remote())
    (idle,) = {info.node_id.hex() for info in workers(gcs)} - {busy}
    assert leave(gcs, idle, seconds=60) is True
    assert {info.node_id.hex() for info in workers(gcs)} == {busy}
    started = time.monotonic()
    assert leave(gcs, busy, seconds=2) is False
    assert 2 <= time.monotonic() - started < 20


def workers(gcs: GcsClient) -> list[GcsNodeInfo]:
    return [info for info in alive(gcs.get_all_node_info(timeout=10).values()) if not info.is_head_node]

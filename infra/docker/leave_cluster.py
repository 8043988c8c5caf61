"""Announce to Ray that this node goes, and wait until its work has left: what a pod does before it is stopped.

    python leave_cluster.py SECONDS

Kubernetes runs it (`preStop`) when it deletes a pod, which is also what the notice of a spot instance comes to.
Training sees the announcement, saves between two steps and goes on without the node (pipelines/train/elastic.py);
the raylet ends by itself once nothing runs on it. It returns then, or after SECONDS, and Kubernetes sends SIGTERM.
In: RAY_ADDRESS and RAY_AUTH_TOKEN, as every pod of a cluster has them. Exit status 1 if the announcement was refused.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo

POLL_SECONDS = 1.0
CONNECT_SECONDS = 5.0


class Gcs(Protocol):
    """What is asked of Ray's control service."""

    def get_all_node_info(self, timeout: float | None = None) -> Mapping[Any, GcsNodeInfo]: ...

    def drain_node(self, node_id: str, reason: int, message: str, deadline_ms: int) -> tuple[bool, str]: ...


def node_at(nodes: Iterable[GcsNodeInfo], address: str) -> str:
    """Hex id of the live node at an IP address. ValueError unless there is exactly one."""
    found = [node.node_id.hex() for node in alive(nodes) if node.node_manager_address == address]
    if len(found) != 1:
        raise ValueError(f"{len(found)} live nodes at {address}, expected one")
    return found[0]


def alive(nodes: Iterable[GcsNodeInfo]) -> list[GcsNodeInfo]:
    return [node for node in nodes if node.state == GcsNodeInfo.GcsNodeState.ALIVE]


def leave(gcs: Gcs, node_id: str, seconds: float) -> bool:
    """Announce that a node is gone in `seconds`; whether it ended before. RuntimeError if Ray refuses."""
    deadline = time.time() + seconds
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, message = gcs.drain_node(node_id, reason, "the pod is being deleted", int(deadline * 1000))
    if not accepted:
        raise RuntimeError(f"Ray refused to drain {node_id}: {message}")
    while time.time() < deadline:
        if node_id not in {node.node_id.hex() for node in alive(gcs.get_all_node_info(timeout=10).values())}:
            return True
        time.sleep(POLL_SECONDS)
    return False


def answers(address: str) -> bool:
    """Whether anything listens at HOST:PORT; Ray's client would try for half a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def main(seconds: float) -> int:
    address = os.environ["RAY_ADDRESS"]
    if not answers(address):
        sys.stderr.write(f"no head at {address}: the cluster goes as a whole\n")
        return 0
    gcs = GcsClient(address=address)
    node_id = node_at(gcs.get_all_node_info(timeout=10).values(), ray.util.get_node_ip_address())
    try:
        ended = leave(gcs, node_id, seconds)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(f"node {node_id} {'ended by itself' if ended else f'still had work after {seconds:g} s'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))

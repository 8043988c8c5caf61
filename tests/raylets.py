"""A cluster of several raylets on this machine: CPUs and fake GPUs in, a `Cluster` that this process is on out."""

import contextlib
from collections.abc import Iterator

import ray
from ray.cluster_utils import Cluster

from jobs.ray_session import patient_start


@contextlib.contextmanager
def raylets(head_cpus: int, nodes: int, gpus: int = 0) -> Iterator[Cluster]:
    """A head, and nodes of one CPU and as many GPUs that are not there, with ports and a directory of their own; nodes
    may be added from any thread.
    """
    ray.shutdown()
    head = {"num_cpus": head_cpus, "include_dashboard": False, "dashboard_port": 0}
    with patient_start():
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=1, num_gpus=gpus)
            ray.init(address=cluster.address, logging_level="warning", log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()

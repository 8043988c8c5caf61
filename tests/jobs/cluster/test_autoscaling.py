"""Ray's autoscaler under a command: nodes come up for actors that wait for them, and go when nothing is left to do."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from pipelines.manifest import read_manifest
from pipelines.patch.commit import read_commits, read_plan
from pipelines.storage import Storage
from tests import waiting
from tests.pipelines.patch.corpus import prose, write_documents
from tests.ray_head import Autoscaler, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(180)]

NUM_SHARDS, NUM_NODES = 12, 2
PATIENCE_SECONDS = 60.0
wait_for = functools.partial(waiting.wait_for, seconds=PATIENCE_SECONDS)
SETTINGS = (
    *("rule.kind=space", "rule.max_patch_length=64", "row_group_bytes=4000"),  # no model, which fake GPUs could not run
    *("device=cuda", "gpus_per_actor=1", f"min_actors={NUM_NODES}", f"max_actors={NUM_NODES}"),
    "wait_for_resources=true",
)


def gpu_nodes(gcs: GcsClient) -> dict[str, bool]:
    """Whether it is alive, for every node with a GPU that there has been, by its id."""
    return {
        node_id.hex(): node.state == GcsNodeInfo.ALIVE
        for node_id, node in gcs.get_all_node_info(timeout=10).items()
        if node.resources_total.get("GPU")
    }


def test_nodes_come_for_waiting_actors_and_go_when_idle(tmp_path: Path) -> None:
    texts = [prose(seed, 200_000) for seed in range(2)]
    shards = {f"train/shard-{i:05d}.parquet": texts for i in range(NUM_SHARDS)}
    documents = write_documents(tmp_path / "documents", shards)
    output = str(tmp_path / "patches")
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000}
    autoscaler = Autoscaler(node_resources=resources, max_nodes=NUM_NODES + 1, idle_seconds=3.0)
    command = [sys.executable, "-m", "jobs", "patch", f"documents={documents}", f"output={output}", *SETTINGS]
    with ray_head({"RAY_AUTH_MODE": "disabled"}, num_cpus=1, autoscaler=autoscaler) as head:
        gcs = GcsClient(address=head.gcs_address)
        assert gpu_nodes(gcs) == {}
        environment = {**os.environ, "RAY_ADDRESS": head.gcs_address}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as job:
            try:
                wait_for(lambda: sum(gpu_nodes(gcs).values()) == NUM_NODES or job.poll() is not None, "nodes")
                out, err = job.communicate(timeout=PATIENCE_SECONDS)
            finally:
                job.kill()
        assert job.returncode == 0, err
        came = gpu_nodes(gcs)
        assert len(came) == NUM_NODES, "a node for each actor, and no more"
        wait_for(lambda: not any(gpu_nodes(gcs).values()), "the nodes to go")
        assert gpu_nodes(gcs).keys() == came.keys()
    result, manifest = json.loads(out.splitlines()[-1]), read_manifest(output)
    expected = {"documents": 2 * NUM_SHARDS, "bytes": 400_000 * NUM_SHARDS, "shards": NUM_SHARDS}
    assert {name: result[name] for name in expected} == expected
    assert (manifest.documents, manifest.bytes) == (expected["documents"], expected["bytes"])
    plan_hash, _ = read_plan(Storage(output))
    commits = read_commits(Storage(output), plan_hash).commits.values()
    assert sorted(commit.path for commit in commits) == sorted(shards)

"""A cluster that grows and shrinks under `patch`: what joins is used, what leaves is not missed."""

import contextlib
import functools
import threading
from pathlib import Path

import pytest
from ray._private import state as ray_state
from ray.cluster_utils import Cluster

# isort: split
import psutil  # bundled with Ray, which puts it on the path

# isort: split

from blt.patching import PatchRule
from pipelines.patch import PatchConfig, patch_dataset
from pipelines.patch.commit import read_commits, read_plan
from pipelines.storage import Storage
from tests import waiting
from tests.pipelines.patch.corpus import prose, write_documents
from tests.raylets import raylets

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

PATIENCE_SECONDS = 100.0
wait_for = functools.partial(waiting.wait_for, seconds=PATIENCE_SECONDS)

NUM_SHARDS = 40
CONFIG = PatchConfig(
    rule=PatchRule(kind="space", max_patch_length=64),  # no model, which fake GPUs could not run
    row_group_bytes=4_000,
    device="cuda",
    gpus_per_actor=1.0,
    max_actors=2,
    wait_for_resources=True,
    stall_seconds=120.0,
)


def actors_of_nodes() -> dict[str, psutil.Process]:
    """The patch actor that is alive on each node, by node."""
    actors = ray_state.actors(actor_state_name="ALIVE").values()
    ours = [actor for actor in actors if "PatchActor" in actor["ActorClassName"]]
    return {actor["Address"]["NodeID"]: psutil.Process(actor["Pid"]) for actor in ours}


class Scaler(threading.Thread):
    """Gives the cluster its first GPU once the job waits for one, then a second, and takes the first one away."""

    def __init__(self, cluster: Cluster, output: Path) -> None:
        super().__init__()
        self._cluster, self._output = cluster, output
        self.seen: list[tuple[str, int]] = []
        """What happened, with the shards that were done by then."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._scale()
        except BaseException as error:
            self.error = error

    def _scale(self) -> None:
        wait_for(lambda: (self._output / "_plan.json").exists(), "the plan")
        first = self._cluster.add_node(num_cpus=1, num_gpus=1)
        wait_for(lambda: self._done() > 0, "a shard of the first node")
        actor = actors_of_nodes()[first.node_id]
        actor.suspend()  # what it has begun is left when the second node works, however long that one takes to start
        self._note("first node works")
        second = self._cluster.add_node(num_cpus=1, num_gpus=1)
        wait_for(lambda: second.node_id in actors_of_nodes(), "an actor on the second node")
        self._note("second node works")
        self._cluster.remove_node(first)
        with contextlib.suppress(psutil.NoSuchProcess):
            actor.kill()  # stopped, it may not have seen that its node has gone
        self._note("first node is gone")

    def _done(self) -> int:
        return len(list(self._output.glob("train/*.parquet")))

    def _note(self, what: str) -> None:
        self.seen.append((what, self._done()))


def test_nodes_join_and_leave(tmp_path: Path) -> None:
    texts = [prose(seed, 200_000) for seed in range(2)]
    shards = {f"train/shard-{i:05d}.parquet": texts for i in range(NUM_SHARDS)}
    documents = write_documents(tmp_path / "documents", shards)
    output = tmp_path / "patches"
    with raylets(head_cpus=1, nodes=0) as cluster:
        scaler = Scaler(cluster, output)
        scaler.start()
        manifest = patch_dataset(CONFIG, documents, None, str(output))
        scaler.join()
    assert scaler.error is None, scaler.error
    assert [what for what, _ in scaler.seen] == ["first node works", "second node works", "first node is gone"]
    assert all(0 < done < NUM_SHARDS for _, done in scaler.seen), scaler.seen
    assert manifest is not None
    assert len(manifest.shards) == NUM_SHARDS
    plan_hash, _ = read_plan(Storage(str(output)))
    commits = read_commits(Storage(str(output)), plan_hash).commits
    assert sorted(commit.path for commit in commits.values()) == sorted(shards)

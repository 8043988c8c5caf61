"""The training worker: runs on every worker of a Ray Train group, from the newest checkpoint to the last step.

Feed -> step -> recorder, held-out evaluation and checkpoint every so often. Everything that decides the weights is in
the `TrainJob`; who computes what of a round, and whether the round counts, is the `Survival`'s.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import ray
import ray.train.torch
import torch

from blt.device_peak import device_peak_flops
from blt.errors import BltError, CheckpointError, TrainingError
from blt.loss import bits_per_byte
from blt.optim import lr_factor, set_lr
from blt.step import Batch, StepCounts, StepTotals, accumulate, tally_batch, update
from pipelines.log_line import add_fields
from pipelines.train.batch import make_batch
from pipelines.train.elastic import is_fatal
from pipelines.train.feed import Feed, FeedConfig, SequenceReader
from pipelines.train.job import TrainJob
from pipelines.train.metrics import StepRecord, peak_memory_bytes
from pipelines.train.order import micro_steps, rank_slots
from pipelines.train.replicated import ReplicatedTraining
from pipelines.train.sharded import ShardedTraining
from pipelines.train.survival import Cluster, Place, Share, Survival
from pipelines.train.timeline import Cause
from pipelines.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

SAVING_TO_COMPUTING = 10.0
"""How many times as long a checkpoint may take as a micro-batch before a worker counts as hung."""


def train_worker(run: tuple[TrainJob, Cluster]) -> None:
    """Train a job on this worker. What another try would only repeat is told to the recorder, and ends the run."""
    job, cluster = run
    context = ray.train.get_context()
    add_fields(process="train worker", metrics_run=job.run, rank=context.get_world_rank())
    torch.set_num_threads(max(1, int(job.config.cpus_per_worker)))
    torch.use_deterministic_algorithms(job.config.deterministic)
    try:
        Worker(job, cluster).run()
    except BltError as error:
        if is_fatal(error):
            ray.get(cluster.recorder.fail.remote(str(error)))
        raise


class Worker:
    """A worker's part in a run."""

    def __init__(self, job: TrainJob, cluster: Cluster) -> None:
        self.job, self.config, self.recorder = job, job.config, cluster.recorder
        self.name = uuid.uuid4().hex
        self.device = ray.train.torch.get_device()
        self.autocast = torch.bfloat16 if self.config.precision == "bfloat16" else None
        self.place, ties = Place(), (job, self.device, cluster)
        self.survival: Survival
        if self.config.survival == "replicated":
            self.survival = ReplicatedTraining(self.place, *ties)
        else:
            self.survival = ShardedTraining(self.place, *ties)
        self.counts = StepCounts(self.device)
        self.watchdog = Watchdog()
        self.tries, self.paused_seconds, self.save_requested = 1, 0.0, False

    def run(self) -> None:
        """All rounds that are left."""
        peak = device_peak_flops(self.device, self.autocast or torch.float32)
        self.recorder.joined.remote(self.name, self.place.steps_done, peak)
        logger.info("worker is ready step=%d device=%s name=%s", self.place.steps_done, self.device, self.name)
        data, order = (self.job.data, self.job.train_index), FeedConfig.of(self.config)
        feeding = Feed(*data, order, self.config.steps, device=self.device)
        with feeding as feed, self.watchdog:
            while not self._is_over():
                self._round(feed)
        self.survival.close()

    def _round(self, feed: Feed) -> None:
        """An update and the checkpoint that is due after it, an evaluation, or, after all of them, the last checkpoint.

        What waits for other workers (begin, sum, commit) has timeouts of its own; the watchdog looks at the rest.
        """
        share = self.survival.begin()  # may bring a worker that comes late up to the others' place, or to their end
        if self._is_over():
            return
        if self._evaluation_is_due():
            stands = self._evaluate(share)
        elif self.place.steps_done < self.config.steps:
            stands = self._step(share, feed)
        else:
            stands = self._save_last(share)
        self.tries += not stands
        self.place.rounds += stands
        if stands and self.place.steps_done < self.config.steps and not self._evaluation_is_due():
            self._save_if_due(share)

    def _step(self, share: Share, feed: Feed) -> bool:
        """One try of an update; whether it stands."""
        began = time.perf_counter()
        done, waited, survival = self.place.steps_done, feed.waited_seconds, self.survival
        self.counts.zero()
        survival.gradients.zero()
        self.counts.request_save(survival.save_is_requested())
        with self.watchdog.watches(self.config.hang_seconds):
            given = feed.step(done, share.rank, share.world_size)
            self.counts.add_sequences(given.sequence_hash, given.patches)
            accumulate(survival.model, self.counts, self._watched(given.batches), self.autocast)
        survival.sum(self.counts.vector)
        survival.gradients.sum_over_ranks()
        if not survival.commit():
            return False
        totals = self.counts.totals()
        lr = self.config.optimizer.lr * lr_factor(self.config.optimizer, done, self.config.steps)
        set_lr(survival.optimizer, lr)
        grad_norm = self._update(totals, done + 1, share)
        if grad_norm is None:
            totals = replace(totals, nats=0.0, targets=0, bytes=0)
        self.place.steps_done, self.save_requested = done + 1, totals.save_requested
        if survival.tells(share):
            record = StepRecord(
                step=done + 1,
                workers=share.world_size,
                nats=totals.nats,
                targets=totals.targets,
                bytes=totals.bytes,
                patches=totals.patches,
                grad_norm=grad_norm or 0.0,
                lr=lr,
                sequences=f"{totals.sequence_hash:016x}",
                seconds=time.perf_counter() - began,
                waited_seconds=feed.waited_seconds - waited,
                paused_seconds=self.paused_seconds,
                tries=self.tries,
                peak_memory_bytes=peak_memory_bytes(),
            )
            self.recorder.step.remote(self.name, record)
        self.paused_seconds, self.tries = 0.0, 1
        return True

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; each one is progress."""
        for batch in batches:
            self.watchdog.alive()
            yield batch

    def _update(self, totals: StepTotals, step: int, share: Share) -> float | None:
        """Clip and apply the summed gradients; their norm. None if they are not finite and the update is left out."""
        try:
            clip_norm = self.config.optimizer.clip_norm
            return update(self.survival.optimizer, self.survival.gradients, totals, clip_norm=clip_norm)
        except FloatingPointError as error:
            if self.config.nonfinite == "stop":
                raise TrainingError(f"step {step}: {error}; a lower optimizer.lr may help") from error
            self._tell_event(share, "skipped", f"update {step} left out: {error}")
            return None

    def _tell_event(self, share: Share, cause: Cause, detail: str) -> None:
        """Tell what all workers see, once."""
        if share.rank == 0:
            self.recorder.event.remote(cause, detail)

    def _is_over(self) -> bool:
        return self.place.saved == self.config.steps

    def _is_due(self, every: int) -> bool:
        return self.place.steps_done % every == 0 or self.place.steps_done == self.config.steps

    def _evaluation_is_due(self) -> bool:
        done = self.place.steps_done
        return done > self.place.evaluated and self._is_due(self.config.valid_every)

    @torch.no_grad()
    def _evaluate(self, share: Share) -> bool:
        """Loss over the first held-out sequences, or after the last step over all, shared out over the workers."""
        began, index, done = time.perf_counter(), self.job.valid_index, self.place.steps_done
        sequences = index.sequences if done == self.config.steps else min(self.config.valid_sequences, index.sequences)
        every = ((i, j) for i, group in enumerate(index.row_groups) for j in range(group.sequences))
        places = list(islice(every, sequences))
        own = [places[slot] for slot in rank_slots(sequences, share.rank, share.world_size)]
        reader, size = SequenceReader(self.job.data, index, 1), self.config.micro_batch
        self.counts.zero()
        self.survival.model.eval()
        with self.watchdog.watches(self.config.hang_seconds):
            for number in range(micro_steps(sequences, size, share.world_size)):  # as many on every worker
                self.watchdog.alive()
                chosen = reader.read(own[number * size : (number + 1) * size])
                batch = make_batch(chosen, with_patches=index.sequence_patches is not None)
                self.counts.add(*tally_batch(self.survival.model, batch.to(self.device), self.autocast))
        self.survival.model.train()
        self.survival.sum(self.counts.vector)
        if not self.survival.commit():
            return False
        totals = self.counts.totals()
        self.place.evaluated = done
        if self.survival.tells(share):
            bpb = bits_per_byte(totals.nats, totals.bytes)
            self.recorder.evaluated.remote(done, {"valid/loss": totals.nats / totals.targets, "valid/bpb": bpb})
        self.paused_seconds += time.perf_counter() - began
        return True

    def _save_if_due(self, share: Share) -> None:
        if not self._is_due(self.config.checkpoint_every) and not self.save_requested:
            return
        began, saved = time.perf_counter(), True
        try:
            self._save(share, wait=self.save_requested)
        except CheckpointError as error:
            saved = False
            self._tell_event(share, "checkpoint", str(error))  # it was asked for, but the run can do without
        if self.save_requested:
            self.survival.hold(saved)
        self.save_requested = False
        self.paused_seconds += time.perf_counter() - began

    def _save_last(self, share: Share) -> bool:
        """The checkpoint of the last step, which nobody leaves before it is whole; whether it is."""
        self._save(share, wait=True)
        self.counts.zero()
        self.survival.sum(self.counts.vector)
        if not self.survival.commit():
            return False
        self.place.saved = self.place.steps_done
        return True

    def _save(self, share: Share, wait: bool) -> None:
        with self.watchdog.watches(SAVING_TO_COMPUTING * self.config.hang_seconds):
            self.survival.save(share, wait=wait)

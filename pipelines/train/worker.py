"""The training worker: runs on every rank of a Ray Train group, from the newest checkpoint to the last step.

Feed -> step -> metrics, held-out evaluation and checkpoint every so often. Everything that decides the weights is in
the `TrainJob`; rank and world size only say who computes what.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from blt.errors import TrainingError
from blt.loss import bits_per_byte
from blt.optim import build_optimizer, lr_factor, set_lr
from blt.parallel import FlatGradients, sum_over_ranks
from blt.step import Batch, StepResult, Tally, tally_batch, train_step
from pipelines.train.batch import make_batch
from pipelines.train.feed import Feed, FeedConfig, SequenceReader
from pipelines.train.job import Model, TrainJob
from pipelines.train.metrics import MetricsWriter, peak_memory_bytes
from pipelines.train.order import rank_slots
from pipelines.train.state import MODEL_NAME, TrainingState, load_optimizer, read_training_state, save_training_state


def train_worker(job: TrainJob) -> None:
    """Train `job` on this rank."""
    torch.set_num_threads(max(1, int(job.config.cpus_per_worker)))
    worker = Worker(job)
    if worker.rank == 0:
        with MetricsWriter(job.run_directory, worker.steps_done) as metrics:
            worker.run(metrics)
    else:
        worker.run(None)


class Worker:
    """A rank's model, optimiser and place in the run."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job, self.rank, self.world_size = job, context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.autocast = torch.bfloat16 if job.config.precision == "bfloat16" else None
        self.steps_done = 0
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            torch.manual_seed(job.config.seed)
            self.model: Model = job.build().to(self.device)
            self.optimizer = build_optimizer(self.model, job.config.optimizer)
            return
        with checkpoint.as_directory() as directory:
            self.steps_done = read_training_state(Path(directory), job.fingerprint).steps_done
            self.model = job.load_model(Path(directory) / MODEL_NAME).to(self.device).train()
            self.optimizer = build_optimizer(self.model, job.config.optimizer)
            load_optimizer(Path(directory), self.model, self.optimizer)

    def run(self, metrics: MetricsWriter | None) -> None:
        """All steps that are left."""
        config, gradients = self.job.config, FlatGradients(self.model.parameters())
        feed_config = FeedConfig(
            seed=config.seed,
            shuffle_row_groups=config.shuffle_row_groups,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
        )
        window = _Window()
        with Feed(self.job.data, self.job.train_index, feed_config, self.steps_done, config.steps) as feed:
            for step, batches in feed:
                lr = config.optimizer.lr * lr_factor(config.optimizer, step, config.steps)
                set_lr(self.optimizer, lr)
                try:
                    result = train_step(
                        self.model,
                        self.optimizer,
                        gradients,
                        batches,
                        clip_norm=config.optimizer.clip_norm,
                        autocast=self.autocast,
                    )
                except FloatingPointError as error:
                    raise TrainingError(f"step {step + 1}: {error}; a lower optimizer.lr may help") from error
                self.steps_done = step + 1
                if metrics is not None:
                    window.add(result)
                    # A checkpoint closes a record too, so that a resumed run's records cover every step.
                    if self._is_due(config.log_every) or self._is_due(config.checkpoint_every):
                        metrics.write(self.steps_done, window.figures(feed) | {"train/lr": lr})
                        window = _Window(feed.waited_seconds)
                self._evaluate_and_save(metrics, window)

    def _evaluate_and_save(self, metrics: MetricsWriter | None, window: "_Window") -> None:
        started = time.perf_counter()
        config, last = self.job.config, self.steps_done == self.job.config.steps
        if self._is_due(config.valid_every):
            total = self.job.valid_index.sequences
            tally = self._evaluate(total if last else min(config.valid_sequences, total))
            if metrics is not None:
                bpb = bits_per_byte(tally.nats, tally.bytes)
                metrics.write(self.steps_done, {"valid/loss": tally.nats / tally.targets, "valid/bpb": bpb})
        if self._is_due(config.checkpoint_every):
            self._save()
        window.pause(time.perf_counter() - started)

    def _is_due(self, every: int) -> bool:
        return self.steps_done % every == 0 or self.steps_done == self.job.config.steps

    @torch.no_grad()
    def _evaluate(self, sequences: int) -> Tally:
        """Loss over the first `sequences` held-out sequences, shared out over the ranks."""
        reader, index = SequenceReader(self.job.data, self.job.valid_index, 1), self.job.valid_index
        every = ((i, j) for i, group in enumerate(index.row_groups) for j in range(group.sequences))
        places = list(islice(every, sequences))
        own = [places[slot] for slot in rank_slots(len(places), self.rank, self.world_size)]
        totals, size = torch.zeros(3, dtype=torch.float64, device=self.device), self.job.config.micro_batch
        self.model.eval()
        for start in range(0, len(own), size):
            chosen = [reader.read(*place) for place in own[start : start + size]]
            batch: Batch = make_batch(chosen, with_patches=index.sequence_patches is not None)
            nats, targets, num_bytes = tally_batch(self.model, batch.to(self.device), self.autocast)
            totals += torch.stack((nats.double(), targets.double(), num_bytes.double()))
        self.model.train()
        nats_sum, targets_sum, bytes_sum = sum_over_ranks(totals).tolist()
        return Tally(nats=nats_sum, targets=round(targets_sum), bytes=round(bytes_sum))

    def _save(self) -> None:
        """Report a checkpoint: rank 0 writes it, every rank reports."""
        figures = {"step": self.steps_done}
        if self.rank != 0:
            ray.train.report(figures)
            return
        with tempfile.TemporaryDirectory(prefix="blt-checkpoint-") as directory:
            provenance = {
                "run": self.job.fingerprint,
                "step": str(self.steps_done),
                "data": self.job.train_index.dataset,
            }
            self.job.save_model(self.model, Path(directory) / MODEL_NAME, provenance)
            state = TrainingState(steps_done=self.steps_done, run=self.job.fingerprint)
            save_training_state(Path(directory), self.model, self.optimizer, state)
            checkpoint = ray.train.Checkpoint.from_directory(directory)
            ray.train.report(figures, checkpoint=checkpoint, checkpoint_dir_name=f"step-{self.steps_done:08d}")


class _Window:
    """The steps since the last record: sums, and the seconds they took without evaluations and checkpoints."""

    def __init__(self, waited_before: float = 0.0) -> None:
        self._started, self._waited_before, self._paused = time.perf_counter(), waited_before, 0.0
        self._results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    def figures(self, feed: Feed) -> dict[str, float]:
        seconds = time.perf_counter() - self._started - self._paused
        tallies = [result.tally for result in self._results]
        nats, num_bytes = sum(tally.nats for tally in tallies), sum(tally.bytes for tally in tallies)
        return {
            "train/loss": nats / sum(tally.targets for tally in tallies),
            "train/bpb": bits_per_byte(nats, num_bytes),
            "train/grad_norm": self._results[-1].grad_norm,
            "train/bytes": num_bytes,
            "train/bytes_per_second": num_bytes / seconds,
            "train/step_seconds": seconds / len(tallies),
            "train/data_wait_fraction": (feed.waited_seconds - self._waited_before) / seconds,
            "train/peak_memory_bytes": peak_memory_bytes(),
        }

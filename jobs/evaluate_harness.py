"""Tasks of lm-evaluation-harness on a trained BLT: its results and table, with the model as an adapter to it.

Needs the extra `eval` (pip install "blt-ray[eval]"). Tasks are the harness's own, which fetch their data from a hub, or
those of YAML files in include_path, which may name local data. Lengths that tasks give in tokens are bytes here.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blt.checkpoint import language_model_fingerprint
from blt.errors import ConfigError
from jobs.record import JobResult, run_once
from pipelines.evaluate.config import check_least
from pipelines.evaluate.respondent import RespondentConfig
from pipelines.model_files import local_model
from pipelines.storage import Storage

RESULTS_NAME = "harness.json"
SAMPLES_NAME = "samples.jsonl"

NOT_IN_OUTPUT = ("output", "model", "include_path")
"""Keys that have no say in the output: paths whose content the fingerprint of the inputs covers."""

OPTIONS = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(RespondentConfig):
    """Keys of `blt eval harness`."""

    model: str
    """Directory of the trained model (`blt train` writes it as OUTPUT/model)."""
    tasks: tuple[str, ...]
    """Names of tasks or groups, or patterns of them such as arc_*."""
    output: str | None = None
    """Directory that gets harness.json and, with samples, samples.jsonl; null only prints."""
    include_path: str | None = None
    """Directory of further tasks in YAML; a task there goes before one of the harness of the same name."""
    num_fewshot: int | None = None
    """Solved examples before each question; null leaves it to the task."""
    limit: int | None = None
    """Only the first so many examples of each task; null takes all."""
    samples: bool = False
    """Keep every question with its answers and scores."""
    max_new_bytes: int = 256
    """Longest answer in bytes where a task names no length."""
    seed: int = 0
    """Of the choice of solved examples, and of draws where a task draws."""
    bootstrap_resamples: int = 1000
    """Resamples behind the standard errors of metrics that have no formula for one."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of both models' weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"max_new_bytes": 0, "seed": 0, "bootstrap_resamples": 1})
        if not self.tasks:
            raise ConfigError("tasks must name at least one task")
        for name, least in (("num_fewshot", 0), ("limit", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")


def run(config: Config) -> JobResult:
    """Print the table of results; with `config.output`, record them there unless that is done."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('eval harness needs lm-evaluation-harness: pip install "blt-ray[eval]"')
    if config.output is None:
        return _evaluate(config, None)
    root = config.output
    inputs = " ".join(
        (
            f"model={language_model_fingerprint(local_model(config.model))}",
            f"lm_eval={importlib.metadata.version('lm_eval')}",
            f"include_path={_content(config.include_path)}",
        )
    )
    result = run_once(root, config, inputs, lambda: _evaluate(config, Storage(root)), ignore=NOT_IN_OUTPUT)
    if result.status == "skipped":
        _print(json.loads(Storage(root).read_bytes(RESULTS_NAME)))
    return result


def _evaluate(config: Config, output: Storage | None) -> JobResult:
    # Seconds to import, and not there without the extra.
    from lm_eval.utils import handle_non_serializable

    results = _results(config)
    samples = results.pop("samples", {})
    _print(results)
    if output is not None:
        if config.samples:
            lines = [{"task": task, **sample} for task, of_task in samples.items() for sample in of_task]
            text = "".join(json.dumps(row, ensure_ascii=False, default=handle_non_serializable) + "\n" for row in lines)
            output.write_replace(SAMPLES_NAME, text.encode("utf-8", "replace"))
        text = json.dumps(results, ensure_ascii=False, indent=1, default=handle_non_serializable) + "\n"
        output.write_replace(RESULTS_NAME, text.encode("utf-8", "replace"))
    return JobResult(documents=_num_examples(results), figures=_figures(results))


def _print(results: dict[str, Any]) -> None:
    """The harness's table."""
    from lm_eval.utils import make_table

    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"), flush=True)


def _results(config: Config) -> dict[str, Any]:
    """What the harness makes of the tasks, less what it tells of this machine. ConfigError for a task it lacks."""
    from lm_eval import simple_evaluate

    from jobs.harness_model import HarnessModel

    manager = _task_manager(config)
    model = HarnessModel(
        config.model,
        device=config.device,
        dtype=config.dtype,
        batch_size=config.batch_prompts,
        max_new_bytes=config.max_new_bytes,
        seed=config.seed,
        sequence_patches=config.sequence_patches,
        sequence_bytes=config.sequence_bytes,
        batch_bytes=config.batch_bytes,
        row_bytes=config.row_bytes,
    )
    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=manager.match_tasks(list(config.tasks)),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        log_samples=config.samples,
        bootstrap_iters=config.bootstrap_resamples,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    for key in ("pretty_env_info", "upper_git_hash", "git_hash"):
        results.pop(key, None)
    return results


def _task_manager(config: Config) -> Any:
    """The harness's index of the tasks; of include_path alone where they are all there, since to read the harness's own
    14,000 files takes many seconds. Groups may hold tasks from anywhere. ConfigError for a task that is nowhere.
    """
    from lm_eval.tasks import TaskManager

    if config.include_path is not None:
        manager = TaskManager(include_path=config.include_path, include_defaults=False)
        found = {name: manager.match_tasks([name]) for name in config.tasks}
        if all(names and set(names) <= set(manager.all_subtasks) for names in found.values()):
            return manager
    manager = TaskManager(include_path=config.include_path)
    if missing := [name for name in config.tasks if not manager.match_tasks([name])]:
        where = "the harness has" + ("" if config.include_path is None else f", and {config.include_path} holds,")
        raise ConfigError(f'key "tasks": {where} no task {", ".join(missing)}')
    return manager


def _num_examples(results: Mapping[str, Any]) -> int:
    return sum(int(counts["effective"]) for counts in results["n-samples"].values())


def _figures(results: Mapping[str, Any]) -> dict[str, float | str | None]:
    """TASK/METRIC of every task and group; the filter is named too where it is one."""
    figures: dict[str, float | str | None] = {}
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                figures[f"{task}/{metric}" + ("" if filtered == "none" else f",{filtered}")] = round(value, 4)
    cut = results["config"]["contexts_cut"]
    return {**figures, **({"contexts_cut": cut} if cut else {})}


def _content(directory: str | None) -> str:
    """sha256 (hex) of the names and bytes of all files in a directory; what they name elsewhere is not in it."""
    if directory is None:
        return "none"
    root, digest = Path(directory), hashlib.sha256()
    if not root.is_dir():
        raise ConfigError(f'key "include_path": {directory} is no directory')
    for path in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(data)}\n".encode("utf-8", "surrogateescape") + data)
    return digest.hexdigest()

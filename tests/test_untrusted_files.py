"""Files from elsewhere run no code: nothing that could is in the sources, and a hostile model is refused.

Hostile weights of other formats, and hostile checkpoints, are in the tests of those.
"""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from blt.checkpoint import load, load_entropy_model, save_entropy_model
from blt.entropy_model import EntropyModel, EntropyModelConfig
from blt.errors import BltError
from blt.layers import TransformerConfig
from pipelines.model_files import local_model

ROOT = Path(__file__).parent.parent

_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_CALLS = {"eval", "exec", "compile"}
_METHODS = {
    "torch.save",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "os.system",
    "np.load",
    "numpy.load",
}
_OF_PEERS = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "recv_object_list"}
_PEERS_TRUSTED_IN = "pipelines/train/checkpoint_ranks.py"
"""Ranks of one training trust each other; torch pickles what they tell."""


def runs_code(source: str, file: str) -> Iterator[str]:
    """What in the source could run code that is in a file or a message."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in _MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in _CALLS | _METHODS or options.get("shell") == "True" or "trust_remote_code" in options:
            yield called
        if called == "torch.load" and options.get("weights_only") != "True":
            yield called
        if called == "yaml.load" and options.get("Loader") != "_PlainLoader":  # a SafeLoader
            yield called
        if options.get("allow_pickle", "False") != "False":
            yield called
        if called.split(".")[-1] in _OF_PEERS and file != _PEERS_TRUSTED_IN:
            yield called


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(x, path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "numpy.load(path)",
        "table.read(allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "dist.all_gather_object(found, own)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_it(source: str) -> None:
    assert list(runs_code(source, "x.py")) != []


def test_nothing_in_the_sources_runs_code_from_files() -> None:
    found = {}
    for package in ("blt", "pipelines", "jobs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if told := list(runs_code(path.read_text(encoding="utf-8"), name)):
                found[name] = told
    assert found == {}


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that must not be loaded: afterwards nothing has happened."""
    mark = tmp_path / "exploded"
    data = pickle.dumps(Bomb(mark))
    yield data
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "the bomb is none"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_hostile_model_directory_is_refused(name: str, bomb: bytes, tmp_path: Path) -> None:
    shape = TransformerConfig(width=16, layers=1, heads=2, window=16, ffn_multiple_of=16)
    directory = tmp_path / "model"
    save_entropy_model(EntropyModel(EntropyModelConfig(transformer=shape)), directory)
    (directory / name).write_bytes(bomb)
    for read in (load, load_entropy_model):
        with pytest.raises(BltError, match=str(directory)):
            read(local_model(str(directory)))

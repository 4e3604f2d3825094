"""cluster.yaml against Ray's own schema, its own filling-in of defaults, and its own provider with AWS's answers."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from moto import mock_aws
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

REPOSITORY = Path(__file__).parents[1]
REGION = "us-west-2"
LABEL_OPERATOR_IN = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    Draft7Validator(SCHEMA).validate(config)
    validate_config(prepare_config(copy.deepcopy(config)))
    broken = config | {"available_node_types": {"head": {}}}
    with pytest.raises(ValidationError):
        Draft7Validator(SCHEMA).validate(broken)


def test_it_has_the_four_groups_and_grows_from_nothing(config: dict[str, Any]) -> None:
    groups = config["available_node_types"]
    assert set(groups) == {"head", "cpu", "gpu", "serve"}
    assert groups["gpu"]["resources"]["GPU"] == 1
    assert all(group["min_workers"] == 0 for group in groups.values())
    assert sum(group["max_workers"] for group in groups.values()) <= config["max_workers"]


def test_it_demands_a_token_and_opens_no_port(config: dict[str, Any]) -> None:
    text = (REPOSITORY / "cluster.yaml").read_text()
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])
    assert "0.0.0.0" not in text
    mounted = {source for source in config["file_mounts"].values() if not source.startswith("~")}
    assert all((REPOSITORY / source).exists() for source in mounted)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An account in which deploy/aws.yaml was deployed, as moto has it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key there
    monkeypatch.setattr("ray.autoscaler._private.aws.config.time.sleep", lambda _: None)  # until AWS knows a role
    aws_utils.resource_cache.cache_clear()
    aws_utils.client_cache.cache_clear()
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        ec2 = boto3.resource("ec2", region_name=REGION)
        (vpc,) = ec2.vpcs.filter(Filters=[{"Name": "is-default", "Values": ["true"]}])
        given = {"Bucket": "models", "Vpc": vpc.id, "From": "203.0.113.7/32"}
        boto3.client("cloudformation", region_name=REGION).create_stack(
            StackName="overproof", TemplateBody=(REPOSITORY / "deploy/aws.yaml").read_text(),
            Parameters=[{"ParameterKey": name, "ParameterValue": value} for name, value in given.items()],
        )  # fmt: skip
        yield ec2
    aws_utils.resource_cache.cache_clear()
    aws_utils.client_cache.cache_clear()


def started(config: dict[str, Any], ec2: Any) -> dict[str, Any]:
    """An instance of each group, by its name, as Ray's provider starts it."""
    image = next(iter(ec2.images.limit(1))).id
    for group in config["available_node_types"].values():
        group["node_config"]["ImageId"] = image  # moto does not know AWS's own
        group["node_config"].pop("BlockDeviceMappings", None)
    ready = bootstrap_aws(prepare_config(copy.deepcopy(config)))
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    found = {}
    for name, group in ready["available_node_types"].items():
        node = group["node_config"] | (ready["head_node"] if name == ready["head_node_type"] else {})
        node = {key: value for key, value in node.items() if key != "InstanceMarketOptions"}
        (found[name],) = provider.create_node(node, {"ray-user-node-type": name}, 1).values()
    return found


def test_every_node_has_credentials_and_no_door_is_open(config: dict[str, Any], account: Any) -> None:
    nodes = started(config, account)
    assert set(nodes) == set(config["available_node_types"])
    for name, node in nodes.items():
        role = "overproof-head" if name == "head" else "overproof-node"
        assert node.iam_instance_profile["Arn"].endswith(f"instance-profile/{role}")
        assert node.metadata_options["HttpTokens"] == "required"
        (group,) = node.security_groups
        assert group["GroupName"] == "overproof"
    rules = account.SecurityGroup(group["GroupId"]).ip_permissions
    addresses = [block["CidrIp"] for rule in rules for block in rule["IpRanges"]]
    assert addresses == ["203.0.113.7/32"]
    (within,) = (rule for rule in rules if rule["UserIdGroupPairs"])
    assert (within["IpProtocol"], within["UserIdGroupPairs"][0]["GroupId"]) == ("-1", group["GroupId"])


def test_rays_own_defaults_would_leave_workers_without_credentials(config: dict[str, Any], account: Any) -> None:
    """What the file is there to change; should Ray change it, too, this tells."""
    del config["provider"]["security_group"]
    for group in config["available_node_types"].values():
        del group["node_config"]["IamInstanceProfile"]
    nodes = started(config, account)
    assert nodes["head"].iam_instance_profile
    assert not nodes["gpu"].iam_instance_profile
    rules = account.SecurityGroup(nodes["gpu"].security_groups[0]["GroupId"]).ip_permissions
    assert "0.0.0.0/0" in [block["CidrIp"] for rule in rules for block in rule["IpRanges"]]


def statements(document: Any) -> list[dict[str, Any]]:
    """Of a policy, which moto keeps as text where a stack made it."""
    found: list[dict[str, Any]] = (yaml.safe_load(document) if isinstance(document, str) else document)["Statement"]
    return found


def test_roles_may_do_what_they_must_and_no_more(account: Any) -> None:
    del account
    iam = boto3.client("iam", region_name=REGION)
    (policy,) = iam.list_attached_role_policies(RoleName="overproof-node")["AttachedPolicies"]
    found = iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId="v1")["PolicyVersion"]["Document"]
    assert all(each["Resource"].startswith("arn:aws:s3:::models") for each in statements(found))
    head = statements(iam.get_role_policy(RoleName="overproof-head", PolicyName="nodes")["PolicyDocument"])
    (passing,) = (each for each in head if each["Action"] == "iam:PassRole")
    assert passing["Resource"].endswith(":role/overproof-node")
    assert not any(each["Action"] == "*" or "ec2:*" in each["Action"] for each in head)


def test_nodes_watch_for_the_spot_notice_and_the_head_can_start_nodes(config: dict[str, Any]) -> None:
    (watching,) = (line for line in config["worker_start_ray_commands"] if "spot_notice" in line)
    (module,) = re.findall(r"python -m ([\w.]+)", watching)
    assert importlib.util.find_spec(module)
    assert watching.endswith("&")
    assert any("[aws]" in line for line in config["head_setup_commands"])


def test_work_that_is_not_served_starts_no_node_for_replicas(config: dict[str, Any]) -> None:
    """By Ray's own scheduler, for a reader, for workers that would fill such a node, and for a trial with a GPU."""
    ready = AutoscalingConfig(copy.deepcopy(config), skip_content_hash=True)

    def started_for(*bundles: dict[str, float], **labels: str) -> set[str]:
        wanted = [[(name, LABEL_OPERATOR_IN, [value]) for name, value in labels.items()]] if labels else None
        asked = [ResourceRequestUtil.make(bundle, label_selectors=wanted) for bundle in bundles]
        reply = ResourceDemandScheduler(None).schedule(
            SchedulingRequest(
                disable_launch_config_check=True, node_type_configs=ready.get_node_type_configs(),
                max_num_nodes=ready.get_max_num_nodes(),
                resource_requests=ResourceRequestUtil.group_by_count(asked),
            )
        )  # fmt: skip
        assert not reply.infeasible_resource_requests
        return {launch.instance_type for launch in reply.to_launch}

    assert started_for({"CPU": 1}) == {"cpu"}
    assert started_for({"CPU": 8}, {"CPU": 8}, {"CPU": 1}) == {"cpu"}
    assert started_for({"CPU": 1, "GPU": 1}) == {"gpu"}
    assert started_for({"CPU": 1}, group="serve") == {"serve"}

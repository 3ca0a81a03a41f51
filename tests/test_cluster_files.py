"""The files in cluster/, checked offline: Ray's schema, EC2's request shape, and node types against what stages ask."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import ray
import torch
import yaml
from botocore.client import BaseClient
from botocore.model import Shape
from botocore.validate import ParamValidator
from moto import mock_aws
from packaging.requirements import Requirement
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.util import prepare_config, validate_config

from apacs_ray.config.settings import Settings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.distributed.autoscaler import nodes_of, startable_nodes
from apacs_ray.distributed.resource_plan import Nodes, TrainingPlan, cluster_of, plan_training
from apacs_ray.distributed.tasks import plan_pool, plan_segment_pool
from apacs_ray.errors import UsageError
from apacs_ray.models.registry import MEMBERS

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
PINNED = f"ray[data,default,train,tune]=={ray.__version__}"
CLOUDS = ("aws", "gcp")
SEGMENT = ("segment_spot", "segment_on_demand")  # off until somebody wants them
# CPUs and GPUs of the machine types, as the clouds document them
MACHINES = {
    "m7i.xlarge": (4, 0),
    "c7i.8xlarge": (32, 0),
    "g6.12xlarge": (48, 4),
    "n2-standard-4": (4, 0),
    "n2-standard-32": (32, 0),
    "g2-standard-48": (48, 4),
}
OBJECTS = ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload")
SYSTEM_GIB = 100  # of a root disk: the image with its driver, and PyTorch
SLIDE_GIB = 3  # of a slide that a task has in use


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def node_types(name: str) -> dict[str, dict[str, Any]]:
    return load(name)["available_node_types"]


def machine(node: dict[str, Any]) -> str:
    return node["node_config"].get("InstanceType") or node["node_config"]["machineType"]


def is_spot(node: dict[str, Any]) -> bool:
    config = node["node_config"]
    market = config.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or config.get("scheduling", {}).get("provisioningModel") == "SPOT"


def gib(quantity: str) -> float:
    """A Kubernetes quantity in Gi."""
    assert quantity.endswith("Gi"), quantity
    return float(quantity.removesuffix("Gi"))


# what `ray up` reads


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(load(name)))


def test_ray_accepts_the_fake_cluster_as_it_stands() -> None:
    config = load("local")
    validate_config(config)  # `ray start` fills in no defaults
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    for key in [f"{part}_commands" for part in empty]:
        assert config[key] == []
    assert config["head_node_type"] == FAKE_HEAD_NODE_TYPE
    assert config["provider"]["type"] == "fake_multinode"
    assert config["provider"]["use_node_id_as_ip"] is True  # else no node is ever idle
    assert config["provider"]["disable_node_updaters"] is True
    workers = [node for kind, node in node_types("local").items() if kind != FAKE_HEAD_NODE_TYPE]
    assert sorted(node["resources"].get("GPU", 0) for node in workers) == [0, 1]
    assert all(node["resources"]["CPU"] == 1 for node in workers)


@pytest.mark.parametrize("name", [*CLOUDS, "local"])
def test_the_head_takes_no_tasks_and_everything_else_starts_from_zero(name: str) -> None:
    config, nodes = load(name), node_types(name)
    head = nodes.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert not is_spot(head)
    assert nodes
    for kind, node in nodes.items():
        assert node["min_workers"] == 0
        assert (0 if kind in SEGMENT else 1) <= node["max_workers"] <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 30


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_are_spot_with_dearer_types_to_fall_back_on(name: str) -> None:
    nodes = node_types(name)
    assert {kind: is_spot(node) for kind, node in nodes.items()} == {
        "head": False,
        "cpu_spot": True,
        "cpu_on_demand": False,
        "gpu_spot": True,
        "gpu_on_demand": False,
        "segment_spot": True,
        "segment_on_demand": False,
    }
    for kind in ("cpu", "gpu", "segment"):
        spot, fallback = nodes[f"{kind}_spot"], nodes[f"{kind}_on_demand"]
        for same in ("resources", "max_workers"):
            assert spot[same] == fallback[same]
        assert machine(spot) == machine(fallback)
        assert spot["priority"] > fallback["priority"]
    assert "GPU" not in nodes["cpu_spot"]["resources"]
    assert load(name)["max_workers"] >= nodes["cpu_spot"]["max_workers"] + nodes["gpu_spot"]["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_logical_resources_are_those_of_the_machine(name: str) -> None:
    for kind, node in node_types(name).items():
        cpus, gpus = MACHINES[machine(node)]
        assert node["resources"].get("GPU", 0) == gpus, kind
        assert node["resources"]["CPU"] == (0 if kind == "head" else cpus), kind


@pytest.mark.parametrize("name", CLOUDS)
def test_worker_disks_hold_the_slide_cache(name: str) -> None:
    for kind, node in node_types(name).items():
        config = node["node_config"]
        if name == "aws":
            (disk,) = config["BlockDeviceMappings"]
            size, temporary = disk["Ebs"]["VolumeSize"], disk["Ebs"]["DeleteOnTermination"]
        else:
            (disk,) = config["disks"]
            size, temporary = disk["initializeParams"]["diskSizeGb"], disk["autoDelete"]
        cache = 0 if kind == "head" else Settings().data.cache_gb + SLIDE_GIB * MACHINES["c7i.8xlarge"][0]
        assert size >= SYSTEM_GIB + cache, kind
        assert temporary is True, kind


def test_disks_of_gcp_write_as_fast_as_the_capacity_plan_says() -> None:
    """A type that is left out is pd-standard, of 0.12 MB/s a GB."""
    for kind, node in node_types("gcp").items():
        (disk,) = node["node_config"]["disks"]
        size, disk_type = disk["initializeParams"]["diskSizeGb"], disk["initializeParams"]["diskType"]
        baseline, a_gb = {"pd-ssd": (240, 0.48), "pd-balanced": (140, 0.28)}[disk_type.rpartition("/")[2]]
        planned = 0 if kind == "head" else 1000 if kind in SEGMENT else 500  # MB/s, cluster/capacity.md
        assert baseline + a_gb * size >= planned, kind


def test_a_container_is_shown_the_gpus() -> None:
    """The option stands in a comment of aws.yaml, to be taken out of it."""
    text = (CLUSTER / "aws.yaml").read_text()
    option = re.search(r"^# docker:\n(?:#  .*\n)+", text, re.MULTILINE)
    assert option is not None
    docker = yaml.safe_load(re.sub(r"^# ", "", option[0], flags=re.MULTILINE))["docker"]
    assert {"--env NVIDIA_VISIBLE_DEVICES=all", "--env RAY_AUTH_MODE=token"} <= set(docker["run_options"])
    validate_config(prepare_config({**load("aws"), "docker": docker}))
    assert "NVIDIA_VISIBLE_DEVICES" not in (CLUSTER / "Dockerfile").read_text()


def test_the_driver_that_the_wheel_of_torch_needs_is_said() -> None:
    driver = {"12": 525, "13": 580}[(torch.version.cuda or "13").partition(".")[0]]
    assert f"driver {driver} or newer" in (CLUSTER / "README.md").read_text()
    (image,) = set(re.findall(r"nvidia-(\d+)", (CLUSTER / "gcp.yaml").read_text()))
    assert int(image) >= driver


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_start_with_the_token_and_without_an_open_dashboard(name: str) -> None:
    config = load(name)
    for command in [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][1]]:
        assert re.search(r"RAY_AUTH_MODE=token ray start", command)
        assert "0.0.0.0" not in command
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    local = [path for path in config["file_mounts"].values() if not path.startswith("~")]
    assert "cluster/requirements.txt" in local
    assert all((ROOT / path).is_file() for path in local)
    assert "security_group" not in config["provider"]  # it could only open more than SSH


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_listen_for_the_notice_that_spot_instances_get(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config["file_mounts"]["~/spot_notice.py"] == "cluster/spot_notice.py"
    assert not any("spot_notice" in command for command in config["head_start_ray_commands"])
    *_, start, listen = config["worker_start_ray_commands"]
    assert "--address=$RAY_HEAD_IP:6379 " in start
    (tmp_path / "python").write_text('#!/bin/sh\necho "$RAY_AUTH_MODE $*"\nexec sleep 60\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"}
    # it does not hold the SSH connection
    subprocess.run(["bash", "-c", f"({listen})"], env=environment, check=True, capture_output=True, timeout=30)
    log = tmp_path / "spot_notice.log"
    while not (log.is_file() and log.read_text()):
        time.sleep(0.01)
    assert log.read_text() == f"token {tmp_path}/spot_notice.py {name} 10.0.0.1:6379\n"


# what the clouds read


def wrong_words(value: Any, shape: Shape, where: str = "") -> Iterator[str]:
    """Strings that are not in their shape's enumeration, which botocore's validator does not look at."""
    if shape.type_name == "structure":
        for key, item in value.items():
            yield from wrong_words(item, shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        for item in value:
            yield from wrong_words(item, shape.member, f"{where}[]")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where}: {value}"


@pytest.mark.parametrize("kind", node_types("aws"))
def test_ec2_knows_every_field(kind: str) -> None:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {**node_types("aws")[kind]["node_config"], "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    assert list(wrong_words(request, shape)) == []
    assert request["IamInstanceProfile"]["Name"] == ("apacs-ray-head" if kind == "head" else "apacs-ray-worker")
    assert request["MetadataOptions"]["HttpTokens"] == "required"
    assert request["ImageId"].startswith("resolve:ssm:/aws/service/")


def test_the_readme_makes_the_profiles_of_the_nodes(tmp_path: Path) -> None:
    (loop,) = re.findall(r"^    for node in .*?^    done$", (CLUSTER / "README.md").read_text(), re.S | re.M)
    (tmp_path / "aws").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "aws").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BUCKET": "s3://a-bucket"}
    done = subprocess.run(["sh", "-ec", loop], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    with mock_aws():
        iam = boto3.client("iam", "eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
        for service, command, *options in map(json.loads, done.stdout.splitlines()):
            assert service == "iam"
            names = [option[2:].title().replace("-", "") for option in options[::2]]
            getattr(iam, command.replace("-", "_"))(**dict(zip(names, options[1::2], strict=True)))
        for name in ("apacs-ray-head", "apacs-ray-worker"):
            (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
            given = iam.get_role_policy(RoleName=role["RoleName"], PolicyName="apacs-ray")["PolicyDocument"]
            assert rights(given)["s3:GetObject"] == ["arn:aws:s3:::a-bucket/*"]


def rights(policy: dict[str, Any]) -> dict[str, list[str]]:
    """Action -> resources on which a policy allows it, on some of them under a condition."""
    found: dict[str, list[str]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            found[action] = found.get(action, []) + statement["Resource"]
    return found


def policy(node: str) -> dict[str, Any]:
    return json.loads((CLUSTER / "aws_policies" / f"{node}.json").read_text())


def test_nodes_may_use_one_bucket_and_the_head_may_start_workers() -> None:
    bucket = "arn:aws:s3:::YOUR-BUCKET"
    ours = {"s3:ListBucket": [bucket], **{f"s3:{right}": [f"{bucket}/*"] for right in OBJECTS}}
    head = rights(policy("head"))
    assert rights(policy("worker")) == ours
    assert {action: on for action, on in head.items() if action.startswith("s3:")} == ours
    assert head["iam:PassRole"] == ["arn:aws:iam::*:role/apacs-ray-worker"]
    (images,) = head["ssm:GetParameters"]
    image = node_types("aws")["head"]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    assert fnmatch(f"arn:aws:ssm:eu-central-1::parameter{image}", images)


def test_the_head_may_do_what_the_autoscaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's life, by Ray's own code; only instances with the tag of this cluster may be started and ended."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-test")
    asked: dict[str, dict[str, Any]] = {}
    call = BaseClient._make_api_call

    def listen(client: BaseClient, operation: str, arguments: dict[str, Any]) -> Any:
        asked[operation] = arguments
        return call(client, operation, arguments)

    config = load("aws")
    with mock_aws():
        ec2 = boto3.client("ec2", config["provider"]["region"])
        image, subnet = ec2.describe_images()["Images"][0]["ImageId"], ec2.describe_subnets()["Subnets"][0]["SubnetId"]
        boto3.client("iam").create_instance_profile(InstanceProfileName="apacs-ray-worker")
        monkeypatch.setattr(BaseClient, "_make_api_call", listen)
        nodes = AWSNodeProvider(config["provider"], config["cluster_name"])
        spot = {**node_types("aws")["gpu_spot"]["node_config"], "ImageId": image, "SubnetIds": [subnet]}
        nodes.create_node(spot, {"ray-node-type": "worker"}, 1)
        (node,) = nodes.non_terminated_nodes({})
        nodes.set_node_tags(node, {"ray-node-status": "up-to-date"})
        nodes.terminate_nodes([node])
    assert {f"ec2:{action}" for action in asked} == {right for right in rights(policy("head")) if right[:4] == "ec2:"}
    (tagged,) = asked["RunInstances"]["TagSpecifications"]
    assert tagged["ResourceType"] == "instance"
    conditions = [condition for one in policy("head")["Statement"] for condition in one.get("Condition", {}).values()]
    for key in ("aws:RequestTag/ray-cluster-name", "aws:ResourceTag/ray-cluster-name"):
        assert {key: config["cluster_name"]} in conditions
    assert {"Key": "ray-cluster-name", "Value": config["cluster_name"]} in tagged["Tags"]


@pytest.mark.parametrize("kind", node_types("gcp"))
def test_compute_engine_knows_every_field(kind: str) -> None:
    nodes = node_types("gcp")
    config = nodes[kind]["node_config"]
    scheduling = config.get("scheduling", {})
    assert set(config) <= {"machineType", "disks", "serviceAccounts", "scheduling"}
    assert set(scheduling) <= {
        "provisioningModel",
        "instanceTerminationAction",
        "onHostMaintenance",
        "automaticRestart",
    }
    (disk,) = config["disks"]
    assert set(disk) == {"boot", "autoDelete", "type", "initializeParams"}
    assert set(disk["initializeParams"]) - {"diskType"} == {"diskSizeGb", "sourceImage"}
    zone = load("gcp")["provider"]["availability_zone"]
    assert disk["initializeParams"].get("diskType", f"zones/{zone}/").startswith(f"zones/{zone}/")
    assert (
        disk["initializeParams"]["sourceImage"]
        == nodes["head"]["node_config"]["disks"][0]["initializeParams"]["sourceImage"]
    )
    if is_spot(nodes[kind]):
        assert scheduling["instanceTerminationAction"] == "DELETE"
    if is_spot(nodes[kind]) or "GPU" in nodes[kind]["resources"]:
        assert scheduling["onHostMaintenance"] == "TERMINATE"
        assert scheduling["automaticRestart"] is False
    if kind != "head":
        (account,) = config["serviceAccounts"]
        assert account["email"].endswith(f"@{load('gcp')['provider']['project_id']}.iam.gserviceaccount.com")


# what KubeRay reads: field names of ray.io/v1 in its API reference

RAY_JOB = {
    "entrypoint",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
RAY_CLUSTER = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
POD = {"serviceAccountName", "terminationGracePeriodSeconds", "securityContext", "containers", "volumes", "tolerations"}
CONTAINER = {"name", "image", "env", "ports", "resources", "volumeMounts"}


def ray_cluster() -> dict[str, Any]:
    return load("kuberay")["spec"]["rayClusterSpec"]


def groups() -> dict[str, dict[str, Any]]:
    """Head and worker groups by name."""
    cluster = ray_cluster()
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def pod_cpus(name: str) -> int:
    return int(container(groups()[name])["resources"]["limits"]["cpu"])


def test_the_ray_job_runs_the_pipeline_and_cleans_up() -> None:
    job = load("kuberay")
    assert (job["apiVersion"], job["kind"], set(job)) == (
        "ray.io/v1",
        "RayJob",
        {"apiVersion", "kind", "metadata", "spec"},
    )
    spec = job["spec"]
    assert set(spec) == RAY_JOB
    script, *arguments = spec["entrypoint"].removeprefix("python ").split()
    assert (ROOT / script.removeprefix("/app/")).is_file()
    assert arguments[::2] == ["--data", "--output"]
    assert all(uri.startswith("s3://") for uri in arguments[1::2])
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_the_ray_cluster_scales_from_zero() -> None:
    cluster = ray_cluster()
    assert set(cluster) == RAY_CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    options = cluster["autoscalerOptions"]
    assert set(options) == {"version", "upscalingMode", "idleTimeoutSeconds", "resources"}
    assert options["version"] in ("v1", "v2")
    assert options["upscalingMode"] in ("Default", "Aggressive", "Conservative")
    assert set(cluster["headGroupSpec"]) == {"serviceType", "rayStartParams", "template"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["groupName"] for group in cluster["workerGroupSpecs"]} == {"cpu", "gpu"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == WORKER_GROUP
        assert group["replicas"] == group["minReplicas"] == 0
        assert group["maxReplicas"] >= 1
        assert "num-cpus" not in group["rayStartParams"]  # Ray takes the pod's limits


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_pods(name: str) -> None:
    group = groups()[name]
    pod, only = group["template"]["spec"], container(group)
    assert set(pod) <= POD
    assert set(only) <= CONTAINER
    assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert pod["serviceAccountName"] == "apacs-ray"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert only["image"] == container(groups()["head"])["image"]
    requests, limits = only["resources"]["requests"], only["resources"]["limits"]
    assert requests == limits
    assert {"cpu", "memory"} <= set(limits)
    assert int(limits["cpu"]) >= 1  # whole CPUs, as Ray counts them

    environment = {variable["name"]: variable["value"] for variable in only["env"]}
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    drain = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 0 < drain < pod["terminationGracePeriodSeconds"]
    assert environment["AWS_DEFAULT_REGION"]

    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in only["volumeMounts"]}
    shared = mounts["/dev/shm"]
    assert shared["medium"] == "Memory"
    store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
    assert store < gib(shared["sizeLimit"]) < gib(limits["memory"]) / 2
    if name != "head":
        scratch = gib(mounts["/tmp"]["sizeLimit"])
        assert Settings().data.cache_gb + SLIDE_GIB * pod_cpus("cpu") <= scratch <= gib(limits["ephemeral-storage"])


def test_only_the_gpu_group_asks_for_gpus_and_tolerates_their_taint() -> None:
    asked = {name: container(group)["resources"]["limits"].get("nvidia.com/gpu") for name, group in groups().items()}
    assert asked == {"head": None, "cpu": None, "gpu": "4"}
    tolerations = groups()["gpu"]["template"]["spec"]["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerations


# what the stages ask for, on the largest cluster of each file and on its first GPU node alone


def workers(name: str) -> dict[str, tuple[int, int, int]]:
    """CPUs, GPUs and largest number of the nodes for tiling (`cpu`) and for training (`gpu`)."""
    if name == "kuberay":
        found = {}
        for kind in ("cpu", "gpu"):
            limits = container(groups()[kind])["resources"]["limits"]
            found[kind] = (int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0)), groups()[kind]["maxReplicas"])
        return found
    nodes = node_types(name)
    return {
        kind: (node["resources"]["CPU"], node["resources"].get("GPU", 0), node["max_workers"])
        for kind, node in (("cpu", nodes["cpu_spot"]), ("gpu", nodes["gpu_spot"]))
    }


def place(plan: TrainingPlan, nodes: Sequence[tuple[int, int]]) -> None:
    """Give every DDP worker its place on one node and one GPU of it; fails when one has none."""
    cpus = [float(cpu) for cpu, _ in nodes]
    gpus = [(number, [1.0] * gpu) for number, (_, gpu) in enumerate(nodes)]
    wanted = [(network.gpus, network.cpus, network.name) for network in plan.networks for _ in range(network.workers)]
    for gpu, cpu, name in sorted(wanted, reverse=True):
        found = next(
            (
                (number, free, index)
                for number, free in gpus
                for index, share in enumerate(free)
                if share >= gpu - 1e-9 and cpus[number] >= cpu - 1e-9
            ),
            None,
        )
        assert found is not None, f"{name}: no node has {gpu} GPU and {cpu} CPU left"
        number, free, index = found
        free[index] -= gpu
        cpus[number] -= cpu


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
@pytest.mark.parametrize("networks", [MEMBERS, ("fusion",), ("fusion", "fusion_published")])
@pytest.mark.parametrize("whole", [True, False])
def test_training_fits_the_gpu_nodes(name: str, networks: tuple[str, ...], whole: bool) -> None:
    cpus, gpus, most = workers(name)["gpu"]
    count = most if whole else 1
    plan = plan_training(networks, cluster_of([Nodes(cpus, gpus, count)], []), batch_size=8)
    place(plan, [(cpus, gpus)] * count)
    for network in plan.networks:
        assert network.gpus > 0, "trains on CPUs beside idle GPUs"
        assert 3 <= network.data_tasks < cpus / gpus
        assert network.threads * gpus <= cpus
    if networks == MEMBERS:
        assert sum(network.gpus * network.workers for network in plan.networks) > 0.7 * gpus * count


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
def test_members_train_on_eight_gpus_at_most_and_four_a_node(name: str) -> None:
    cpus, gpus, most = workers(name)["gpu"]
    assert (gpus, gpus * most) == (4, 8)
    cluster, members = cluster_of([Nodes(cpus, gpus, most)], []), Settings().members
    plan = plan_training(MEMBERS, cluster, batch_size=members.batch_size)
    width = " + ".join(str(network.workers) for network in plan.networks)
    assert width == "1 + 4 + 4"
    assert {network.backend for network in plan.networks} == {None, "nccl"}
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert re.findall(r"(\d \+ \d \+ \d) wide", text) == ([width] if name != "gcp" else [])


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
def test_tiling_pools_and_trials_fit_a_node(name: str) -> None:
    sizes = workers(name)
    cpus, gpus, _ = sizes["cpu"]
    assert (cpus >= 8, gpus) == (True, 0)  # a tiling task is one CPU
    cpus, gpus, most = sizes["gpu"]
    pool = plan_pool(cluster_of([Nodes(cpus, gpus, most)], []), shards=1000)
    assert pool.gpus == 1
    assert pool.actors == gpus * most
    assert pool.cpus * gpus <= cpus
    for path in sorted((ROOT / "tune_configs").glob("*.yaml")):
        trial = read_sweep(str(path)).resources
        assert trial.gpu <= 1
        assert trial.cpu * (gpus / max(trial.gpu, 0.01) if trial.gpu else 1) <= cpus, path.name


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_that_segment_are_off_and_planned_with_when_they_are_on(name: str) -> None:
    """More of the nodes that train, so that a worker of either kind has the same CPUs; without them nothing changes."""
    config = load(name)
    nodes = config["available_node_types"]
    assert {nodes[kind]["max_workers"] for kind in SEGMENT} == {0}
    assert nodes_of(config) == nodes_of({**config, "available_node_types": {
        kind: node for kind, node in nodes.items() if kind not in SEGMENT}})  # fmt: skip
    for kind in SEGMENT:
        assert nodes[kind]["resources"] == nodes["gpu_spot"]["resources"]
        nodes[kind]["max_workers"] = 25
    config["max_workers"] = 35
    planned = cluster_of([], nodes_of(config))
    assert (planned.gpus, planned.gpu_cpus) == (100, 12)
    pool = plan_segment_pool(planned)
    assert (pool.actors, pool.gpus, pool.cpus) == (100, 1, 1)


@pytest.mark.parametrize("name", [*CLOUDS, "kuberay"])
def test_a_run_knows_which_nodes_may_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the head of `ray up` from the file it leaves there, on Kubernetes from the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("APACS_RAY_NODES", raising=False)
    assert startable_nodes() == []
    if name == "kuberay":
        (value,) = (one["value"] for one in container(groups()["head"])["env"] if one["name"] == "APACS_RAY_NODES")
        monkeypatch.setenv("APACS_RAY_NODES", value)
    else:
        shutil.copy(CLUSTER / f"{name}.yaml", tmp_path / "ray_bootstrap_config.yaml")
    assert {(nodes.cpus, nodes.gpus, nodes.count) for nodes in startable_nodes()} == set(workers(name).values())


def test_a_variable_that_names_no_nodes_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("8", "[{cpus: 8}]", "[cpus", "[{cpus: many, gpus: 0, count: 1}]"):
        monkeypatch.setenv("APACS_RAY_NODES", value)
        with pytest.raises(UsageError, match=r"APACS_RAY_NODES: .* names no nodes; write it as"):
            startable_nodes()


# versions and secrets


def pins() -> dict[str, Requirement]:
    lines = (CLUSTER / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in found}


def declared() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["optuna"]]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_every_dependency_is_pinned_within_its_range() -> None:
    wanted, pinned = declared(), pins()
    assert wanted.pop("ray").specifier.contains(ray.__version__)
    assert set(pinned) == set(wanted)
    for name, requirement in pinned.items():
        (exact,) = requirement.specifier
        assert exact.operator == "==", name
        assert wanted[name].specifier.contains(exact.version), name
        assert requirement.extras == wanted[name].extras, name


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_install_the_pinned_ray(name: str) -> None:
    config = prepare_config(load(name))
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any(f"'{PINNED}' -r ~/requirements.txt" in command for command in commands)
        assert not any(re.search(r"\.whl|ray-wheels|nightly|\.dev\d", command) for command in commands)


def test_one_version_of_ray_everywhere() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={ray.__version__}\n" in dockerfile
    assert '"ray[data,default,train,tune]==${RAY_VERSION}"' in dockerfile
    assert ray_cluster()["rayVersion"] == ray.__version__
    assert all(container(group)["image"].endswith(f"apacs_ray:{ray.__version__}") for group in groups().values())
    for path in [*CLUSTER.glob("*.yaml"), CLUSTER / "Dockerfile", CLUSTER / "README.md"]:
        named = re.findall(r"(?:apacs_ray:|ray\[[a-z,]+\]==|Ray )(\d+\.\d+\.\d+)", path.read_text())
        assert set(named) <= {ray.__version__}, path.name


def test_the_image_holds_what_the_job_runs() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) (\S+)$", dockerfile, re.MULTILINE)
    assert all((ROOT / source).exists() for source, _ in copied)
    parts = ("apacs_ray", "pipelines", "configs", "tune_configs", "pyproject.toml")
    assert {f"/app/{part}" for part in parts} <= {to for _, to in copied}
    assert "PYTHONPATH=/app" in dockerfile
    uid = re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert uid is not None
    assert all(
        group["template"]["spec"]["securityContext"]["runAsUser"] == int(uid[1]) != 0 for group in groups().values()
    )


@pytest.mark.parametrize("path", sorted(path for path in CLUSTER.rglob("*") if path.is_file()), ids=lambda p: p.name)
def test_no_keys(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", text)
    assert not re.search(r"(?i)aws_secret_access_key|aws_access_key_id|private_key|RAY_AUTH_TOKEN\b", text)


def test_a_jobs_working_directory_is_small_and_holds_what_runs(tmp_path: Path) -> None:
    """As Ray packs `--working-dir .`, by `.gitignore` and `.rayignore`; runs and caches are large, and stay behind."""
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    assert package.stat().st_size < 2 << 20  # the source, not compressed
    with zipfile.ZipFile(package) as packed:
        names = set(packed.namelist())
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipelines").glob("*.py")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "apacs_ray").rglob("*.py")}
    sweeps = {f"tune_configs/{path.name}" for path in (ROOT / "tune_configs").iterdir()}
    assert scripts | modules | sweeps <= names
    assert not [name for name in names if name.startswith((".git/", "runs/", "tests/", "docs/"))]


@pytest.mark.parametrize("name", [".rayignore", ".gitignore"])
def test_what_a_job_uploads_is_the_whole_package(name: str) -> None:
    """A pattern without a slash before it also hides a room of that name within the package, such as `runs/`."""
    lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
    anywhere = {line.rstrip("/") for line in lines if line and not line.startswith(("#", "/"))}
    assert {"/runs/"} <= set(lines)
    for folder in ("apacs_ray", "pipelines", "configs", "tune_configs"):
        rooms = {path.name for path in (ROOT / folder).rglob("*") if path.is_dir()} - {"__pycache__"}
        assert not rooms & anywhere

"""The machines to train on, and the plans that follow from them: of the members, and of the sweep's trials."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from apacs_ray.config.command_line import Command
from apacs_ray.config.sweep import read_sweep
from apacs_ray.distributed.cluster import refuse_local, why_unreachable
from apacs_ray.distributed.probe import ClusterProbe, probe_cluster
from apacs_ray.distributed.resource_plan import Cluster, Nodes, cluster_of, plan_training
from apacs_ray.distributed.trial_plan import plan_sweep
from apacs_ray.doctor.finding import Finding
from apacs_ray.doctor.gpu_memory import check_gpu_memory, smallest_gpu
from apacs_ray.doctor.machine import usable_cpus
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import MEMBERS

ADVICE = "unset RAY_ADDRESS to run on this machine, or start the cluster (ray start --head) and give its address"


def check_cluster(command: Command, probe: Callable[[], ClusterProbe] = probe_cluster) -> Iterator[Finding]:
    """Check the plans of training on the cluster at `RAY_ADDRESS`, else on this machine, where Ray is not started."""
    places = ((command.output, "--output"), (command.data, "--data"))
    yield from check_plans(places, lambda cluster: _plans(command, cluster), probe)


def check_plans(
    places: Iterable[tuple[str | None, str]],
    plans: Callable[[Cluster], Iterator[Finding]],
    probe: Callable[[], ClusterProbe] = probe_cluster,
) -> Iterator[Finding]:
    """Check the cluster, that its nodes see all `places` (URI and option), and the `plans` on it."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        cluster = this_machine()
        yield Finding("cluster", "ok", f"this machine: {_resources(cluster)} (RAY_ADDRESS is not set)")
        yield from plans(cluster)
        return
    problem = why_unreachable(address)
    if problem:
        yield Finding("cluster", "failed", f"RAY_ADDRESS {address}: {problem}", ADVICE)
        return
    try:
        probed = probe()
    except ApacsError as error:
        advice = "set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN here; run the same Ray and Python there"
        yield Finding("cluster", "failed", f"RAY_ADDRESS {address}: {error}", advice)
        return
    machines = f"{probed.machines} machine{'s' * (probed.machines != 1)}"
    yield Finding("cluster", "ok", f"RAY_ADDRESS {address}: {machines}, {_resources(probed.cluster)}")
    for uri, option in places:
        try:
            refuse_local(probed.machines, uri, option)
        except ApacsError as error:
            yield Finding("cluster", "failed", str(error), "copy it to S3: aws s3 sync; and give its URI")
    yield from plans(probed.cluster)


def this_machine() -> Cluster:
    """Return what a run without a cluster would have: the CPUs and GPUs that this process may use."""
    import torch

    cpus = usable_cpus()
    return cluster_of([Nodes(cpus, float(torch.cuda.device_count()), 1)], [])


def _plans(command: Command, cluster: Cluster) -> Iterator[Finding]:
    plans = [_members(command, cluster)]
    if command.settings.fusion.from_best:
        plans.append(_sweep(command, cluster))
    yield from plans
    if all(plan.state == "ok" for plan in plans):
        here = os.environ.get("RAY_ADDRESS", "") in ("", "local")
        yield from check_gpu_memory(command.settings, cluster, smallest_gpu() if here else None)


def _members(command: Command, cluster: Cluster) -> Finding:
    members = command.settings.members
    plan = plan_training(MEMBERS, cluster, workers=members.workers, batch_size=members.batch_size, mode=members.mode)
    gpus = sum(network.workers * network.gpus for network in plan.networks)
    if gpus > cluster.gpus + 1e-6:
        return Finding("plan", "failed", f"{plan.describe()}: more GPUs than there are", "lower --members.workers")
    return Finding("plan", "ok", plan.describe())


def _sweep(command: Command, cluster: Cluster) -> Finding:
    """Check that the trials of the sweep fit. That its file can be read is known since the options were parsed."""
    config = command.settings.tune.config
    sweep = read_sweep(config)
    try:
        each, at_once = plan_sweep(sweep, cluster, command.settings.fusion.batch_size)
    except ApacsError as error:
        advice = f"lower resources in {config}, or train without the sweep: --fusion.from_best false"
        return Finding("sweep", "failed", str(error), advice)
    return Finding("sweep", "ok", f"{config}: {sweep.trials_in_all} trials, {at_once} at a time, each {each.ask()}")


def _resources(cluster: Cluster) -> str:
    return f"{cluster.cpus:g} CPU{'s' * (cluster.cpus != 1)}, {cluster.gpus:g} GPU{'s' * (cluster.gpus != 1)}"

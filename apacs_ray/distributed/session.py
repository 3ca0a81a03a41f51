"""Joining or starting Ray.

A run joins a cluster only when `RAY_ADDRESS` is set (a submitted job has it); else it starts its own on this machine
and ends it. Every worker process is held to the driver's copy of the source.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from apacs_ray.distributed.autoscaler import startable_nodes
from apacs_ray.distributed.metrics import Gauges
from apacs_ray.distributed.resource_plan import Cluster, Nodes, cluster_of
from apacs_ray.distributed.signals import stop_on_signals
from apacs_ray.errors import ApacsError
from apacs_ray.runs.provenance import ROOT, require_source, source_hash
from apacs_ray.runs.run import Run
from apacs_ray.storage import is_local
from apacs_ray.storage.own_folder import own_folder

# For processes that run networks: glibc keeps large freed blocks instead of giving them back, so that a step does not
# wait for the kernel to clear the pages of every tensor anew (a quarter of a CPU step). One arena: the others always
# give back.
KEEP_MEMORY = {
    "env_vars": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1),
        "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1),
    }
}


class RaySession:
    """Ray for one run, started when a stage first needs it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._started = False
        self.gauges = Gauges()

    def start(self) -> None:
        """Join or start Ray; later calls do nothing. Raises ApacsError when a local path meets several nodes."""
        if self._started:
            return
        prepare_ray()
        import ray

        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                _temp_dir=_private_sessions(),
            )
            self._run.lease.note_ray_session(ray._private.worker._global_node.get_session_dir_path())
        stop_on_signals()  # Ray put handlers of its own in their place
        self._started = True
        self.gauges.open()
        machines = joined_machines()
        refuse_local(machines, self._run.store.uri, "--output")
        refuse_local(machines, self._run.data, "--data")

    def stop(self) -> None:
        """Leave the cluster, or end the one that was started."""
        if self._started:
            import ray

            self.gauges.close()
            ray.shutdown()
            self._started = False

    def has_gpus(self) -> bool:
        """Whether a node that is there has a GPU; `cluster` also counts those that may come."""
        import ray

        return any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes())

    def cluster(self) -> Cluster:
        """What the cluster has, or what its autoscaler may give it."""
        return joined_cluster()


def joined_machines() -> int:
    """How many machines it has, or will have when its autoscaler has started all it may beside the head."""
    import ray

    there = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    if "RAY_FAKE_CLUSTER" in os.environ:  # the nodes that it starts are all on this machine (cluster/local.yaml)
        return there
    return max(there, 1 + sum(nodes.count for nodes in _startable()))


def refuse_local(machines: int, uri: str | None, option: str) -> None:
    """Raise ApacsError when what `option` names is seen by this machine only, and there are several."""
    if machines > 1 and uri is not None and is_local(uri):
        raise ApacsError(f"{uri}: a local {option} cannot be seen by all {machines} nodes; give s3://bucket/prefix")


def joined_cluster() -> Cluster:
    """What the cluster that this process has joined has, or what its autoscaler may give it."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return cluster_of(
        [Nodes(node.get("CPU", 0.0), node.get("GPU", 0.0), 1) for node in alive],
        _startable(),
    )


def _startable() -> list[Nodes]:
    """Nodes that the autoscaler of the cluster we joined may start; a Ray of our own has none."""
    return startable_nodes() if os.environ.get("RAY_ADDRESS") else []


def prepare_ray() -> None:
    """Settings of Ray that must stand before it is imported, here and (by inheritance) in its workers."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray Train looks at its workers this often (s), and a worker that has told of an epoch waits for it
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray Data looks at its tasks every 0.1 s, and a thread of its own that fetches what they say of their output makes
    # it look twice or three times before it starts the next task; ours say little
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        _keep_to_ourselves()
        path = os.environ.get("PYTHONPATH")
        if str(ROOT) not in (path or "").split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])


def _keep_to_ourselves() -> None:
    """A Ray of our own: every port on the loopback address, and a token that only this run's processes know."""
    # Ray's name for it: its default on Windows and macOS, where a single machine is all there is
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for library in ("GLOO", "NCCL"):  # among the workers of one training
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    if not any(f"RAY_AUTH_{name}" in os.environ for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        # left alone, Ray makes one for all clusters, in a file that every user of the machine may read
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _private_sessions() -> str | None:
    """A folder of this user's own for Ray's sockets and logs, which Ray itself opens to everybody.

    None where `RAY_TMPDIR` or `TMPDIR` says where they are to be: paths of sockets are limited to 107 characters.
    """
    if "RAY_TMPDIR" in os.environ or "TMPDIR" in os.environ:
        return None
    return str(own_folder(f"/tmp/apacs_ray-{os.getuid()}") / "ray")


def configure_data() -> None:
    """Set Ray Data up for this process: in order, quiet, nothing dropped. Before any dataset is built."""
    from ray.data import DataContext
    from ray.data._internal.execution.resource_manager import ResourceManager

    # A dataset begins without resources, one task at a time, until it asks a second time: Ray would wait for a second
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.2
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors reach the user as exceptions


def map_blocks(
    work: Callable[[pa.Table], pa.Table], blocks: Sequence[pa.Table], *, cpus: float = 1
) -> Iterator[dict[str, Any]]:
    """Rows of the tables that `work(block)` returns, in the order of `blocks`; one Ray Data task a block.

    No more tasks at a time than nodes without GPUs hold: for more, an autoscaler would start GPU nodes, too.
    """
    import ray

    expected = source_hash()

    def checked(block: pa.Table) -> pa.Table:
        require_source(expected)
        return work(block)

    configure_data()
    places = int(joined_cluster().tiling_cpus / cpus)
    at_once = ray.data.TaskPoolStrategy(size=max(1, min(places, len(blocks))))
    dataset = ray.data.from_arrow(list(blocks)).map_batches(
        checked, batch_size=None, batch_format="pyarrow", num_cpus=cpus, compute=at_once
    )
    yield from dataset.iter_rows()

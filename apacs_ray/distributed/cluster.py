"""What the cluster that this process has joined has, and what its autoscaler may add."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from apacs_ray.distributed.autoscaler import startable_nodes
from apacs_ray.distributed.head_watch import why_silent
from apacs_ray.distributed.ray_internals import address_of_auto, nodes_are_simulated
from apacs_ray.distributed.resource_plan import Cluster, Nodes, cluster_of
from apacs_ray.errors import ApacsError
from apacs_ray.storage import is_local

CLIENT_PORT = 10001  # where Ray's client server listens, if the address does not say


def joined_machines() -> int:
    """Return how many machines there are, or will be when the autoscaler has started all it may beside the head."""
    import ray

    there = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    if nodes_are_simulated():
        return there
    return max(there, 1 + sum(nodes.count for nodes in _startable()))


def refuse_local(machines: int, uri: str | None, option: str) -> None:
    """Raise ApacsError when what `option` names is seen by this machine only, and there are several."""
    if machines > 1 and uri is not None and is_local(uri):
        raise ApacsError(f"{uri}: a local {option} cannot be seen by all {machines} nodes; give s3://bucket/prefix")


def has_gpus() -> bool:
    """Return whether a node that is there has a GPU; `joined_cluster` also counts those that may come."""
    import ray

    return any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes())


def joined_cluster() -> Cluster:
    """Return what the cluster that this process has joined has, or what its autoscaler may give it."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return cluster_of(
        [Nodes(node.get("CPU", 0.0), node.get("GPU", 0.0), 1) for node in alive],
        _startable(),
    )


def _startable() -> list[Nodes]:
    """Nodes that the autoscaler of the cluster we joined may start; a Ray of our own has none."""
    return startable_nodes() if os.environ.get("RAY_ADDRESS") else []


def why_unreachable(address: str) -> str | None:
    """Return why nothing can be joined at what `RAY_ADDRESS` says; None where somebody answers."""
    if address.startswith(("http://", "https://")):
        return "the address of the job server, which takes jobs (ray job submit); a driver cannot join there"
    if address == "local":
        return None
    try:
        return why_silent(*head_of(address))
    except ApacsError as error:
        return str(error)


def head_of(address: str) -> tuple[str, int]:
    """Return host and port of the head at `HOST:PORT`, `ray://HOST[:PORT]` or `auto`.

    Raises:
        ApacsError: It names none.
    """
    if address == "auto" and (address := address_of_auto() or "auto") == "auto":
        raise ApacsError("no cluster was started on this machine")
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        host, port = parts.hostname, parts.port or (CLIENT_PORT if parts.scheme == "ray" else None)
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise ApacsError("no HOST:PORT")
    return host, port

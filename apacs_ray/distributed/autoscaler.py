"""Which nodes an autoscaler may start. Ray's open-source autoscaler tells nobody, so it is read where it reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from apacs_ray.distributed.resource_plan import Nodes
from apacs_ray.errors import UsageError

VARIABLE = "APACS_RAY_NODES"  # as in [{cpus: 14, gpus: 0, count: 8}, {cpus: 44, gpus: 4, count: 2}]
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where `ray up` leaves the cluster's file on the head


def startable_nodes() -> list[Nodes]:
    """Return the nodes that an autoscaler may start.

    Returns:
        What `APACS_RAY_NODES` says, or the cluster's file that `ray up` left on this machine; empty without either.

    Raises:
        UsageError: The variable names no nodes.
    """
    text = os.environ.get(VARIABLE)
    if text:
        return _given(text)
    path = BOOTSTRAP.expanduser()
    return nodes_of(yaml.safe_load(path.read_text())) if path.is_file() else []


def nodes_of(config: Mapping[str, Any]) -> list[Nodes]:
    """The worker nodes of a cluster's file, as Ray's cluster launcher reads it; types that may not start are none."""
    limit = config.get("max_workers", 2)  # Ray's default
    head = config.get("head_node_type")
    return [
        Nodes(float(has.get("CPU", 0)), float(has.get("GPU", 0)), min(limit, kind.get("max_workers", limit)))
        for name, kind in config.get("available_node_types", {}).items()
        if name != head and (has := kind.get("resources", {})) and kind.get("max_workers", limit)
    ]


def _given(text: str) -> list[Nodes]:
    try:
        return [Nodes(float(one["cpus"]), float(one["gpus"]), int(one["count"])) for one in yaml.safe_load(text)]
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        example = "[{cpus: 32, gpus: 0, count: 8}, {cpus: 48, gpus: 4, count: 2}]"
        raise UsageError(f"{VARIABLE}: {text!r} names no nodes; write it as {example}") from error

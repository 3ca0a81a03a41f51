"""What the cluster at `RAY_ADDRESS` has, found by a child process: a driver that cannot join may hang or be ended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass

from apacs_ray.distributed.resource_plan import Cluster, Nodes
from apacs_ray.errors import ApacsError
from apacs_ray.runs.provenance import ROOT

TIMEOUT = 40.0  # s that joining may take


@dataclass(frozen=True)
class ClusterProbe:
    """Resources of all nodes together, and how many machines they are."""

    cluster: Cluster
    machines: int


def probe_cluster(timeout: float = TIMEOUT) -> ClusterProbe:
    """Join, look and leave within `timeout` s. Raises ApacsError with Ray's reason."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "apacs_ray.distributed.probe"]
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ApacsError(f"Ray did not join within {timeout:g} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise ApacsError(f"Ray did not join: {cause(done.stderr) or f'exit status {done.returncode}'}")
    tree = json.loads(lines[-1])
    kinds = tuple(Nodes(**nodes) for nodes in tree["cluster"].pop("kinds"))
    return ClusterProbe(Cluster(**tree["cluster"], kinds=kinds), tree["machines"])


def cause(text: str) -> str:
    """Return the error in a process's output that the others followed from, else its last line, cut to a sentence."""
    errors = re.findall(r"^[\w.]*(?:Error|Exception): .+", text, re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors.sort(key=lambda line: "Authentication" not in line)  # Ray goes on from a wrong token to other troubles
    return (errors or lines[-1:] or [""])[0].split(". ")[0]


def main() -> None:
    """Print the probe as one line of JSON."""
    from apacs_ray.distributed.cluster import joined_cluster, joined_machines
    from apacs_ray.distributed.session import prepare_ray

    prepare_ray()
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    print(json.dumps(asdict(ClusterProbe(joined_cluster(), joined_machines()))), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

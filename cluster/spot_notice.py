"""Drain this node when the cloud announces its preemption: `python spot_notice.py aws|gcp ADDRESS_OF_THE_GCS`.

Runs beside a worker's raylet, started by aws.yaml and gcp.yaml, and asks the instance's metadata service. Ray gives a
node that is drained no more tasks, and a training leaves it at once: it loses neither an epoch nor one of its retries.
Ends when Ray has accepted, or with the raylet; what starts a raylet again starts this again.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

METADATA_TIMEOUT = 2.0  # s that the metadata service may take
DRAIN_TIMEOUT = 15.0  # s that the GCS may take; then the request is repeated
AWS_NOTICE, GCP_NOTICE = 120, 30  # s before the instance ends
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows these addresses


def ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """Return the text of an answer, of 64 KiB at most. Raises OSError, HTTPException and ValueError."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    with DIRECT.open(request, timeout=METADATA_TIMEOUT) as answer:
        return str(answer.read(1 << 16), "utf-8")


def ask_aws(base: str) -> int | None:
    """Return the seconds until EC2 takes the instance; None without a notice, which is a 404."""
    token = ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    answer = ask(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    return aws_seconds(answer, time.time())


def aws_seconds(text: str, now: float) -> int | None:
    """Return the seconds from `now` (Unix time) to the `time` of an `instance-action`; None when the text is none."""
    match json.loads(text):
        case {"action": "terminate" | "stop" | "hibernate", "time": str(end)}:
            try:
                left = datetime.fromisoformat(end).timestamp() - now
            except ValueError:  # still a notice
                return AWS_NOTICE
            return max(1, min(AWS_NOTICE, int(left)))  # clocks may differ
    return None


def ask_gcp(base: str) -> int | None:
    """Return the seconds until Compute Engine takes the instance; None without a notice."""
    return gcp_seconds(ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}))


def gcp_seconds(text: str) -> int | None:
    """Return the seconds that `preempted` leaves when it is TRUE, else None."""
    return GCP_NOTICE if text.strip() == "TRUE" else None


@dataclass(frozen=True)
class Cloud:
    """A cloud's metadata service: its URL, the question, and the seconds between two questions."""

    base: str
    ask: Callable[[str], int | None]
    every: float


CLOUDS = {
    "aws": Cloud("http://169.254.169.254", ask_aws, 5.0),
    # the guest is shut down from the notice on
    "gcp": Cloud("http://metadata.google.internal", ask_gcp, 1.0),
}


def seconds_left(cloud: Cloud, base: str) -> int | None:
    """Return the seconds until the instance is taken; None without a notice or without an answer that can be read."""
    try:
        return cloud.ask(base)
    except (OSError, http.client.HTTPException, ValueError):
        return None


def local_node(address: str) -> str | None:
    """Return the id of the worker node of the cluster at `address` whose raylet runs here, None without one."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            program, *arguments = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if program.endswith("/raylet") and f"--gcs-address={address}" in arguments and "--head" not in arguments:
            return next(word.removeprefix("--node_id=") for word in arguments if word.startswith("--node_id="))
    return None


def drain(address: str, node: str, seconds: int) -> str | None:
    """Tell the GCS that the node ends in so many seconds; return None when it has accepted, else its answer."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes this spot instance",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DRAIN_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {DRAIN_TIMEOUT:g} s"
    return None if done.returncode == 0 else " ".join(done.stdout.splitlines()[-1:]) or f"status {done.returncode}"


def watch(cloud: Cloud, base: str, address: str) -> int:
    """Ask until there is a notice, then drain until that is accepted. Returns the exit status."""
    node = local_node(address)
    if node is None:
        say(f"no raylet of {address} on this machine")
        return 1
    end: float | None = None
    while local_node(address) == node:
        if end is None and (left := seconds_left(cloud, base)) is not None:
            end = time.monotonic() + left
            say(f"notice: this instance ends in {left} s; draining node {node}")
        if end is not None:
            refused = drain(address, node, max(1, int(end - time.monotonic())))
            if refused is None:
                return 0
            say(f"not drained, once more: {refused}")
        time.sleep(cloud.every)
    return 0


def say(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


def main() -> int:
    """Parse the command line and watch."""
    parser = argparse.ArgumentParser(description="Drains this Ray node when the cloud says that it will take it.")
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("address", help="IP:PORT of Ray's head, as for ray start")
    parser.add_argument("--url", help="of the metadata service (default: the cloud's)")
    arguments = parser.parse_args()
    cloud = CLOUDS[arguments.cloud]
    return watch(cloud, arguments.url or cloud.base, arguments.address)


if __name__ == "__main__":
    sys.exit(main())

"""A small whole job from and to S3 while the store fails at random, compared with a job on a store that does not.

The store is moto behind the proxy of the tests. Each kind of fault has a job of its own, whose requests meet it at the
given rate, and one job meets all of them. The second table is what the undisturbed job asks of the store in each stage.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import boto3  # noqa: E402
from faults import FOLDERS, OPTIONS, STAGES, SWEEP, differences  # noqa: E402
from measure import options, require, show  # noqa: E402
from moto.server import ThreadedMotoServer  # noqa: E402

from apacs_ray.testing.runs import start, write_cells  # noqa: E402
from apacs_ray.testing.s3_proxy import KINDS, Behavior, Draw, Proxy, Request, at_random, proxy  # noqa: E402

RATE = 0.05  # of each kind
DELAY = 2.0  # s
BUCKET = "benchmark"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-west-1"}
METHODS = ("GET", "HEAD", "LIST", "PUT", "POST", "DELETE")


@dataclass(frozen=True)
class Job:
    """A job that ended: a local copy of its run, and its requests, each with the stage that made it."""

    output: Path
    status: int
    seconds: float
    requests: list[tuple[str, Request]]
    log: str

    def met(self) -> Counter[str]:
        """Count the requests that met each kind of fault."""
        return Counter(request.fault for _, request in self.requests if request.fault)


class Site:
    """The store, the data in it, and jobs on it."""

    def __init__(self, folder: Path, endpoint: str, running: Proxy, *, smoke: bool) -> None:
        self._folder, self._running = folder, running
        self.stages = ["ingest"] if smoke else list(STAGES)
        self._script, self._delay = ("ingest.py", 0.2) if smoke else ("full.py", DELAY)
        os.environ.update({**KEYS, "AWS_ENDPOINT_URL": running.url})
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._client.create_bucket(
            Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": KEYS["AWS_DEFAULT_REGION"]}
        )
        cells = write_cells(folder / "cells", train=10, test=5)
        for path in sorted(cells.rglob("*.*")):
            self._client.upload_file(str(path), BUCKET, f"cells/{path.relative_to(cells)}")
        self._sweep = folder / "sweep.yaml"
        self._sweep.write_text(SWEEP)

    def run(self, name: str, draw: Draw) -> Job:
        """Run one whole job; every request until its end is recorded with the stage that ran then."""
        self._running.requests.clear()
        self._running.behavior = Behavior(draw=draw, delay=self._delay)
        started = time.monotonic()
        argv = ["--data", f"s3://{BUCKET}/cells", "--output", f"s3://{BUCKET}/{name}", *OPTIONS]
        process = start(*argv, "--tune.config", str(self._sweep), script=self._script)
        starts: list[tuple[float, str]] = []
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            stage = line[9:].partition(":")[0]  # after the time
            if stage in STAGES and line.rstrip().endswith("starts"):
                starts.append((time.monotonic(), stage))
        status, seconds = process.wait(), time.monotonic() - started
        self._running.behavior = Behavior()

        def stage_of(request: Request) -> str:
            return next((stage for at, stage in reversed(starts) if request.at >= at), "before")

        requests = [(stage_of(request), request) for request in self._running.requests]
        return Job(self._fetch(name), status, seconds, requests, "".join(lines))

    def _fetch(self, name: str) -> Path:
        """Copy a run's objects to this machine, not through the proxy."""
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{name}/"):
            for item in page.get("Contents", ()):
                if item["Key"].endswith("/"):  # a folder, as pyarrow makes them
                    continue
                target = self._folder / item["Key"]
                target.parent.mkdir(parents=True, exist_ok=True)
                self._client.download_file(BUCKET, item["Key"], str(target))
        return self._folder / name


def main() -> None:
    """Run a job with each kind of fault, print the tables, and fail when one left other results."""
    parser = options(__doc__ or "", "undisturbed and all kinds together only")
    parser.add_argument("--kind", choices=[*KINDS, "all"], help="this one only")
    arguments = parser.parse_args()
    jobs: dict[str, dict[str, float]] = {kind: {kind: RATE} for kind in KINDS} | {"all": dict.fromkeys(KINDS, RATE)}
    few = arguments.quick or arguments.smoke
    chosen = [arguments.kind] if arguments.kind else ["all"] if few else list(jobs)
    with _site(smoke=arguments.smoke) as site:
        plain = site.run("undisturbed", lambda: None)
        require(plain.status == 0, f"the undisturbed run failed:\n{plain.log}")
        show("requests", _requests(plain, site.stages), arguments.json and arguments.json.with_suffix(".requests.json"))
        rows = [_row("none", plain, plain, site.stages)]
        for number, name in enumerate(chosen):
            job = site.run(name.replace(" ", "-"), at_random(jobs[name], seed=number))
            rows.append(_row(name, job, plain, site.stages))
            show("store faults", rows, arguments.json)
            if job.status != 0:
                print(job.log, flush=True)
    require(all(row["injected"] for row in rows[1:]), "no request met a fault")
    require(all(row["differences"] == "none" for row in rows), "a fault of the store changed what a job leaves")


def _row(name: str, job: Job, plain: Job, stages: Sequence[str]) -> dict[str, Any]:
    changed = [path for stage in stages if job.status == 0 for path in differences(stage, job.output, plain.output)]
    return {
        "fault": name,
        "requests": len(job.requests),
        "injected": sum(job.met().values()),
        "of each": dict(job.met()),
        "survived": "yes" if job.status == 0 else "no",
        "differences": ", ".join(changed) or ("none" if job.status == 0 else "-"),
        "s": round(job.seconds, 1),
    }


def _requests(job: Job, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Count the requests of each stage by method, with its rows and shards."""
    rows = []
    for stage in ("before", *stages):
        methods = Counter(request.method for at, request in job.requests if at == stage)
        row = {"stage": stage, **{method: methods[method] for method in METHODS}, "all": methods.total()}
        if stage != "before":
            counts = json.loads((job.output / FOLDERS[stage] / "_committed.json").read_text())["counts"]
            row |= {"rows": counts["rows_in"], "shards": len(list(job.output.glob(f"{FOLDERS[stage]}/split=*/*")))}
        rows.append(row)
    return rows


@contextlib.contextmanager
def _site(*, smoke: bool) -> Iterator[Site]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with tempfile.TemporaryDirectory() as folder, proxy(endpoint) as running:
        yield Site(Path(folder), endpoint, running, smoke=smoke)
    server.stop()


if __name__ == "__main__":
    main()

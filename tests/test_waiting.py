"""Workers that wait for resources are told of: which, for what, for how long."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.waiting import OneAsk, Waits
from apacs_ray.testing.runs import environment

FCN8 = NetworkPlan("fcn8", 2, 9.6, 0.8, 4, 8)
FCN32 = NetworkPlan("fcn32", 1, 2.4, 0.2, 1, 1)
WAITS = [{"CPU": 9.6, "GPU": 0.8}] * 2
OTHERS = [[{"CPU": 9.6, "GPU": 0.8}], [{"CPU": 1.0}] * 2]  # of other programs in the cluster


def test_it_is_told_after_two_minutes_and_then_ever_more_rarely() -> None:
    waits = Waits({"fcn8": FCN8, "fcn32": FCN32})
    told = {now: waits.look([WAITS, *OTHERS], "1 node", now) for now in range(1000, 2000, 10)}
    assert [now for now, lines in told.items() if lines] == [1120, 1240, 1480, 1960]
    (line,) = told[1240]
    assert line.startswith("fcn8: has waited 4 min for 2 workers x 0.8 GPU + 9.6 CPU over NCCL; the cluster has 1 node")


def test_of_workers_alike_it_is_said_whether_all_of_them_wait() -> None:
    waits = Waits({"fcn16": FCN8, "fcn8": FCN8}, told_after=0)
    assert waits.look([WAITS], "", 0)[0].startswith("fcn16 or fcn8: ")
    assert waits.look([WAITS, WAITS], "", 1)[0].startswith("fcn16, fcn8: ")


def test_a_request_that_ray_makes_again_is_the_same_wait_and_one_that_was_met_is_over() -> None:
    waits = Waits({"fcn8": FCN8})
    again = [waits.look([WAITS] if now % 60 else [], "", now) for now in range(0, 200, 10)]
    assert [number * 10 for number, lines in enumerate(again) if lines] == [130]
    for now in range(200, 250, 10):
        assert not waits.look([], "", now)
    assert not waits.look([WAITS], "", 300)
    assert not waits.look([WAITS], "", 410)
    assert waits.look([WAITS], "", 420)


def test_where_something_was_done_meanwhile_nobody_waits() -> None:
    waits = Waits({"a task": OneAsk(1.0)})
    for now in range(0, 600, 10):
        if now % 100 == 50:
            waits.went_on()
        assert not waits.look([[{"CPU": 1.0, "memory": 443.0}]], "", now)
    for now in range(600, 670, 10):
        assert not waits.look([[{"CPU": 1.0}]], "", now)
    (line,) = waits.look([[{"CPU": 1.0}]], "1 node", 670)
    assert line.startswith("a task: has waited 2 min for 1 CPU; the cluster has 1 node now; ")


def test_a_pool_and_tasks_that_find_no_place_are_told_of() -> None:
    """In a Ray of its own, where nothing has the GPU that a pool asks for, and one CPU is taken that a task wants."""
    code = """
        import threading, time
        from apacs_ray.distributed.session import prepare_ray
        prepare_ray()
        import pyarrow as pa, ray
        from apacs_ray.distributed import tasks, waiting
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        told, told_of_waits = [], waiting.told_of_waits
        waiting.say = told.append
        tasks.told_of_waits = lambda asked: told_of_waits(asked, told_after=0.0, look=0.2)
        def others():
            time.sleep(1e6)
        taken = ray.remote(num_cpus=1)(others).remote()
        pool = tasks.PoolPlan(1, 0.5, 1.0)
        block = pa.table({"number": [1]})
        def start(work):
            threading.Thread(target=lambda: list(work()), daemon=True).start()
        start(lambda: tasks.map_blocks(lambda table: table, [block]))
        start(lambda: tasks.map_shards(lambda: lambda path: block, ["path"], pool))
        ends = time.monotonic() + 300
        first = {}
        while len(first) < 2 and time.monotonic() < ends:
            time.sleep(0.1)
            for line in list(told):
                first.setdefault(line.partition(":")[0], line.partition(";")[0])
        print(*sorted(first.values()), sep="|", flush=True)
        import os
        os._exit(0)  # Ray Data waits for its pool without end
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == (
        "a process that predicts: has waited 0 min for 1 GPU + 0.5 CPU|a task: has waited 0 min for 1 CPU\n"
    ), done.stderr


def test_ray_says_who_waits() -> None:
    """In a Ray of its own, without GPUs, which is asked for one."""
    code = """
        import sys, time
        from apacs_ray.distributed.session import prepare_ray
        prepare_ray()
        import ray
        from ray.util import placement_group
        from apacs_ray.distributed.resource_plan import NetworkPlan
        from apacs_ray.distributed import waiting
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        told = []
        waiting.say = told.append
        placement_group([{"CPU": 0.5, "GPU": 1.0}] * 2)
        asked = {"fcn8": NetworkPlan("fcn8", 2, 0.5, 1.0, 1, 1), "fcn32": NetworkPlan("fcn32", 1, 0.5, 1.0, 1, 1)}
        with waiting.told_of_waits(asked, told_after=0.0, look=0.2):
            ends = time.monotonic() + 60
            while not told and time.monotonic() < ends:
                time.sleep(0.1)
        print(told[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ask, there = "2 workers x 1 GPU + 0.5 CPU over NCCL", "1 node with 0 GPU + 1 CPU"
    assert done.stdout.startswith(f"fcn8: has waited 0 min for {ask}; the cluster has {there} now; ")

"""What `distributed.ray_internals` touches is still there in the installed Ray, and still does what a run relies on."""

from __future__ import annotations

import inspect
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apacs_ray.config.settings import Settings
from apacs_ray.distributed import ray_internals


def in_fresh_process(code: str) -> list[str]:
    """The words that code prints in a process without variables of Ray but those that a run sets."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    begin = "from apacs_ray.distributed.session import prepare_ray; prepare_ray()\n"
    done = subprocess.run([sys.executable, "-c", begin + code], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"Ray has changed: {done.stderr.strip().splitlines()[-1]}"
    return done.stdout.split()


def test_variables_that_ray_reads_when_it_is_imported() -> None:
    """One look at Ray for all of them: importing it takes seconds."""
    interval, fetcher, clusters = in_fresh_process("""
from ray._private import ray_constants
from ray.data._internal.execution.metadata_fetcher import make_metadata_fetcher
from ray.train.v2._internal import constants
import os
print(os.environ[constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR], type(make_metadata_fetcher()).__name__)
print(ray_constants.ENABLE_RAY_CLUSTER)
""")
    assert float(interval) == 0.2, "Ray Train does not read how often it looks at workers from our variable"
    assert fetcher == "InlineMetadataFetcher", "Ray Data fetches metadata on a thread whatever our variable says"
    assert clusters == "False", "a local Ray no longer stays on the loopback address by our variable"


def test_a_node_may_start_many_processes_at_once() -> None:
    import ray

    raylet = Path(ray.__file__).parent / "core/src/ray/raylet/raylet"
    with raylet.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as program:
        assert program.find(b"worker_maximum_startup_concurrency") >= 0, "raylet has no such setting: it warns again"


def test_a_dataset_asks_for_resources_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.data._internal.execution.resource_manager import ResourceManager

    before = ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S
    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", before)
    ray_internals.start_datasets_soon()
    assert before > ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, "Ray asks as soon by itself: drop this setting"
    source = inspect.getsource(ResourceManager)
    assert "self.GLOBAL_LIMITS_UPDATE_INTERVAL_S" in source, "Ray Data does not read the interval from its class"


def test_the_folder_of_a_session_can_be_given_and_asked_for() -> None:
    import ray
    from ray._private import node, worker

    option = ray_internals.session_folder_option("/tmp/there")
    parameters = inspect.signature(inspect.unwrap(ray.init)).parameters
    source = inspect.getsource(inspect.unwrap(ray.init))
    for name in option:
        assert name in parameters or f'"{name}"' in source, f"ray.init takes no {name} any more"
    assert hasattr(worker, "_global_node"), "ray._private.worker has no _global_node"
    assert callable(node.Node.get_session_dir_path), "a node does not tell its session's folder"


def test_blocks_become_a_dataset_without_a_task() -> None:
    from ray.data import read_api

    assert list(inspect.signature(read_api.from_blocks).parameters) == ["blocks"], "from_blocks takes something else"
    source = inspect.getsource(read_api.from_blocks)
    assert ".remote(" not in source, "from_blocks starts a task, which needs a CPU that may not be free"
    assert "ray.put(" in source, "from_blocks does not put blocks into the object store itself"


def test_what_is_pending_can_be_asked_for() -> None:
    """`test_waiting.py` asks a Ray; here the names are held."""
    from ray.autoscaler.v2 import schema, sdk

    assert next(iter(inspect.signature(sdk.get_cluster_status).parameters)) == "gcs_address"
    assert "resource_demands" in schema.ClusterStatus.__dataclass_fields__
    assert "ray_task_actor_demand" in schema.ResourceDemandSummary.__dataclass_fields__
    assert {"bundle", "count"} <= schema.ResourceRequestByCount.__dataclass_fields__.keys()


def test_one_worker_has_no_process_group() -> None:
    from ray.train.backend import Backend, BackendConfig
    from ray.train.torch import TorchConfig

    config = ray_internals.torch_config_without_process_group()
    assert isinstance(config, TorchConfig)
    assert isinstance(inspect.getattr_static(BackendConfig, "backend_cls"), property), (
        "backends are named otherwise now"
    )
    assert config.backend_cls is Backend, "a TorchTrainer of one worker would open a port"


def test_nodes_that_are_to_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import state

    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"node": 2500, "other": 0})
    assert ray_internals.draining_nodes() == {"node": 2.5, "other": 0.0}
    from ray.train.v2._internal.execution import preemption

    assert "get_draining_nodes" in inspect.getsource(preemption), "Ray Train looks for draining nodes elsewhere"


def test_bytes_in_the_memory_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental import internal_kv

    for function, names in {
        internal_kv._internal_kv_put: {"key", "value", "namespace"},
        internal_kv._internal_kv_get: {"key", "namespace"},
    }.items():
        parameters = set(inspect.signature(inspect.unwrap(function)).parameters)
        assert names <= parameters, f"{function.__name__} takes {sorted(parameters)}"
    memory: dict[tuple[bytes, bytes], bytes] = {}
    monkeypatch.setattr(
        internal_kv, "_internal_kv_put", lambda key, value, *, namespace: memory.update({(namespace, key): value})
    )
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, *, namespace: memory.get((namespace, key)))
    ray_internals.put_in_head("name", b"access")
    assert ray_internals.get_from_head("name") == b"access"
    assert ray_internals.get_from_head("another") is None


def test_aws_variables_stay_away_from_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    before = set(class_cache.ENV_VARS_TO_PROPAGATE)
    assert any(name.startswith("AWS_") for name in before), "Ray Tune copies no AWS variables any more: drop this"
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", before)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    ray_internals.keep_aws_variables_from_trials()
    assert {name for name in before if not name.startswith("AWS_")} == set(class_cache.ENV_VARS_TO_PROPAGATE)
    source = inspect.getsource(class_cache)
    assert source.count("ENV_VARS_TO_PROPAGATE") >= 2, "Ray Tune does not read the names from this list any more"


def test_what_ray_says_where_it_does_not_start() -> None:
    """`says_it_was_too_slow` knows these errors by their words."""
    import ray._private.node

    assert "timed out during startup" in inspect.getsource(ray._private.node)
    assert "RAY_gcs_server_port_wait_time_s" in inspect.getsource(ray._private.node), "Ray reads no such variable"
    with pytest.raises(RuntimeError) as caught:
        ray._raylet.wait_for_persisted_port("/tmp", "00" * 28, "none", timeout_ms=1)
    assert ray_internals.says_it_was_too_slow(caught.value)
    assert not ray_internals.says_it_was_too_slow(ValueError("no such option"))


def test_a_path_is_too_long_where_ray_finds_it_so() -> None:
    import ray._private.node

    assert 'f"session_{date_str}_{os.getpid()}"' in inspect.getsource(ray._private.node), "sessions are named otherwise"
    longest = next(n for n in range(107, 0, -1) if not ray_internals.is_too_long_for_sockets("x" * n))
    assert 40 < longest < 60


def test_only_the_line_of_the_log_level_is_kept_back() -> None:
    code = """
import os
from apacs_ray.distributed.ray_internals import without_log_level_line
with without_log_level_line():
    os.write(2, b"a\\n[x] logging.cc:303: Set ray log level from environment variable X to 3\\nb\\n")
os.write(2, b"c\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "a\nb\nc\n"


def test_a_worker_that_dies_as_it_starts_is_tried_again_as_one_that_dies_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train raises what follows instead of asking its failure policy."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    from apacs_ray.distributed import train
    from apacs_ray.distributed.resource_plan import NetworkPlan
    from apacs_ray.distributed.worker import NetworkTask, TrainingTask
    from apacs_ray.models.spec import ModelSpec
    from apacs_ray.storage import LocalStore
    from apacs_ray.training.augment import Augmentation
    from apacs_ray.training.dataset import TileDataset

    network = NetworkTask("fcn8", ModelSpec("fcn8", "member"), Settings().members, "state", "curves")
    dataset = TileDataset(LocalStore("nowhere"), None, Augmentation(0, False, False))
    task = TrainingTask((network,), dataset, {}, NetworkPlan("fcn8", 1, 1.0, 0.0, 1, 0), 0, 2, "", 60.0)
    ends: list[Exception | bool] = []

    def once(*_: object) -> bool:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(train, "_fit_once", once)
    died = ControllerError(RayActorError())
    ends[:] = [died, False, died, True]
    train.fit(task)
    assert not ends
    for too_much in ([died] * 3, [ControllerError(ValueError("else"))]):
        ends[:] = too_much
        with pytest.raises(ControllerError):
            train.fit(task)
        assert not ends

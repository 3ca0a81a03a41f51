"""Everything in Ray that it does not promise to keep, a small function each, with what relies on it.

`tests/test_ray_internals.py` holds each of them to the installed Ray.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

KEY_VALUE_NAMESPACE = b"apacs_ray"


def set_private_variables() -> None:
    """Set the undocumented variables of Ray that a run relies on. Before Ray is imported; workers inherit them.

    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S: Ray Train looks at its workers this often (s), and a worker that has told of an
    epoch waits for it; without it each epoch takes up to 2 s more.
    RAY_DATA_METADATA_PREFETCH_ON_THREAD: Ray Data looks at its tasks every 0.1 s, and a thread of its own that fetches
    what they say of their output makes it look twice or three times before it starts the next task; ours say little.
    Without it a task starts 0.1 to 0.2 s later.
    RAY_worker_maximum_startup_concurrency: how many processes a node may start at once; without it Ray warns on the
    driver's terminal that there are more than CPUs, as our workers ask for parts of one.
    RAY_gcs_server_port_wait_time_s: how long a Ray that starts waits for its first process, 30 s without it, which a
    busy machine exceeds; and how often a driver tries to join a head, for 40 s each: 20 times without it, where what
    answers at the address is no head.
    """
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1" if os.environ.get("RAY_ADDRESS") else "120")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")


def listen_on_loopback() -> None:
    """Let a Ray of our own open every port on the loopback address. Before Ray is imported.

    Ray's variable for whether clusters of several machines may be: without them, its default on Windows and macOS, it
    listens on 127.0.0.1. When Ray drops it, a local Ray listens on every address again (tests/test_security.py).
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


@contextlib.contextmanager
def without_log_level_line() -> Iterator[None]:
    """Keep a line of Ray's core off stderr while the block joins or starts Ray: that it took its log level from us.

    It is written by compiled code, past Python's streams. When its words change, it is seen again.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            for line in kept.read().splitlines(keepends=True):
                if b"Set ray log level from environment variable" not in line:
                    os.write(2, line)


@contextlib.contextmanager
def without_its_signal_handlers() -> Iterator[None]:
    """Keep Ray from taking SIGTERM over while the block joins or starts it, which takes seconds.

    Its handlers end the process with a status of their own. Ray sets all of them by one function; when it sets them
    otherwise, a command that is stopped while Ray starts ends with another status than 130.
    """
    import ray._private.utils as utils

    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def says_it_was_too_slow(error: Exception) -> bool:
    """Return whether Ray gave its own processes up that were too slow to start: node, head and their ports.

    It is told by the error's words only. When these change, a start on a busy machine is not tried again.
    """
    words = ("timed out during startup", "Failed to start GCS", "Timed out", "Did GCS start", "gcs start successfully")
    return any(text in str(error) for text in words)


def is_too_long_for_sockets(folder: str) -> bool:
    """Return whether the names of Ray's sockets below a folder are longer than a socket's may be, by Ray's own check.

    Without it Ray says so itself, in a traceback.
    """
    from ray._private.utils import validate_socket_filepath

    try:
        validate_socket_filepath(f"{folder}/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    except OSError:
        return True
    return False


def nodes_are_simulated() -> bool:
    """Return whether Ray's fake provider starts the nodes, all of them on this machine (cluster/local.yaml).

    The variable is how Ray tells its own processes so. Without it tests of the autoscaler would have a local output
    refused, and its GPUs, which are numbers only, would be looked for.
    """
    return "RAY_FAKE_CLUSTER" in os.environ


def session_folder_option(folder: str | None) -> dict[str, str | None]:
    """Return the option of `ray.init` for the folder of its sockets and logs; None: Ray's default.

    Ray documents only `RAY_TMPDIR`, which is read when Ray is imported. Without this the folder is open to every user
    of the machine.

    Returns:
        A keyword argument for `ray.init`.
    """
    return {"_temp_dir": folder}


def session_folder() -> str:
    """Return the folder of the session that this process started, which the command lines of its processes name.

    Without it a run that takes over from a killed one does not wait for the Ray processes of that.

    Returns:
        An absolute path.
    """
    import ray._private.worker

    folder: str = ray._private.worker._global_node.get_session_dir_path()
    return folder


def start_datasets_soon() -> None:
    """Let a dataset of Ray Data ask for resources every 0.2 s, not every second.

    It begins without resources, one task at a time, until it asks a second time. Without it every dataset begins a
    second later.
    """
    from ray.data._internal.execution.resource_manager import ResourceManager

    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.2


def dataset_from_blocks(blocks: Sequence[pa.Table]) -> Any:
    """Return a dataset of tables that this process puts into the object store itself.

    A developer API. The public `from_arrow` starts a task of one CPU for each block, all at once: where workers have
    taken all CPUs, as in a cluster that lost a node, training would wait forever, and for more of them than its plain
    nodes have CPUs an autoscaler starts the nodes with GPUs, too.

    Returns:
        A `ray.data.Dataset` with a block for each table.
    """
    from ray.data.read_api import from_blocks

    return from_blocks(list(blocks))


def pending_asks() -> list[dict[str, float]]:
    """Return what each task and actor asks for, by resource, that the cluster has no place for now.

    A developer API, by which `ray status` is told; bundles of placement groups are not among them.

    Raises:
        ray.exceptions.RpcError: The head does not answer.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.ray_task_actor_demand
    alike = [one for demand in demands for one in demand.bundles_by_count]
    return [dict(one.bundle) for one in alike for _ in range(one.count)]


def torch_config_without_process_group() -> Any:
    """Return the configuration of a `TorchTrainer` of one worker, which has nobody to meet.

    Ray Train's own backend would have torch listen for others, on every address. `backend_cls` is how a
    `BackendConfig` names its backend; without it the one worker opens a port.

    Returns:
        A `ray.train.torch.TorchConfig`.
    """
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class AloneConfig(TorchConfig):  # type: ignore[misc]
        """Of one worker."""

        backend_cls = Backend

    return AloneConfig()


def died_as_it_started(error: Exception) -> bool:
    """Return whether Ray Train ended a run as its controller could not use a worker that had just died.

    Its failure policy tries again where a worker dies at work, or where none comes, and not here.
    """
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    return isinstance(error, ControllerError) and isinstance(error.controller_failure, RayActorError)


def address_of_auto() -> str | None:
    """Return the address at which Ray would join when it is told `auto`; None where no cluster was started here.

    Without it a run that is told `auto` warns for a minute where the cluster is gone, or where all that Ray finds is
    one that listens for its own machine only, as ours do.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address: str | None = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None
    return address


def draining_nodes() -> dict[str, float]:
    """Return nodes that are to be taken away: id, and when they end (unix time, s; 0: nobody said when).

    Ray Train looks there; Ray has no public question for it. Without it a trial in one process keeps no checkpoint
    before its node ends, and does an epoch again.

    Returns:
        Node id -> unix time, s.
    """
    from ray._private.state import state

    return {node: end / 1000 for node, end in state.get_draining_nodes().items()}  # ms


def put_in_head(key: str, value: bytes) -> None:
    """Keep bytes in the memory of Ray's head, for every process of the cluster; never in a file.

    Without it the filesystem of Ray Tune would carry its keys (`distributed.credentials`).
    """
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(key.encode(), value, namespace=KEY_VALUE_NAMESPACE)


def get_from_head(key: str) -> bytes | None:
    """Return what `put_in_head` kept; None in another cluster."""
    from ray.experimental import internal_kv

    value: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=KEY_VALUE_NAMESPACE)
    return value


def keep_aws_variables_from_trials() -> None:
    """Keep Ray Tune from copying the driver's AWS variables into the runtime environment of trials, which Ray logs.

    Without it the keys of a store stand in Ray's logs.
    """
    from ray.tune.execution import class_cache

    names = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE = names

"""What segmenting slides takes on given machines, from unit costs: which resource is busy how long, and which is short.

Reading, networks, objects and files go on at the same time, so segmentation ends when its busiest resource does; only
finding tissue comes before. `--estimate` measures the costs on a sample of the slides (`segment_sample`), and
`benchmarks/capacity.py` those of the tables in `cluster/capacity.md`: both add them up here. All px are those of the
segmented resolution.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from apacs_ray.estimate.lines import POOL, Line
from apacs_ray.inference.cores import Core


@dataclass(frozen=True)
class UnitCosts:
    """Costs of a unit of work; seconds are those of one core (of one device for the networks).

    Attributes:
        plan: s of a slide: opened, its tissue found.
        read: s of a px of a window.
        networks: s of a px of a window.
        objects: s of a px of a core: its objects found, the part written.
        files: s of a px of a core, in the slide's files.
        glass: s of any px of a slide, in them.
        driver: s of a shard in the driver.
        part_bytes: Of a px of a core, as a part.
        file_bytes: Of a px of a core, in the slide's files.
        glass_bytes: Of any px of a slide, in them.
    """

    plan: float
    read: float
    networks: float
    objects: float
    files: float
    glass: float
    driver: float
    part_bytes: float
    file_bytes: float
    glass_bytes: float


@dataclass(frozen=True)
class Workload:
    """What is to be segmented, in all.

    Attributes:
        slides: To segment.
        size: Bytes of their files.
        pixels: px of the slides, glass too.
        cores: Those with tissue.
        core_pixels: px of them.
        window_pixels: px that the networks see: with halos.
        shards: Tasks' worth of cores.
    """

    slides: float
    size: float
    pixels: float
    cores: float
    core_pixels: float
    window_pixels: float
    shards: float

    @classmethod
    def of_slide(cls, cores: Iterable[Core], *, pixels: int, size: float, shards: int) -> Workload:
        """Return the work of a slide of so many px and bytes, of whose `cores` those without a window are none."""
        looked = [(core.box, core.window) for core in cores if core.window is not None]
        return cls(
            slides=1,
            size=size,
            pixels=pixels,
            cores=len(looked),
            core_pixels=sum(box.width * box.height for box, _ in looked),
            window_pixels=sum(window.width * window.height for _, window in looked),
            shards=shards,
        )

    def times(self, factor: float) -> Workload:
        """Return so many times the work."""
        return Workload(*(factor * getattr(self, name) for name in self.__dataclass_fields__))

    def __add__(self, other: Workload) -> Workload:
        return Workload(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


NOTHING = Workload(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Machines:
    """Where it is segmented.

    Attributes:
        cpus: Cores of all nodes.
        devices: That run the networks: GPUs, or processes on the cores.
        gpus: Whether they are GPUs.
        nodes: That read slides.
        tasks: Most tasks at a time that read, and most that find objects.
        writers: Slides whose files are written at a time.
        copies: How often a slide is copied to some node's disk; 0 where slides are read where they lie.
        disk: Bytes/s that a node's disk writes, None where not known.
        network: Bytes/s that a node receives, None where not known.
    """

    cpus: float
    devices: int
    gpus: bool
    nodes: int
    tasks: float
    writers: float
    copies: float = 0.0
    disk: float | None = None
    network: float | None = None


@dataclass(frozen=True)
class Load:
    """A resource, and the seconds that it is busy with all of the work, were it alone."""

    resource: str
    seconds: float


def core_seconds(work: Workload, costs: UnitCosts) -> dict[str, float]:
    """Return core-seconds by step, the networks' not among them."""
    return {
        "plan": costs.plan * work.slides,
        "read": costs.read * work.window_pixels,
        "objects": costs.objects * work.core_pixels,
        "files": costs.files * work.core_pixels + costs.glass * work.pixels,
    }


def bytes_moved(work: Workload, costs: UnitCosts, machines: Machines) -> float:
    """Return the bytes that come to nodes: slides, as often as they are copied, and parts to those who make files."""
    return work.size * machines.copies + costs.part_bytes * work.core_pixels


def bytes_written(work: Workload, costs: UnitCosts) -> float:
    """Return the bytes of the files of all slides."""
    return costs.file_bytes * work.core_pixels + costs.glass_bytes * work.pixels


def loads(work: Workload, costs: UnitCosts, machines: Machines) -> list[Load]:
    """Return the resources of segmentation, after all tissue is found, the busiest first."""
    cores = core_seconds(work, costs)
    networks = costs.networks * work.window_pixels
    on_cores = cores["read"] + cores["objects"] + cores["files"]
    found = [
        Load("GPUs" if machines.gpus else "networks on the CPUs", networks / machines.devices),
        Load("CPUs", (on_cores + (0.0 if machines.gpus else networks)) / machines.cpus),
        Load("tasks that read", cores["read"] / min(machines.tasks, machines.cpus)),
        Load("tasks that find objects", cores["objects"] / min(machines.tasks, machines.cpus)),
        Load("tasks that write files", cores["files"] / _writers(work, machines)),
        Load("driver", costs.driver * work.shards),
    ]
    if machines.disk is not None:
        found.append(Load("disks", work.size * machines.copies / machines.disk / machines.nodes))
    if machines.network is not None:
        found.append(Load("network", bytes_moved(work, costs, machines) / machines.network / machines.nodes))
    return sorted(found, key=lambda load: -load.seconds)


def bottleneck(work: Workload, costs: UnitCosts, machines: Machines) -> str:
    """Name the resource that is short first, and, of cores, the step that takes the most of them."""
    first = loads(work, costs, machines)[0].resource
    if first != "CPUs":
        return first
    steps = core_seconds(work, costs)
    del steps["plan"]
    if not machines.gpus:
        steps["networks"] = costs.networks * work.window_pixels
    most = max(steps, key=lambda step: steps[step])
    return f"CPUs ({most}: {steps[most] / sum(steps.values()):.0%} of their work)"


def wall_seconds(work: Workload, costs: UnitCosts, machines: Machines) -> float:
    """Return the seconds from start to end: all tissue is found, then the busiest resource is waited for."""
    planning = costs.plan * work.slides / max(1.0, min(machines.cpus, work.slides))
    return POOL + planning + loads(work, costs, machines)[0].seconds


def cpus_a_gpu(work: Workload, costs: UnitCosts) -> float:
    """Return the cores that a GPU needs beside it, so that it never waits for windows nor for those who take masks."""
    cores = core_seconds(work, costs)
    return (cores["read"] + cores["objects"] + cores["files"]) / (costs.networks * work.window_pixels)


def segment_lines(work: Workload, costs: UnitCosts, machines: Machines) -> list[Line]:
    """Return the lines of an estimate, a step each; of each the wall time that it would take alone."""
    cores, networks = core_seconds(work, costs), costs.networks * work.window_pixels
    cpu, gpu = (0.0, networks) if machines.gpus else (networks, 0.0)
    parts, written = costs.part_bytes * work.core_pixels, bytes_written(work, costs)

    def line(step: str, units: float, size: float, places: float) -> Line:
        seconds, count = cores[step], round(units)
        return Line(step, count, seconds / max(1, count), seconds, 0.0, size, seconds / max(1.0, places))

    tasks = min(machines.tasks, machines.cpus)
    count = round(work.cores)
    return [
        line("plan", work.slides, 0.0, min(machines.cpus, work.slides)),
        line("read", work.cores, 0.0, tasks),
        Line("networks", count, networks / max(1, count), cpu, gpu, 0.0, networks / machines.devices),
        line("objects", work.cores, parts, tasks),
        line("files", work.slides, written, _writers(work, machines)),
    ]


def _writers(work: Workload, machines: Machines) -> float:
    """How many slides' files are written at a time."""
    return max(1.0, min(machines.writers, machines.cpus, work.slides))

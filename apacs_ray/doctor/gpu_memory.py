"""Checks whether training steps fit the memory of the smallest GPU, and in how many passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from apacs_ray.config.settings import Settings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.distributed.resource_plan import Cluster, NetworkPlan, plan_training
from apacs_ray.distributed.trial_plan import plan_sweep
from apacs_ray.doctor.finding import Finding
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec, fusion_spec
from apacs_ray.training.batch import micro_batch_size

GIB = 1 << 30


def smallest_gpu() -> int | None:
    """Return the bytes of memory of the smallest GPU of this machine; None where they cannot be asked for."""
    import torch

    try:
        return min(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))
    except (AssertionError, RuntimeError, ValueError):  # torch without CUDA; a driver that fails; no GPU
        return None


def check_gpu_memory(settings: Settings, cluster: Cluster, memory: int | None) -> Iterator[Finding]:
    """Check the steps of members, fusion and trials, as they are planned on `cluster`; without GPUs nothing.

    Args:
        settings: Of the run.
        cluster: Where it will be.
        memory: Bytes of its smallest GPU; None: not known. Then it is said what is needed.

    Yields:
        A line each.
    """
    if not cluster.gpus:
        return
    members, fusion = settings.members, settings.fusion
    specs = [ModelSpec("member", name, width=members.width, dropout=members.dropout) for name in MEMBERS]
    plan = plan_training(MEMBERS, cluster, workers=members.workers, batch_size=members.batch_size, mode=members.mode)
    yield _finding("members", [(group, network, members) for group, network in plan.runs(specs)], settings, memory)
    heads = {"fusion": fusion}
    if fusion.compare:
        heads["fusion_published"] = fusion.model_copy(update={"head": "published"})
    heads_plan = plan_training(list(heads), cluster, workers=fusion.workers, batch_size=fusion.batch_size)
    fusions = [fusion_spec(how, how.width, key) for key, how in heads.items()]
    yield _finding(
        "fusion", [(group, network, fusion) for group, network in heads_plan.runs(fusions)], settings, memory
    )
    if fusion.from_best:
        sweep = read_sweep(settings.tune.config)
        sizes = sweep.space["batch_size"].ends() if "batch_size" in sweep.space else (fusion.batch_size,)
        how = fusion.model_copy(update={"batch_size": int(max(sizes))})
        trial, _ = plan_sweep(sweep, cluster, fusion.batch_size)
        yield _finding("trials", [(fusions[:1], trial, how)], settings, memory)


Run = tuple[Sequence[ModelSpec], NetworkPlan, TrainingSettings]


def _finding(what: str, runs: Sequence[Run], settings: Settings, memory: int | None) -> Finding:
    lines = [_fit(run, settings, memory) for run in runs]
    known = f"the smallest GPU has {memory / GIB:.1f} GiB" if memory is not None else "that of GPUs is not known here"
    message = f"{known}: " + "; ".join(line for line, _ in lines)
    if all(fits for _, fits in lines):
        return Finding(f"memory: {what}", "ok", message)
    section = "members" if what == "members" else "fusion"
    advice = f"lower {section}.crop or {section}.width, set {section}.precision bfloat16, or take larger GPUs"
    if what == "trials":
        advice += f"; or raise resources.gpu in {settings.tune.config}"
    return Finding(f"memory: {what}", "warning", message, advice)


def _fit(run: Run, settings: Settings, memory: int | None) -> tuple[str, bool]:
    """What a step of a run takes, in words, and whether it fits."""
    from apacs_ray.models.weights import build
    from apacs_ray.training.memory import USABLE, fitting_batch, input_side, step_memory

    specs, plan, how = run
    side = input_side(how.crop, settings.tiles.size**2)
    half = _half(how.precision, asked=memory is not None)
    builds = [partial(build, spec) for spec in specs]
    tiles = (3 + (len(specs[0].members) if specs[0].kind == "fusion" else 0), side, side)
    wanted = micro_batch_size(how, plan.workers)
    names = " + ".join(spec.name for spec in specs)

    def needed(batch: int) -> float:
        return step_memory(builds, (batch, *tiles), half=half, averaged=how.ema > 0) / USABLE

    def size(batch: int) -> str:
        return f"{batch} tile{'s' * (batch > 1)} of {side} px take{'s' * (batch == 1)} {needed(batch) / GIB:.1f} GiB"

    share = min(1.0, plan.gpus)
    of_share = f" of {plan.gpus:g} GPU" if share < 1 else ""
    if memory is None:
        return f"{names}: {size(wanted)}{of_share}" + (f", {size(1)}" if wanted > 1 else ""), True
    batch = fitting_batch(builds, (wanted, *tiles), half=half, memory=share * memory, averaged=how.ema > 0)
    if needed(batch) > share * memory:
        return f"{names}: {size(batch)}{of_share}, which is too much", False
    passes = -(-wanted // batch)
    how_often = f", so a step of {wanted} is split into {passes} passes" if passes > 1 else ""
    return f"{names}: {size(batch)}{of_share}{how_often}", True


def _half(precision: str, *, asked: bool) -> bool:
    """Whether steps are in bfloat16; `auto` on a GPU that cannot be asked is taken to be one that has it."""
    import torch

    from apacs_ray.training.device import uses_bfloat16

    return uses_bfloat16(precision, torch.device("cuda")) if asked else precision in ("auto", "bfloat16")

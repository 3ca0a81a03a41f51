"""Evaluation: every model on the test tiles, which no selection follows; metrics, pictures and the report."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from apacs_ray.data.shards import open_table, read_index
from apacs_ray.distributed.evaluation import EvaluateTask, draw_tiles, evaluate_tiles
from apacs_ray.distributed.pool import plan_pool
from apacs_ray.errors import ApacsError
from apacs_ray.evaluation.metrics import compare, dice_of, pixel_counts, summarize
from apacs_ray.models.spec import MEMBERS
from apacs_ray.report.page import ReportContext, TilePicture, build_report
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import environment, fingerprint, git_commit
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.stages.train_fusion import fusion_folders
from apacs_ray.storage import Store
from apacs_ray.training.history import read_history
from apacs_ray.training.tensorboard import write_metrics

SHOWN = 3  # tiles of each kind in the report
DISPUTED = 6


def _fingerprint(context: Context) -> str:
    return fingerprint(
        stage="evaluate",
        tiles=context.done("ingest").fingerprint,
        members=context.done("train_members").info,
        fusion=context.done("train_fusion").info,
        evaluate=context.settings.evaluate.model_dump(),
        seed=context.settings.run.seed,
    )


def _work(context: Context, mark: str) -> Outcome:
    store, settings = context.run.store, context.settings
    folders = {name: f"members/{name}" for name in MEMBERS} | fusion_folders(settings)
    task = EvaluateTask(store, folders, settings.evaluate)
    index = read_index(store, "test")
    if not len(index):
        raise ApacsError(f"{store.uri}: no annotated test tile is left; look at rejects/")
    context.ray.start()
    with context.bars() as shown:
        plan = plan_pool(context.ray.cluster(), len(index.paths))
        per_tile = evaluate_tiles(
            task, list(index.paths), plan, lambda done: shown.show("test tiles", done, len(index))
        )
    seed = settings.run.seed
    metrics = summarize(per_tile, task.models, seed)
    comparison = compare(per_tile, task.models, "fusion", seed)
    sink = io.BytesIO()
    pq.write_table(per_tile, sink)
    store.write("evaluation/per_tile.parquet", sink.getvalue())
    store.write("evaluation/metrics.json", json.dumps(metrics, indent=1).encode())
    store.write("evaluation/comparison.json", json.dumps(comparison, indent=1).encode())
    pictures = _pictures(task, per_tile, dict(zip(index.tile_ids, index.shard.tolist(), strict=True)), index.paths)
    for picture in pictures:
        store.write(f"evaluation/figures/{picture.kind}_{picture.rank}.png", picture.png)
    page = build_report(_report(context, task, metrics, comparison, pictures))
    store.write("evaluation/report.html", page.encode())
    write_metrics(store, metrics)
    dice = {model: row["dice"] for model, row in metrics.items()}
    return Outcome(Counts(len(index), per_tile.num_rows), {"dice": dice})


def _pictures(
    task: EvaluateTask, per_tile: pa.Table, shard_of: dict[str, int], paths: tuple[str, ...]
) -> list[TilePicture]:
    """Best, median and worst tiles by the fusion's Dice, and those that models and annotation dispute most."""
    dice = dice_of(pixel_counts(per_tile, "fusion"))
    ids = per_tile["tile_id"].to_pylist()
    slides = dict(zip(ids, per_tile["slide_id"].to_pylist(), strict=True))
    ranked = [number for number in dice.argsort(kind="stable").tolist() if dice[number] == dice[number]]
    middle = max(0, len(ranked) // 2 - SHOWN // 2)
    chosen: list[tuple[str, int, str]] = []
    parts = {"best": ranked[::-1][:SHOWN], "median": ranked[middle : middle + SHOWN], "worst": ranked[:SHOWN]}
    for kind, numbers in parts.items():
        chosen += [(kind, number, f"Dice {dice[number]:.3f}") for number in numbers]
    disagreement = per_tile["disagreement"].to_numpy()
    disputed = pc.sort_indices(per_tile["disagreement"], sort_keys=[("", "descending")]).to_pylist()[:DISPUTED]
    chosen += [("disagree", number, f"{disagreement[number]:.1%} of the pixels disputed") for number in disputed]
    wanted: dict[str, list[str]] = defaultdict(list)
    for _, number, _ in chosen:
        wanted[paths[shard_of[ids[number]]]].append(ids[number])
    drawn = draw_tiles(task, wanted)
    ranks: dict[str, int] = defaultdict(int)
    pictures = []
    for kind, number, caption in chosen:
        ranks[kind] += 1
        name = ids[number]
        pictures.append(TilePicture(kind, ranks[kind], name, slides[name], caption, drawn[name]))
    return pictures


def _report(
    context: Context,
    task: EvaluateTask,
    metrics: dict[str, Any],
    comparison: dict[str, Any],
    pictures: list[TilePicture],
) -> ReportContext:
    run, store = context.run, context.run.store
    histories = {
        key: read_history(store.read(f"{folder}/history.csv").decode()) for key, folder in task.folders.items()
    }
    devices = sorted({name for name in run.facts.get("device", {}).values() if name})
    trials = store.read("tune/trials.csv").decode() if store.version("tune/trials.csv") else ""
    return ReportContext(
        title=run.data or "synthetic smears",
        output=store.uri,
        metrics=metrics,
        comparison=comparison,
        histories=histories,
        trials=trials,
        best=context.markers["tune_fusion"].info.get("best", {}) if "tune_fusion" in context.markers else {},
        stages=dict(run.stages),
        facts=dict(run.facts),
        rejects=_rejects(store),
        pictures=pictures,
        settings=context.settings.model_dump(mode="json"),
        environment={**environment(), "git": git_commit(), "device": "; ".join(devices)},
    )


def _rejects(store: Store) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in store.list("rejects"):
        with store.open(entry.path) as stream:
            rows += open_table(stream, entry.path).read().to_pylist()
    return rows


EVALUATE = Stage("evaluate", "evaluation", _fingerprint, _work)

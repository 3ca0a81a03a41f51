"""Evaluation: every model on the test tiles, which no selection follows; metrics, pictures and the report."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from apacs_ray.config.settings import Settings
from apacs_ray.data.shards import TileIndex, open_table
from apacs_ray.distributed.evaluation import EvaluateTask, draw_tiles, evaluate_tiles
from apacs_ray.distributed.tasks import PoolPlan, plan_predictors
from apacs_ray.evaluation.calibration import calibration
from apacs_ray.evaluation.changes import changes, gains
from apacs_ray.evaluation.metrics import compare, dice_of, pixel_counts, summarize
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.report.page import ReportContext, TilePicture, build_report
from apacs_ray.report.summary import TrainedNetworks
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import environment, fingerprint, git_commit
from apacs_ray.stages.ingest_result import IngestResult
from apacs_ray.stages.stage import Committed, Job, Stage, StageResult, delete_others
from apacs_ray.stages.train_fusion import fusion_folders
from apacs_ray.stages.train_members import member_folder
from apacs_ray.stages.train_networks import TrainingResult, read_indices
from apacs_ray.stages.tune_fusion import SweepResult
from apacs_ray.storage import Store
from apacs_ray.training.device import describe_arithmetic
from apacs_ray.training.history import read_history
from apacs_ray.training.tensorboard import CURVES, CURVES_FILE, curves_path, write_metrics

SHOWN = 3  # tiles of each kind in the report
DISPUTED = 6
FIGURE = re.compile(r"evaluation/figures/(best|median|worst|disagree|better|worse)_\d+\.png")


@dataclass(frozen=True)
class EvaluateResult(StageResult):
    """Pooled Dice of every model on the test tiles, in 0..1; None where it is 0/0."""

    dice: dict[str, float | None]


@dataclass(frozen=True)
class Evaluate(Stage[EvaluateResult]):
    """Count what every model finds in the test tiles, and write the report."""

    name: ClassVar[str] = "evaluate"
    script: ClassVar[str] = "evaluate.py"
    folder: ClassVar[str] = "evaluation"
    result_type: ClassVar[type[EvaluateResult]] = EvaluateResult

    ingest: Committed[IngestResult]
    members: Committed[TrainingResult]
    sweep: Committed[SweepResult] | None
    fusion: Committed[TrainingResult]

    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of the tiles, of all weights, and of how they are evaluated."""
        return fingerprint(
            stage=self.name,
            tiles=self.ingest.fingerprint,
            members=self.members.result.weights,
            fusion=self.fusion.result.weights,
            evaluate=settings.evaluate.fingerprint_inputs(),
            seed=settings.run.seed,
        )

    def work(self, job: Job, fingerprint: str) -> EvaluateResult:
        """Write `evaluation/`.

        Returns:
            The pooled Dice of every model.

        Raises:
            ApacsError: when no annotated test tile is left.
        """
        store, settings = job.store, job.settings
        folders = {name: member_folder(name) for name in MEMBERS} | fusion_folders(settings)
        networks = {**self.members.result.networks, **self.fusion.result.networks}
        trained = TrainedNetworks(
            {key: read_history(store.read(f"{folder}/history.csv").decode()) for key, folder in folders.items()},
            {key: networks[key].epoch for key in folders},
        )
        member = trained.best_member
        task = EvaluateTask(store, folders, settings.evaluate, member)
        index = read_indices(store, ("test",))["test"]
        job.ray.start()
        with job.progress() as progress:
            plan = plan_predictors(job.ray.cluster(), settings, len(index.paths))
            per_tile = evaluate_tiles(
                task, list(index.paths), plan, lambda done: progress.show("test tiles", done, len(index))
            )
        precision = describe_arithmetic(settings.evaluate.precision, torch.device("cuda" if plan.gpus else "cpu"))
        metrics = {
            model: {**figures, "precision": precision}
            for model, figures in summarize(per_tile, task.models, settings.run.seed).items()
        }
        for name in folders:
            metrics[name]["calibration"] = calibration(per_tile, name)
        metrics["fusion"]["changes"] = changes(per_tile, member)
        comparison = compare(per_tile, task.models, "fusion", settings.run.seed)
        sink = io.BytesIO()
        pq.write_table(per_tile, sink)
        store.write("evaluation/per_tile.parquet", sink.getvalue())
        store.write("evaluation/metrics.json", json.dumps(metrics, indent=1).encode())
        store.write("evaluation/comparison.json", json.dumps(comparison, indent=1).encode())
        pictures = _pictures(task, per_tile, index, plan)
        figures = {f"evaluation/figures/{picture.kind}_{picture.rank}.png": picture.png for picture in pictures}
        for path, png in figures.items():
            store.write(path, png)
        delete_others(store, "evaluation/figures", FIGURE, figures)
        page = build_report(self._report(job, trained, metrics, comparison, pictures))
        store.write("evaluation/report.html", page.encode())
        write_metrics(store, metrics)
        tested = {curves_path(f"evaluation/{model}") for model in metrics}
        delete_others(store, f"{CURVES}/evaluation", CURVES_FILE, tested)
        return EvaluateResult(
            Counts(len(index), per_tile.num_rows), {model: row["dice"] for model, row in metrics.items()}
        )

    def _report(
        self,
        job: Job,
        trained: TrainedNetworks,
        metrics: dict[str, Any],
        comparison: dict[str, Any],
        pictures: list[TilePicture],
    ) -> ReportContext:
        store = job.store
        networks = {**self.members.result.networks, **self.fusion.result.networks}
        devices = sorted({network.device for network in networks.values() if network.device})
        spec = ModelSpec.from_json(store.read(f"{self.fusion.folder}/model.json"))
        return ReportContext(
            title=job.run.data or "synthetic smears",
            output=store.uri,
            metrics=metrics,
            comparison=comparison,
            trained=trained,
            start=spec.start,
            views=spec.views,
            folds=job.settings.heatmaps.folds,
            trials=store.read("tune/trials.csv").decode() if self.sweep is not None else "",
            best=self.sweep.result.best if self.sweep is not None else {},
            stages=dict(job.run.stages),
            facts=ingest_facts(self.ingest.result),
            rejects=read_rejects(store),
            pictures=pictures,
            settings=job.settings.model_dump(mode="json"),
            environment={**environment(), "git": git_commit(), "device": "; ".join(devices)},
        )


def ingest_facts(ingest: IngestResult) -> dict[str, Any]:
    """Return what the report says of the data, by name."""
    facts: dict[str, Any] = {
        "val_unit": ingest.val_unit,
        "tiles": ingest.tiles,
        "shards_reused": ingest.shards_reused,
        ingest.unit: asdict(ingest.units),
        "ignored_files": ingest.ignored_files,
        "ignored": ingest.ignored,
    }
    if ingest.unit == "slides":
        facts |= {
            "annotations": asdict(ingest.annotations),
            "splits_known": ingest.splits_known,
            "engines": ingest.engines,
            "unreadable": ingest.unreadable,
        }
    return facts


def read_rejects(store: Store) -> list[dict[str, Any]]:
    """Return all rows below `rejects/`."""
    rows: list[dict[str, Any]] = []
    for entry in store.list("rejects"):
        with store.open(entry.path) as stream:
            rows += open_table(stream, entry.path).read().to_pylist()
    return rows


def _pictures(task: EvaluateTask, per_tile: pa.Table, index: TileIndex, plan: PoolPlan) -> list[TilePicture]:
    """Draw the tiles that the report shows.

    Returns:
        Best, median and worst by the fusion's Dice; those that models and annotation dispute most; and those where the
        fusion changed most px of the best member's answer for better, and for worse.
    """
    dice = dice_of(pixel_counts(per_tile, "fusion"))
    ranked = [number for number in dice.argsort(kind="stable").tolist() if dice[number] == dice[number]]
    middle = max(0, len(ranked) // 2 - SHOWN // 2)
    chosen: list[tuple[str, int, str]] = []
    parts = {"best": ranked[::-1][:SHOWN], "median": ranked[middle : middle + SHOWN], "worst": ranked[:SHOWN]}
    for kind, numbers in parts.items():
        chosen += [(kind, number, f"Dice {dice[number]:.3f}") for number in numbers]
    disagreement = per_tile["disagreement"].to_numpy()
    disputed = pc.sort_indices(per_tile["disagreement"], sort_keys=[("", "descending")]).to_pylist()[:DISPUTED]
    chosen += [("disagree", number, f"{disagreement[number]:.1%} of the pixels disputed") for number in disputed]
    gain = gains(per_tile)
    order = gain.argsort(kind="stable").tolist()
    for kind, numbers in (("better", order[::-1]), ("worse", order)):
        sign = 1 if kind == "better" else -1
        chosen += [
            (kind, number, f"{sign * gain[number]:,} px {kind} in all".replace(",", "\N{THIN SPACE}"))
            for number in numbers[:SHOWN]
            if sign * gain[number] > 0
        ]
    numbers = [number for _, number, _ in chosen]
    named = per_tile.select(["tile_id", "slide_id"]).take(numbers).to_pylist()
    tiles = dict(zip(numbers, named, strict=True))
    drawn = draw_tiles(task, [index.place(number) for number in tiles], plan)
    ranks: dict[str, int] = defaultdict(int)
    pictures = []
    for kind, number, caption in chosen:
        ranks[kind] += 1
        name, slide = tiles[number]["tile_id"], tiles[number]["slide_id"]
        png = drawn[name].changes if kind in ("better", "worse") else drawn[name].fusion
        pictures.append(TilePicture(kind, ranks[kind], name, slide, caption, png))
    return pictures

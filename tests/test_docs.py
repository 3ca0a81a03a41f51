"""The documents say what the code does: columns and keys of `docs/outputs.md`; paths and settings that they name."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import apacs_ray
from apacs_ray.__main__ import USAGE
from apacs_ray.config.settings import Settings
from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.data.index_file import INDEX, INDEX_SCHEMA, PATHS
from apacs_ray.data.rejects import REJECT_SCHEMA, Reject
from apacs_ray.data.shards import RECEIPT, Receipt
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.distributed.heatmaps import HEATMAP_SCHEMA
from apacs_ray.evaluation.calibration import calibration, calibration_row, calibration_schema
from apacs_ray.evaluation.changes import CHANGES_SCHEMA, changes, changes_row
from apacs_ray.evaluation.metrics import compare, summarize
from apacs_ray.evaluation.per_tile import per_tile_schema, tile_row
from apacs_ray.evaluation.predictions import MODEL_KEYS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build, weights_bytes
from apacs_ray.outputs.geoparquet import SCHEMA as CELLS_SCHEMA
from apacs_ray.runs.lease import Holder, Lease
from apacs_ray.runs.markers import Counts, Marker
from apacs_ray.runs.run import Run
from apacs_ray.slides.manifest import FOOTER, MANIFEST_SCHEMA, SlideSummary
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.stages.evaluate import EvaluateResult
from apacs_ray.stages.heatmaps import HeatmapsResult
from apacs_ray.stages.ingest_result import IngestResult
from apacs_ray.stages.train_networks import TrainedNetwork, TrainingResult
from apacs_ray.stages.tune_fusion import SweepResult, trials_csv
from apacs_ray.storage import LocalStore
from apacs_ray.synthetic.mrxs import MrxsLayout, write_mrxs
from apacs_ray.training.history import history_csv

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = (ROOT / "docs/outputs.md").read_text()
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md"), *ROOT.glob("benchmarks/*.md")]
)


def section(heading: str) -> str:
    """What stands below a heading of docs/outputs.md, up to the next one."""
    _, found, rest = OUTPUTS.partition(f"\n{heading}\n")
    assert found, f"docs/outputs.md has no {heading!r}"
    return re.split(r"\n#+ ", rest)[0]


def tables(heading: str) -> list[list[list[str]]]:
    """The tables of a section: rows of cells, without their heads."""
    blocks = re.findall(r"(?:^\|.*\n?)+", section(heading), re.M)
    return [
        [[cell.strip(" `") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()[2:]]
        for block in blocks
    ]


def names(heading: str, number: int = 0) -> list[str]:
    return [row[0] for row in tables(heading)[number]]


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


SHARD = "split=SPLIT/FINGERPRINT-NUMBER.parquet"


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        (f"## tiles/{SHARD}", TILE_SCHEMA),
        ("## tiles/_index/SPLIT-FINGERPRINT.parquet", INDEX_SCHEMA),
        (f"## heatmaps/{SHARD}", HEATMAP_SCHEMA),
        ("## manifest/FINGERPRINT/NUMBER.parquet", MANIFEST_SCHEMA),
        ("## rejects/ingest-FINGERPRINT.parquet", REJECT_SCHEMA),
        (
            "## evaluation/per_tile.parquet",
            pa.schema([*per_tile_schema(["MODEL"]), *calibration_schema("MODEL"), *CHANGES_SCHEMA]),
        ),
        ("## SLIDE/cells.parquet", CELLS_SCHEMA),
    ],
)
def test_columns_are_those_of_the_schema(heading: str, schema: pa.Schema) -> None:
    columns = [(field.name, str(field.type).replace("item:", "element:")) for field in schema]  # as Parquet names them
    assert [(name, kind) for name, kind, _ in tables(heading)[0]] == columns


def test_what_may_be_null_in_a_tile_is_said() -> None:
    said = {name for name, _, meaning in tables(f"## tiles/{SHARD}")[0] if "null" in meaning}
    assert said == {field.name for field in TILE_SCHEMA if field.nullable}


@pytest.mark.parametrize(
    ("heading", "number", "expected"),
    [
        ("## run.lock", 0, fields(Holder)),
        ("## _committed.json", 0, fields(Marker)),
        ("### Result of ingest", 0, [name for name in fields(IngestResult) if name != "counts"]),
        ("### Result of train_members and train_fusion", 0, fields(TrainedNetwork)),
        (
            "### Result of the other stages",
            0,
            [
                name
                for kind in (HeatmapsResult, SweepResult, EvaluateResult)
                for name in fields(kind)
                if name != "counts"
            ],
        ),
        ("## manifest/FINGERPRINT/NUMBER.parquet", 1, fields(SlideSummary)),
        ("## members/NAME/model.json", 0, fields(ModelSpec)),
        ("## members/NAME/history.csv", 0, history_csv(()).strip().split(",")),
        ("## tune/trials.csv", 0, trials_csv([], FusionSettings(), {}).strip().split(",")),
    ],
)
def test_keys_are_those_of_the_code(heading: str, number: int, expected: list[str]) -> None:
    assert sorted(names(heading, number)) == sorted(expected)


def test_keys_within_a_cell_are_those_of_the_code() -> None:
    committed = section("## _committed.json")
    for name in fields(Counts):
        assert f"`{name}`" in committed
    assert fields(TrainingResult) == ["counts", "networks"]
    manifest = section("## manifest/FINGERPRINT/NUMBER.parquet")
    for name in fields(SlideFiles):
        assert f"`{name}`" in manifest
    receipt = section(f"## tiles/{SHARD}")
    for name in fields(Receipt):
        # of this process, not stored; and one with a key of its own
        assert name in ("reused", "index") or f"`{name}`" in receipt
    assert RECEIPT.decode() in receipt
    assert INDEX.decode() in receipt
    assert PATHS.decode() in section("## tiles/_index/SPLIT-FINGERPRINT.parquet")
    assert FOOTER.decode() in manifest
    assert fields(Reject) == REJECT_SCHEMA.names


def test_run_json(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = Run(store, Settings(), None, Lease.acquire(store))
    try:
        run.write_record()
    finally:
        run.close()
    record = json.loads((tmp_path / "run.json").read_text())
    assert names("## run.json") == list(record)


def test_metrics_and_comparison() -> None:
    mask = np.zeros((40, 40), bool)
    mask[5:20, 5:20] = True
    place = {"tile_id": "a", "slide_id": "s", "x": 0, "y": 0, "width": 40, "height": 40}
    once = {"once_left": 0, "once_top": 0, "once_right": 40, "once_bottom": 40}
    models = ["fcn32", "fusion"]
    row = tile_row({**place, **once}, dict.fromkeys(models, mask), mask, border=0, disputed=["fcn32"])
    row |= calibration_row("fusion", mask.astype(np.float32), mask) | changes_row(mask, mask, mask)
    table = pa.Table.from_pylist(
        [row], pa.schema([*per_tile_schema(models), *calibration_schema("fusion"), *CHANGES_SCHEMA])
    )
    calibrated, changed = calibration(table, "fusion"), changes(table, "fcn32")
    metrics = summarize(table, models, 0)["fusion"] | {
        "precision": "float32",
        "calibration": calibrated,
        "changes": changed,
    }
    for key, tree in (("calibration", calibrated), ("changes", changed)):
        ((_, _, said),) = [row for row in tables("## evaluation/metrics.json")[0] if row[0] == key]
        assert set(re.findall(r"`(\w+)`?", said)) <= {*tree, "fusion"}
        assert {name for name in tree if not name.startswith(("better_background", "worse_"))} <= set(said.split("`"))
    assert names("## evaluation/metrics.json") == list(metrics)
    ((_, _, per_slide),) = [row for row in tables("## evaluation/metrics.json")[0] if row[0] == "per_slide"]
    assert set(re.findall(r"`(.*)", per_slide)[0].split()) == set(metrics["per_slide"]["s"])
    assert names("## evaluation/comparison.json") == list(compare(table, models, "fusion", 0)["fcn32"])
    assert set(re.findall(r"`(\w+)`", section("## evaluation/metrics.json").split("\n|")[0])) >= set(MODEL_KEYS)


def test_every_code_of_a_reject_is_explained() -> None:
    codes = {"truncated"}  # which `data.images.code_of` chooses
    for path in (ROOT / "apacs_ray").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and call.func.id == "BadInput"
                and call.args
            ):
                codes |= {call.args[0].value} if isinstance(call.args[0], ast.Constant) else set()
    assert names("## rejects/ingest-FINGERPRINT.parquet", 1) == sorted(codes)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text()
    if document.name == "CHANGELOG.md":
        text = text.partition("## [Unreleased]")[2].partition("\n## [")[0]  # what an old version had may be gone
    folders = "apacs_ray|pipelines|benchmarks|cluster|configs|tune_configs|tests|docs"
    mentioned = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w/?)", text))
    missing = [name for name in mentioned if "X.py" not in name and "NAME" not in name and not (ROOT / name).exists()]
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing += [name for name in linked if not (document.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_a_document_names_exist(document: Path) -> None:
    tree = {section: set(type(values).model_fields) for section, values in Settings()}
    for section_name, key in re.findall(
        rf"(?<![\w./-])(?:--)?({'|'.join(tree)})\.([a-z]\w*)(?![\w(/])", document.read_text()
    ):
        assert key in tree[section_name] or key in ("py", "md", "json", "yaml", "parquet", "csv", "lock"), (
            f"{section_name}.{key}"
        )


def test_commands_that_documents_name_exist() -> None:
    commands = set(re.findall(r"^  ([a-z-]+) {2,}", USAGE, re.M))
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    named = set(re.findall(r"(?<![\w/-])apacs-ray +([a-z-]+)", text))
    assert named
    assert named <= commands


def test_the_readme_tree_is_the_repository() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 150
    tree = readme.partition("## What is where")[2]
    packages = set(re.findall(r"^ {6}(\w+)/ ", tree, re.M))
    assert packages == {path.parent.name for path in (ROOT / "apacs_ray").glob("*/__init__.py")}


def test_the_public_api_is_there_and_needs_no_torch() -> None:
    for name in apacs_ray.__all__:
        assert getattr(apacs_ray, name) is not None
        assert name in dir(apacs_ray)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = apacs_ray.nothing_like_it
    code = "import sys, apacs_ray; apacs_ray.Settings; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, rest = (ROOT / "README.md").read_text().partition("    from pathlib import Path\n")
    code = "from pathlib import Path\n" + textwrap.dedent(rest.partition("\n## ")[0])
    monkeypatch.chdir(tmp_path)
    store = LocalStore(tmp_path / "runs/cells")
    members = [ModelSpec("member", name, width=0.0625) for name in ("fcn32", "fcn16", "fcn8")]
    for spec in [*members, ModelSpec("fusion", "fusion", width=0.0625)]:
        folder = "fusion" if spec.kind == "fusion" else f"members/{spec.name}"
        store.write(f"{folder}/model.safetensors", weights_bytes(build(spec)))
        store.write(f"{folder}/model.json", spec.to_json())
    width, height = 6100, 5100  # whose corner at 5000, 4000 is read
    layout = MrxsLayout(width, height, 1, 0.5, image=1020, quality=50)
    write_mrxs(tmp_path / "slide.mrxs", layout, lambda x, y, w, h: np.full((h, w, 3), 200, np.uint8))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["cells"].shape == (1024, 1024)
    assert names["cells"].dtype == bool
    assert (names["rgb"] == 200).all()


def test_the_console_command_and_the_types_are_part_of_the_package() -> None:
    module, _, function = PROJECT["project"]["scripts"]["apacs-ray"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["apacs_ray"]
    assert (ROOT / "apacs_ray/py.typed").is_file()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS = [row.split(" | ") for row in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
CALL = re.compile(r"^( *)([\w/]+\.py)::([\w.]+)", re.M)


def test_the_ways_through_the_modules_go_down_and_name_what_is_there() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)
    ways = [calls for block in blocks if (calls := CALL.findall(block))]
    assert len(ways) == 6
    for calls in ways:
        above: list[tuple[int, str]] = []
        for indent, path, name in calls:
            while above and above[-1][0] >= len(indent):
                above.pop()
            assert name in _defined(ROOT / "apacs_ray" / path), f"{path} has no {name}"
            caller = above[-1][1] if above else path
            assert LAYER[caller.split("/")[0]] <= LAYER[path.split("/")[0]], f"{caller} calls up to {path}"
            above.append((len(indent), path))


def test_the_drawing_of_the_layers_is_the_contract() -> None:
    drawing = (ROOT / "docs/architecture.md").read_text().partition("## The layers")[2].split("```")[1]
    rooms = [re.findall(r"(\w+)/?(?:  |$)", line[:31]) for line in drawing.splitlines() if line.strip()]
    assert [sorted(set(row) - {"pipelines"}) for row in rooms] == [sorted(row) for row in LAYERS]


def test_functions_that_a_document_names_exist() -> None:
    for document in DOCUMENTS:
        for path, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", document.read_text()):
            assert name in _defined(ROOT / "apacs_ray" / path), f"{document.name}: {path} has no {name}"


def _defined(path: Path) -> set[str]:
    """Functions, classes, and methods as Class.method, of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return found

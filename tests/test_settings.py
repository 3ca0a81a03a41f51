"""The settings tree, its command line and the order of precedence."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from yaml import safe_dump as yaml_dump

from apacs_ray.commands import pipeline
from apacs_ray.config import yaml
from apacs_ray.config.command_line import SECTIONS, default_output, parse
from apacs_ray.config.settings import DataSettings, Settings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.config.training_settings import FusionSettings, MembersSettings, TrainingSettings
from apacs_ray.config.yaml import read_yaml
from apacs_ray.errors import UsageError
from apacs_ray.stages.rejects import reject_limit

ROOT = Path(__file__).resolve().parent.parent


def command(*argv: str):
    return parse(argv, "full.py", "test")


def test_command_line_beats_config_beats_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("tiles: {size: 300, shard: 7}\nmembers: {width: 0.5}\n")
    settings = command("--data", "x", "--config", str(config), "--tiles.size", "400").settings
    assert (settings.tiles.size, settings.tiles.shard, settings.members.width) == (400, 7, 0.5)
    assert settings.members.epochs == 100


def test_synthetic_config_lies_beneath_only_without_data() -> None:
    assert command("--data", "somewhere").settings.tiles.size == 2000
    assert command().settings.tiles.size == read_yaml(ROOT / "configs/synthetic.yaml")["tiles"]["size"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--members.width", "2"], ["members.width", "2", "command line"]),
        (["--tiles.size", "wide"], ["tiles.size", "integer", "wide"]),
        (["--tiles.stride", "3000", "--tiles.size", "2000"], ["tiles", "stride 3000"]),
        (["--data.max_rejects", "many"], ["data.max_rejects", "many"]),
        (["--data.slide_regex", "("], ["data.slide_regex"]),
        (["--fusion.members", "fcn8"], ["fusion.members", "two or more"]),
        (["--members.warmup_epochs", "5", "--members.epochs", "2"], ["members", "warmup_epochs 5", "2 epochs"]),
        (["--evaluate.border", "256", "--tiles.size", "512"], ["evaluate.border 256", "tiles.size"]),
        (["--members.learning_rate", "inf"], ["members.learning_rate", "finite", "inf"]),
        (["--members.weight_decay", "inf"], ["members.weight_decay", "finite"]),
        (["--data.mpp", "1e999"], ["data.mpp", "finite"]),
        (["--tiles.min_tissue_um2", "nan"], ["tiles.min_tissue_um2", "nan"]),
        (["--data", ""], ["--data", "empty"]),
        (["--output", ""], ["--output", "empty"]),
        (["--data.masks", ""], ["data.masks", "empty"]),
        (["--fusion.from_best", "perhaps"], ["fusion.from_best", "perhaps"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_an_impossible_value_is_one_line_naming_the_key(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        command("--data", "x", *argv)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text", ["tiles: {sise: 3}", "tile: {size: 3}", "- a", "tiles: {size: [", "tiles: {size: 3.5}"]
)
def test_a_bad_config_file_is_named(tmp_path: Path, text: str) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        command("--data", "x", "--config", str(config))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "twice.yaml"
    config.write_text("members: {epochs: 3}\nmembers:\n  width: 0.5\n")
    with pytest.raises(UsageError, match=r"twice\.yaml: not valid YAML: line 2: members is given twice$"):
        command("--data", "x", "--config", str(config))
    config.write_text("members:\n  epochs: 3\n  width: 0.5\n  epochs: 4\n")
    with pytest.raises(UsageError, match=r"line 4: epochs is given twice$"):
        command("--data", "x", "--config", str(config))


def test_lists_none_and_booleans_from_the_command_line() -> None:
    settings = command("--fusion.members", "fcn8,fcn32", "--tiles.stride", "none", "--fusion.compare", "true").settings
    assert settings.fusion.members == ("fcn32", "fcn8")
    assert settings.tiles.stride is None
    assert settings.fusion.compare is True


def values_of(annotation: Any, default: Any) -> list[Any]:
    """All values of a setting that has few, else one."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    found = [value for one in typing.get_args(annotation) for value in values_of(one, None)]
    if annotation is bool:
        found += [True, False]
    return found + [default] * (default is not None)


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_what_a_setting_can_be_it_can_be_from_the_command_line(section: str) -> None:
    for name, field in SECTIONS[section].model_fields.items():
        for value in values_of(field.annotation, field.get_default(call_default_factory=True)):
            if isinstance(value, BaseModel | tuple | dict):
                continue
            given = [f"--{section}.{name}", str(value).lower() if isinstance(value, bool) else str(value)]
            refusal = ""
            try:
                settings = command("--data", "d", *given).settings
            except UsageError as error:  # it does not go with the default of another setting
                refusal = str(error)
            else:
                assert getattr(getattr(settings, section), name) == value, given
            assert "Input should be" not in refusal


@pytest.mark.parametrize("text", ["1", "4", "32", "none"])
def test_maps_are_of_whole_px_in_every_core(text: str) -> None:
    maps = command("--data", "d", "--segment.maps", text).settings.segment.maps
    assert maps == (None if text == "none" else int(text))
    with pytest.raises(UsageError, match=r"segment.maps: .*must be 1, 2, 4, 8, 16 or 32"):
        command("--data", "d", "--segment.maps", "3")


def test_default_output_is_named_after_the_data() -> None:
    assert default_output(None) == "runs/synthetic"
    assert default_output("s3://bucket/some where/cells/") == "runs/cells"


# what users' commands and files may give since the first release; one that is renamed must be refused by its new name
OPTIONS = {
    "data": (
        "masks mpp mpps mask_classes engine plane cache cache_gb splits slide_regex val_fraction max_rejects "
        "mask_threshold max_pixels"
    ),
    "synthetic": ("width height mpp train_slides test_slides"),
    "tiles": ("size stride mpp min_tissue min_tissue_um2 last image_format quality subsampling shard"),
    "members": (
        "epochs batch_size accumulate learning_rate weight_decay optimizer schedule warmup_epochs dice_weight "
        "crop flips turns jitter dropout precision patience workers width mode init checkpoint"
    ),
    "heatmaps": ("folds"),
    "tune": ("config"),
    "fusion": (
        "epochs batch_size accumulate learning_rate weight_decay optimizer schedule warmup_epochs dice_weight "
        "crop flips turns jitter dropout precision patience workers width head members heatmap_init trunk "
        "from_best compare"
    ),
    "evaluate": ("border precision threads"),
    "run": ("seed max_failures"),
}


def test_every_option_of_before_still_works() -> None:
    expected = Settings(data=DataSettings(mask_classes=("cell", "cluster")))
    given = ["--data", "x"]
    for section, names in OPTIONS.items():
        for name in names.split():
            value = getattr(getattr(expected, section), name)
            given += [f"--{section}.{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    assert len(given) == 2 + 2 * 81
    assert command(*given).settings == expected


def shown_by(script: str, option: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The settings in a script's help."""
    with pytest.raises(SystemExit) as ended:
        parse([option], script, "test", pipeline.SECTIONS.get(script, tuple(SECTIONS)))
    assert ended.value.code == 0
    return set(re.findall(r"^  --([a-z]+\.[a-z0-9_]+) ", capsys.readouterr().out, re.MULTILINE))


def test_help_shows_what_people_set_and_help_all_everything(capsys: pytest.CaptureFixture[str]) -> None:
    every = {f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields}
    full = shown_by("full.py", "--help", capsys)
    assert 15 <= len(full) <= 26
    assert {"data.splits", "tiles.size", "members.epochs", "tune.config", "fusion.epochs", "run.seed"} <= full
    ingest = shown_by("ingest.py", "--help", capsys)
    assert {name.split(".")[0] for name in ingest} == {"data", "tiles", "run"}
    assert ingest < full
    for script in pipeline.SUMMARIES:
        assert shown_by(script, "--help", capsys) <= full
        assert shown_by(script, "--help-all", capsys) == every
    assert pipeline.SECTIONS.keys() == pipeline.SUMMARIES.keys()
    assert {section for shown in pipeline.SECTIONS.values() for section in shown} == SECTIONS.keys() - {"segment"}


def test_help_names_where_the_fusion_has_a_value_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help-all"], "full.py", "test")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: members.dice_weight)" in text
    assert "(default: members.width)" in text


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv=['full.py','--help-all']; sys.path.insert(0, '.')\n"
        "try:\n import runpy; runpy.run_path('pipelines/full.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    for key in ("--data.max_rejects", "--tiles.size", "--members.width", "--fusion.from_best", "--run.seed"):
        assert key in done.stdout


def test_usage_errors_exit_with_2_before_anything_starts(tmp_path: Path) -> None:
    for argv in (["--tiles.size", "1"], ["--tiles.sise", "1"], ["--data", "ftp://x/y"]):
        script = [sys.executable, str(ROOT / "pipelines/full.py"), "--output", str(tmp_path / "run"), *argv]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "listed", "limit"), [("default", 100, 5), ("default", 9000, 90), ("3", 9, 3), ("2%", 150, 3)]
)
def test_reject_limit(text: str, listed: int, limit: int) -> None:
    assert reject_limit(text, listed) == limit


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "configs").iterdir())])
def test_every_config_of_the_repository_is_valid(name: str) -> None:
    command("--data", "x", "--config", f"configs/{name}")


# what our configs gave the fusion before it inherited from the members, all else being the default
FUSION_BEFORE: dict[str, dict[str, Any]] = {
    "paper": {
        **{"width": 1.0, "epochs": 100, "batch_size": 4, "learning_rate": 1e-4, "weight_decay": 0.0},
        **{"optimizer": "adam", "schedule": "constant", "warmup_epochs": 0, "dice_weight": 0.0, "crop": 0},
        **{"flips": False, "turns": False, "jitter": 0.0, "dropout": 0.5, "precision": "float32", "patience": 0},
        **{"head": "published", "members": ["fcn32", "fcn16", "fcn8"], "heatmap_init": "random", "from_best": False},
        "select": "loss",  # what the released code keeps; before, there was no choice
    },
    "real_cells": {
        **{"epochs": 8, "batch_size": 2, "learning_rate": 5e-4, "dropout": 0.1, "crop": 300, "jitter": 0.05},
        **{"patience": 0, "warmup_epochs": 0, "width": 0.25},  # the last two by default, and as members.width
    },
    "synthetic": {
        **{"epochs": 5, "batch_size": 1, "learning_rate": 1e-3, "dropout": 0.0, "crop": 512, "jitter": 0.02},
        **{"patience": 2, "width": 0.125},  # before 0, and a start was not heeded; the last as members.width
    },
}


@pytest.mark.parametrize("data", [["--data", "x"], []], ids=["data", "synthetic data"])
@pytest.mark.parametrize("name", FUSION_BEFORE)
def test_our_configs_give_the_fusion_what_they_did_before_it_inherited(
    tmp_path: Path, name: str, data: list[str]
) -> None:
    before = FusionSettings.model_validate(FUSION_BEFORE[name])
    settings = command(*data, "--config", f"configs/{name}.yaml").settings
    assert settings.fusion.model_dump() == before.model_dump()
    # and so does a file of a user that says both, as ours did
    tree = {**read_yaml(ROOT / f"configs/{name}.yaml"), "fusion": FUSION_BEFORE[name]}
    (tmp_path / "mine.yaml").write_text(yaml_dump(tree))
    assert command(*data, "--config", str(tmp_path / "mine.yaml")).settings == settings


def test_the_fusion_trains_as_the_members_where_nothing_else_is_given(tmp_path: Path) -> None:
    assert Settings().fusion == FusionSettings()
    config = tmp_path / "c.yaml"
    config.write_text("members: {epochs: 7, crop: 64, jitter: 0.3}\nfusion: {crop: 96}\n")
    given = ["--data", "x", "--config", str(config), "--members.crop", "128", "--members.dropout", "0.2"]
    fusion = command(*given, "--fusion.jitter", "0").settings.fusion
    assert (fusion.epochs, fusion.crop, fusion.dropout, fusion.jitter) == (7, 96, 0.2, 0.0)
    members = MembersSettings(epochs=7, width=0.5)
    settings = Settings(members=members, fusion=FusionSettings(crop=64))
    assert (settings.fusion.epochs, settings.fusion.crop, settings.fusion.width) == (7, 64, 0.5)
    assert Settings.model_validate(settings.model_dump()) == settings  # all of it is in the tree, as run.json has it
    own = ["--data", "x", "--config", "configs/real_cells.yaml", "--fusion.crop", "none", "--fusion.width", "null"]
    fusion = command(*own, "--fusion.learning_rate", "none").settings.fusion
    assert (fusion.crop, fusion.width, fusion.learning_rate) == (300, 0.25, 1e-3)  # none: as the members
    for name, value in {"epochs": "0", "crop": "3", "optimizer": "lion"}.items():
        with pytest.raises(UsageError, match=rf"^members\.{name}: .*{value}"):
            command("--data", "x", f"--members.{name}", value)


def test_the_papers_fusion_learns_as_its_members_do() -> None:
    settings = command("--data", "x", "--config", "configs/paper.yaml").settings
    learning = TrainingSettings.model_fields.keys() & read_yaml(ROOT / "configs/paper.yaml")["members"].keys()
    assert len(learning) > 10
    assert settings.fusion.model_dump(include=learning) == settings.members.model_dump(include=learning)
    assert settings.fusion.width == settings.members.width == 1


def test_the_papers_training_follows_from_no_default_that_may_change() -> None:
    """Every setting of training stands in the file, but for those that only say how it is computed."""
    said = read_yaml(ROOT / "configs/paper.yaml")["members"].keys()
    computing = {"accumulate", "workers", "mode", "init", "checkpoint"}
    assert MembersSettings.model_fields.keys() - computing == said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trials: 1\nepochs: 1\nspace: {learning_rate: {loguniform: [0, 1]}}", "loguniform"),
        ("trials: 1\nepochs: 1\nspace: {batch_size: {uniform: [1, 8]}}", "batch_size"),
        ("trials: 1\nepochs: 1\nspace: {batch_size: {randint: [1, 2.5]}}", "whole numbers"),
        ("trials: 1\nepochs: 1\nspace: {dropout: {quniform: [0, 0.5, 0]}}", "above 0"),
        ("trials: 1\nepochs: 1\nspace: {learning_rate: {lambda: [0, 1]}}", "learning_rate"),
        ("trials: 1\nepochs: 1\nspace: {epochs: {choice: [1]}}", "epochs"),
        ("trials: 1\nepochs: 1\nspace: {members: {choice: [[fcn8, fcn9]]}}", "members"),
        ("trials: 0\nepochs: 1\nspace: {dropout: {choice: [0.1]}}", "trials"),
        ("trials: 1\nepochs: 1\nextra: 1\nspace: {dropout: {choice: [0.1]}}", "extra"),
    ],
)
def test_a_bad_sweep_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_sweep(str(path))


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "tune_configs").iterdir())])
def test_every_sweep_of_the_repository_is_valid(name: str) -> None:
    assert read_sweep(f"tune_configs/{name}").trials >= 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("searcher: optuna\nspace: {learning_rate: {grid: [0.1, 0.2]}}", "takes no grid"),
        ("scheduler: {kind: pbt}\nspace: {members: {choice: [[fcn32, fcn8]]}}", "none is in the space"),
        ("scheduler: {kind: pbt}\nsearcher: optuna\nspace: {dropout: {uniform: [0, 0.1]}}", "searcher random"),
        ("space: {epochs: {choice: [1]}}", "cannot be swept"),
    ],
)
def test_impossible_sweeps_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(f"trials: 2\nepochs: 1\n{text}\n")
    with pytest.raises(UsageError, match=message):
        read_sweep(str(tmp_path / "sweep.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("trials: 1\nepochs: 1\nextra: 1\nspace: {dropout: {choice: [0.1]}}", "extra"),
        ("trials: 1\nepochs: 1\nspace: {members: {choice: [[fcn8, fcn9]]}}", "members.1"),
        ("trials: 1\nepochs: 1\nsearcher: optuna\nspace: {dropout: {uniform: [0, 0.1]}}", "searcher optuna needs"),
    ],
    ids=["missing", "unknown key", "impossible value", "no optuna"],
)
def test_a_sweep_that_cannot_run_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    path = tmp_path / "sweep.yaml"
    if text is not None:
        path.write_text(text)
    options = ["--data", "x", "--tune.config", str(path)]
    with pytest.raises(UsageError, match=rf"^tune\.config: .*{words}") as caught:
        command(*options)
    assert "\n" not in str(caught.value)
    command(*options, "--fusion.from_best", "false")  # which does not sweep


def test_a_trunk_of_another_width_is_refused() -> None:
    command("--data", "x", "--members.width", "0.5", "--fusion.trunk", "fcn32")
    for more in (["--fusion.trunk", "fcn32"], ["--tune.config", "tune_configs/fusion_asha.yaml"]):
        with pytest.raises(UsageError, match=r"fusion\.width"):
            command("--data", "x", "--members.width", "0.5", "--fusion.width", "0.25", *more)


def test_a_sweep_that_does_not_fit_the_released_fusion_is_refused() -> None:
    options = [
        "--data",
        "x",
        "--fusion.head",
        "published",
        "--fusion.init",
        "published",
        "--fusion.checkpoint",
        "f.pth",
    ]
    command(*options, "--tune.config", "tune_configs/fusion_pbt.yaml")
    for sweep, drawn in (("fusion_asha", "heatmap_init zero"), ("smoke", "members")):
        with pytest.raises(UsageError, match=rf"{sweep}\.yaml: draws {drawn}, but"):
            command(*options, "--tune.config", f"tune_configs/{sweep}.yaml")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.yaml").touch()
    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(UsageError, match=r"a\.yaml: cannot be read \(Permission denied\)"):
        read_yaml(tmp_path / "a.yaml")


def test_configs_are_found_from_anywhere_also_those_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command("--data", "x")
    monkeypatch.setattr(yaml, "REPOSITORY", tmp_path)
    monkeypatch.setattr(yaml, "INSTALLED", tmp_path)  # `pip install` has put the configs into this environment
    with pytest.raises(UsageError, match=r"^tune\.config: tune_configs/fusion_asha\.yaml: no such file"):
        command("--data", "x")
    monkeypatch.setattr(yaml, "INSTALLED", ROOT)
    command("--data", "x")
    assert command("--config", "configs/paper.yaml", "--data", "x").settings.members.width == 1.0


def test_views_are_those_that_there_are() -> None:
    assert command("--data", "x", "--heatmaps.views", "4").settings.heatmaps.views == 4
    assert command().settings.heatmaps.views == 4  # the default run's
    with pytest.raises(UsageError, match=r"heatmaps\.views: 3 is none of 1, 4, 8"):
        command("--data", "x", "--heatmaps.views", "3")


def test_a_fingerprint_leaves_out_what_is_marked_on_the_field() -> None:
    settings = Settings()
    later = {"select", "stain", "ignore_band", "boundary_weight", "ema"}  # as long as they are what there was before
    left_out = {
        "data": {"max_rejects", "cache", "cache_gb"},
        "members": {"workers", "mode", "deep_supervision"} | later,
        "fusion": {"workers", "from_best", "compare"} | later,
        "run": {"compile"},
        "tune": {"tiles"},  # which counts where there are more
    }
    for name in Settings.model_fields:
        section = getattr(settings, name)
        assert section.fingerprint_inputs() == section.model_dump(exclude=left_out.get(name, set())), name
    other: dict[str, Any] = {"select": "loss", "stain": 0.1, "ignore_band": 1, "boundary_weight": 2.0, "ema": 0.9}
    other["deep_supervision"] = 0.3
    for name, value in other.items():
        assert MembersSettings(**{name: value}).fingerprint_inputs()[name] == value
    sweep = read_sweep("tune_configs/fusion_optuna.yaml")
    assert sweep.fingerprint_inputs() == sweep.model_dump(exclude={"concurrency", "resources"})
    counted = settings.fusion.fingerprint_inputs(exclude={"epochs", "patience"})
    assert counted.keys() == settings.fusion.fingerprint_inputs().keys() - {"epochs", "patience"}


def test_a_grid_counts_as_its_combinations(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "trials: 2\nepochs: 1\nspace: {dropout: {grid: [0, 0.1, 0.2]}, jitter: {grid: [0, 1]}}\n"
    )
    assert read_sweep(str(tmp_path / "s.yaml")).trials_in_all == 12

"""The settings of a run: one typed, validated tree with all defaults, filled by YAML and the command line.

Nothing here imports torch or Ray, so `--help` answers at once.
"""

from __future__ import annotations

import re
import typing
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from apacs_ray.config.section import NOT_IN_FINGERPRINT, Common, Section
from apacs_ray.config.training_settings import FusionSettings, MemberName, MembersSettings, Precision, TrainingSettings

VIEWS = (1, 4, 8)  # of a picture: as it is, its flips as well, quarter turns of these as well
Share = Annotated[float, Field(ge=0, lt=1)]


class DataSettings(Section):
    """Where images and masks come from, and what counts as a defect."""

    masks: Common[str | None] = Field(None, description="URI of the masks, when they do not lie beside the slides")
    mpp: Common[float | None] = Field(None, gt=0, description="um per px at level 0, for images that do not say")
    mpps: str | None = Field(None, description="URI of a CSV slide_id,mpp: um per px of single slides")
    mask_classes: tuple[str, ...] = Field(
        (),
        description="annotations that are cells, by class (QuPath), group (ASAP), layer or text (ImageScope) or "
        "category (COCO); default: all but QuPath's Ignore* and Region*",
    )
    engine: Literal["auto", "vips", "openslide"] = Field(
        "auto", description="what reads whole slides; auto: libvips where it can, else OpenSlide"
    )
    plane: str = Field(
        "middle",
        description="focal plane of a z-stack (TIFF): middle, its number from 0, or sharpest, which is chosen anew for "
        "each tile",
    )
    cache: Annotated[str | None, NOT_IN_FINGERPRINT] = Field(
        None, description="folder on each node for slides from object storage (default: in the temporary folder)"
    )
    cache_gb: Annotated[float, NOT_IN_FINGERPRINT] = Field(
        50.0, gt=0, description="GiB that the cache may hold, beside the slides in use"
    )
    splits: Common[str | None] = Field(None, description="URI of a CSV slide_id,split (split: train, val or test)")
    slide_regex: Common[str | None] = Field(
        None,
        description="regular expression on the file stem; its first group is the slide id "
        "(default: every file is its own slide)",
    )
    val_fraction: Share = Field(
        0.2, gt=0, description="share of the training part that becomes val, when no val part is given"
    )
    max_rejects: Common[Annotated[str, NOT_IN_FINGERPRINT]] = Field(
        "default",
        description="rejected units that a stage tolerates, a count (5) or a share (1%) of the units listed; "
        "'default' is the larger of 1% and 5",
    )
    mask_threshold: Common[int | None] = Field(
        None,
        ge=1,
        le=255,
        description="gray masks and labels: a value of at least this, as stored, is cell; of colors their luminance "
        "(default: masks of more than two values are rejected); 1 takes every label but 0",
    )
    max_pixels: int = Field(400_000_000, ge=1024, description="px; a larger image is rejected undecoded")

    @field_validator("max_rejects", mode="before")
    @classmethod
    def _a_count_or_a_share(cls, value: Any) -> str:
        text = str(value).strip()
        if text != "default" and not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
            raise ValueError(f"{text!r} is neither a count (5) nor a share (1%)")
        return text

    @field_validator("plane", mode="before")
    @classmethod
    def _a_plane(cls, value: Any) -> str:
        text = str(value).strip()
        if not re.fullmatch(r"middle|sharpest|[0-9]{1,4}", text):
            raise ValueError("Input should be middle, sharpest or a number from 0")
        return text

    @field_validator("slide_regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value


class SyntheticSettings(Section):
    """The embedded default data, used when no --data is given: 5 synthetic smears (3 train, 2 test)."""

    width: int = Field(2560, ge=64, description="px, width of a synthetic slide")
    height: int = Field(2048, ge=64, description="px, height of a synthetic slide")
    mpp: float = Field(0.5, ge=0.2, le=1.0, description="um per px of a synthetic slide")
    train_slides: int = Field(3, ge=1, description="number of training slides")
    test_slides: int = Field(2, ge=1, description="number of test slides")


class TilesSettings(Section):
    """How images are cut into fields of view (FOV, tiles) and stored."""

    size: Common[int] = Field(2000, ge=32, description="px, side of a FOV (paper: 2000)")
    stride: int | None = Field(None, ge=1, description="px from one FOV to the next (default: tiles.size, no overlap)")
    mpp: Common[float | None] = Field(
        None, gt=0, description="um per px wanted (default: as scanned); whole slides only"
    )
    min_tissue: float | None = Field(
        None,
        ge=0,
        le=1,
        description="tiles with a smaller share of tissue are skipped (default: 0 for images, 0.02 for whole slides)",
    )
    min_tissue_um2: float = Field(
        300.0,
        ge=0,
        allow_inf_nan=True,
        description="um2 of tissue, about one small cell, for which a tile is kept all the same (inf: for none); "
        "whole slides only",
    )
    last: Literal["keep", "shift", "drop"] = Field(
        "keep", description="edge tiles: keep (smaller), shift (full size, overlapping) or drop"
    )
    image_format: Literal["jpeg", "png", "webp"] = Field(
        "jpeg", description="how tiles are stored; png, webp: lossless"
    )
    quality: int = Field(95, ge=1, le=100, description="JPEG quality")
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = Field("4:4:4", description="JPEG chroma subsampling")
    shard: int = Field(128, ge=1, description="tiles a Parquet shard")

    @model_validator(mode="after")
    def _stride_covers(self) -> TilesSettings:
        if self.stride is not None and self.stride > self.size:
            raise ValueError(f"stride {self.stride} is larger than size {self.size}: pixels would be lost")
        return self


class HeatmapsSettings(Section):
    """The members' heatmaps, stored once for training and tuning the fusion."""

    folds: Common[int] = Field(
        1,
        ge=1,
        le=20,
        description="1: in-sample heatmaps, as in the paper; K > 1: out-of-fold, K more trainings",
    )
    views: int = Field(
        1,
        description="views of a picture over which the members' logits are averaged for the fusion: 1: as it is; "
        "4: its flips as well; 8: quarter turns as well; so many times the time of the members, also in use",
    )

    @field_validator("views")
    @classmethod
    def _a_number_of_views(cls, value: int) -> int:
        if value not in VIEWS:
            raise ValueError(f"{value} is none of {', '.join(map(str, VIEWS))}")
        return value


class TuneSettings(Section):
    """The sweep of the fusion's hyperparameters."""

    config: Common[str] = Field("tune_configs/fusion_asha.yaml", description="search space, searcher and scheduler")
    tiles: Common[Annotated[int, NOT_IN_FINGERPRINT]] = Field(
        2000,
        ge=0,
        description="train tiles that trials learn from at most, and for each four of these one val tile that judges "
        "them, drawn in proportion from all slides; 0: all tiles",
    )

    @property
    def most(self) -> dict[str, int]:
        """Tiles that trials see at most, by split; without an entry all."""
        return {"train": self.tiles, "val": max(1, self.tiles // 4)} if self.tiles else {}


class EvaluateSettings(Section):
    """The test tiles, read by this stage only."""

    border: Common[int] = Field(
        0, ge=0, description="px left out at a tile's edge, where the data set leaves cut cells unannotated"
    )
    precision: Precision = Field("float32", description="of the networks' forward pass; tf32: on GPUs")
    threads: int = Field(
        1, ge=1, description="torch threads a worker; fixed, so that counts do not depend on the machine"
    )


class SegmentSettings(Section):
    """Segmentation of whole slides by a trained ensemble."""

    use: Common[Literal["fusion", "mean", "majority", "fcn32", "fcn16", "fcn8"]] = Field(
        "fusion", description="what decides: the fusion, the members' mean or vote, or one member"
    )
    threshold: Common[float] = Field(0.5, gt=0, lt=1, description="probability from which a pixel is cell")
    min_area_um2: Common[float] = Field(0.0, ge=0, description="objects of less area are background")
    fill_holes_um2: Common[float] = Field(
        0.0, ge=0, description="holes in objects of less area are filled, with all that lies in them"
    )
    roi: Common[str | None] = Field(
        None, description="GeoJSON that restricts every slide; default: NAME.roi.geojson beside a slide restricts that"
    )
    mpp: Common[float | None] = Field(
        None, gt=0, description="um per px at which slides are segmented (default: that of the training, in model.json)"
    )
    tissue: bool = Field(True, description="leave out glass, on a lattice of 32 px")
    core: int | None = Field(
        None, ge=32, multiple_of=32, description="px, side of what is segmented at a time (default: as memory allows)"
    )
    halo: int | None = Field(
        None,
        ge=0,
        multiple_of=32,
        description="px that networks see around it (default: exact, 256 for members, 480 or 512 for the fusion)",
    )
    tta: bool = Field(False, description="average the logits of eight flips and turns")
    origin: Literal["bounds", "corner"] = Field(
        "bounds", description="where coordinates of objects begin: at the slide's bounds, as in QuPath, or its corner"
    )
    simplify: float = Field(0.75, ge=0, le=10, description="px by which outlines of objects may leave the mask's")
    maps: int | None = Field(
        None,
        ge=1,
        le=32,
        description="px of the mask per px of probability.ome.tif and disagreement.ome.tif (1, 2, 4 ..); none: no maps",
    )
    precision: Precision = Field("float32", description="of the networks' forward pass; tf32: on GPUs")
    threads: int = Field(
        1, ge=1, description="torch threads a worker; fixed, so that masks do not depend on the machine"
    )

    @field_validator("maps")
    @classmethod
    def _whole_px_in_every_core(cls, value: int | None) -> int | None:
        if value is not None and 32 % value:
            raise ValueError("must be 1, 2, 4, 8, 16 or 32")
        return value

    @property
    def members(self) -> tuple[MemberName, ...]:
        """The members that are asked for by `use`, less those that a fusion names."""
        names = typing.get_args(MemberName)
        return (self.use,) if self.use in names else names  # type: ignore[return-value]


class RunSettings(Section):
    """The run as a whole."""

    seed: Common[int] = Field(0, ge=0, lt=2**31, description="seed of everything random")
    deterministic: bool = Field(
        False, description="on GPUs the same bits each time, where torch can, and slower; on CPUs they are anyway"
    )
    compile: Annotated[bool, NOT_IN_FINGERPRINT] = Field(
        False,
        description="on GPUs, with a crop and without deterministic, torch.compile makes steps of members and fusion "
        "faster after half a minute for each",
    )
    max_failures: int = Field(3, ge=0, description="lost workers a training survives")
    checkpoint_minutes: float = Field(10.0, gt=0, description="between checkpoints of a training within an epoch")
    replace: bool = Field(False, description="go on in an --output that holds a run of other data, and replace that")


class Settings(Section):
    """Everything a run can be told, beside where its data and its output are."""

    data: DataSettings = DataSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    tiles: TilesSettings = TilesSettings()
    members: MembersSettings = MembersSettings()
    heatmaps: HeatmapsSettings = HeatmapsSettings()
    tune: TuneSettings = TuneSettings()
    fusion: FusionSettings = FusionSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    segment: SegmentSettings = SegmentSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="before")
    @classmethod
    def _fusion_trains_as_the_members(cls, tree: Any) -> Any:
        """Fill in, from `members`, the `TrainingSettings` that `fusion` is not given, or None."""
        if not isinstance(tree, dict):
            return tree
        members, fusion = (
            section.model_dump(exclude_unset=True) if isinstance(section, Section) else section
            for section in (tree.get("members", {}), tree.get("fusion", {}))
        )
        if not isinstance(members, dict) or not isinstance(fusion, dict):
            return tree  # which is refused below, by name
        shared = TrainingSettings.model_fields
        own = {name: value for name, value in fusion.items() if value is not None or name not in shared}
        return {**tree, "fusion": {**{name: members[name] for name in shared if name in members}, **own}}

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> Settings:
        if 2 * self.evaluate.border >= self.tiles.size:
            raise ValueError(
                f"evaluate.border {self.evaluate.border} leaves nothing of tiles of {self.tiles.size} px (tiles.size)"
            )
        return self

    @model_validator(mode="after")
    def _trunk_fits(self) -> Settings:
        if self.fusion.trunk == "fcn32" and self.fusion.width != self.members.width:
            raise ValueError(f"fusion.trunk fcn32 needs fusion.width {self.members.width:g}, that of the members")
        return self

"""Checks of the tables that settings name: `data.splits` and `data.mpps`."""

from __future__ import annotations

from collections.abc import Iterator

from apacs_ray.config.settings import DataSettings
from apacs_ray.data.slide_tables import read_mpps, read_splits, read_table_text
from apacs_ray.doctor.finding import Finding
from apacs_ray.errors import ApacsError


def check_splits(data: DataSettings) -> Iterator[Finding]:
    """Check that `data.splits`, where it is given, exists and has a split in every line."""
    try:
        text = read_table_text(data.splits)
        if text is not None:
            slides = len(read_splits(text))
            yield Finding("data.splits", "ok", f"{data.splits}: {slides} slide{'s' * (slides != 1)}")
    except ApacsError as error:
        yield Finding("data.splits", "failed", str(error), "correct --data.splits, or the file")


def check_mpps(data: DataSettings) -> Iterator[Finding]:
    """Check that `data.mpps`, where it is given, exists and has a resolution in every line."""
    try:
        text = read_table_text(data.mpps)
        if text is not None:
            slides = len(read_mpps(text))
            yield Finding("data.mpps", "ok", f"{data.mpps}: {slides} slide{'s' * (slides != 1)}")
    except ApacsError as error:
        yield Finding("data.mpps", "failed", str(error), "correct --data.mpps, or the file")

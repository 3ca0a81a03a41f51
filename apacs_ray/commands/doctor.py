"""The command `doctor`: every check in turn, one table, one exit status."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apacs_ray.commands.shell import run_command
from apacs_ray.config.command_line import Command, SegmentCommand, parse, parse_segment
from apacs_ray.config.settings import Settings
from apacs_ray.console import console, print_log
from apacs_ray.doctor import cluster, codecs, devices, machine, segmenting, tables, versions
from apacs_ray.doctor.finding import Check, Finding, examine, redacted
from apacs_ray.doctor.stores import Stores
from apacs_ray.redact import secrets_in
from apacs_ray.storage import is_local

SUMMARY = (
    "Says whether a run with the same options would work on this machine; with --model and --slides, a segmentation. "
    "Exit status: 0 yes, 1 no, 2 wrong usage."
)
COLORS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
PAGE = 160  # characters a line, where there is no terminal that says


def main(argv: Sequence[str]) -> NoReturn:
    """Run the command, and end the process with its exit status."""
    run_command(partial(doctor, argv))


def doctor(argv: Sequence[str]) -> int:
    """Check, and print the table.

    Returns:
        The exit status: 0 when a run would work, else 1.

    Raises:
        UsageError: for options that are none.
    """
    if any(option.partition("=")[0] in ("--model", "--slides") for option in argv):
        given = parse_segment(argv, "apacs-ray doctor", SUMMARY, looks=False)
        print_log()
        findings, secrets = diagnose_segment(given)
    else:
        command = parse(argv, "apacs-ray doctor", SUMMARY)
        print_log()
        findings, secrets = diagnose(command)
    findings = [redacted(finding, secrets) for finding in findings]
    print_table(findings)
    failed = sum(finding.state == "failed" for finding in findings)
    warned = sum(finding.state == "warning" for finding in findings)
    if failed:
        console.print(f"{failed} failed, {warned} warned: a run would not work", markup=False)
    else:
        console.print("a run would work" + (f" ({warned} warned)" if warned else ""), markup=False)
    return 1 if failed else 0


def diagnose(command: Command) -> tuple[list[Finding], set[str]]:
    """Every finding of a run that trains, and the secrets that must not be printed with them."""
    stores = Stores()
    settings, data, output = command.settings, command.data, command.output
    return _findings(
        {
            **_machine(settings, output, data),
            "data": lambda: stores.check_data("data", data),
            "data.masks": lambda: stores.check_data("data.masks", settings.data.masks),
            "data.splits": lambda: tables.check_splits(settings.data),
            "data.mpps": lambda: tables.check_mpps(settings.data),
            **_output(stores, output),
            "cluster": lambda: cluster.check_cluster(command),
        },
        stores,
    )


def diagnose_segment(command: SegmentCommand) -> tuple[list[Finding], set[str]]:
    """Every finding of a segmentation, and the secrets that must not be printed with them."""
    stores, checks = Stores(), segmenting.SegmentChecks(command)
    settings, output = command.settings, command.output
    places = [(output, "--output"), (command.model, "--model"), *((uri, "--slides") for uri in command.slides)]
    remote = next((uri for uri in command.slides if not is_local(uri)), None)
    return _findings(
        {
            **_machine(settings, output, remote),
            "data.mpps": lambda: tables.check_mpps(settings.data),
            "model": checks.check_model,
            "slides": checks.check_slides,
            **_output(stores, output),
            "cluster": lambda: cluster.check_plans(places, checks.check_cores),
        },
        stores,
    )


def _findings(checks: Mapping[str, Check], stores: Stores) -> tuple[list[Finding], set[str]]:
    findings = [finding for name, check in checks.items() for finding in examine(name, check)]
    return findings, secrets_in(os.environ) | stores.secrets()


def _machine(settings: Settings, output: str, data: str | None) -> dict[str, Check]:
    """The checks of this machine, for a run that writes to `output` and reads `data`."""
    return {
        "Python": versions.check_python,
        "packages": versions.check_packages,
        "torch": versions.check_torch,
        "GPU": lambda: devices.check_gpus(settings),
        "CPU": lambda: devices.check_cpu(settings),
        "Pillow": codecs.check_pillow,
        "simplejpeg": codecs.check_simplejpeg,
        "libvips": codecs.check_vips,
        "OpenSlide": codecs.check_openslide,
        "shared memory": machine.check_shared_memory,
        "sockets": machine.check_sockets,
        "disk": lambda: machine.check_disks(settings, output, data),
        "open files": machine.check_open_files,
    }


def _output(stores: Stores, output: str) -> dict[str, Check]:
    return {
        "output": lambda: stores.check_output("output", output),
        "lock": lambda: stores.check_lock(output),
        "clock": stores.check_clock,
    }


def print_table(findings: Sequence[Finding]) -> None:
    """A row a finding; what to do stands below what was found."""
    table = Table(title="doctor", title_justify="left")
    for heading in ("check", "state", "found"):
        table.add_column(heading, justify="left")
    for finding in findings:
        message = Text(finding.message, overflow="fold")
        if finding.advice:
            message.append(f"\n-> {finding.advice}")
        table.add_row(Text(finding.name), Text(finding.state, COLORS[finding.state]), message)
    known = console.is_terminal or "COLUMNS" in os.environ
    Console(width=None if known else PAGE).print(table)

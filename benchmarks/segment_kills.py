"""Stop the segmentation of slides at random moments and start it again, until it ends: the bytes must be the same.

The driver is stopped by SIGKILL, SIGTERM and SIGHUP in turn, a random time after the output last changed, `--kills`
times; then the same command is left to its end. All files but `timings.json` must equal those of a run that nobody
disturbed. A slide that was done is not done again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402
from PIL import Image  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import render, slide_specs  # noqa: E402
from apacs_ray.testing.ensembles import random_networks, write_networks  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
SIDE = 640  # px of a slide
HOW = ["--segment.core", "160", "--segment.maps", "4", "--segment.fill_holes_um2", "5", "--segment.tissue", "false"]
LATEST = 8.0  # s, at most, from a start's first change of the output to the signal


def main() -> None:
    """Stop, start again and compare; print what every stop met."""
    parser = options(__doc__ or "", "6 slides, 3 stops")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    slides, kills = (2, 1) if arguments.smoke else (6, 3) if arguments.quick else (16, arguments.kills)
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write(place, slides)
        undisturbed = _start(place, "undisturbed")
        require(undisturbed.wait() == 0, "an undisturbed run fails: " + _log(place, "undisturbed"))
        rows: list[dict[str, Any]] = []
        done: dict[str, int] = {}
        for number, sent in zip(range(kills), itertools.cycle(SIGNALS), strict=False):
            process = _start(place, "stopped")
            status = _stop(process, place / "stopped", sent, generator.uniform(0, LATEST))
            again = _done(place / "stopped")
            require(done.items() <= again.items(), f"stop {number}: a slide that was done was done again")
            done = again
            require(status in (0, -sent, 130), f"stop {number}: status {status}: {_log(place, 'stopped')}")
            rows.append({"stop": number, "signal": sent.name, "status": status, "slides done": len(done)})
        require(_start(place, "stopped").wait() == 0, "the last start fails: " + _log(place, "stopped"))
        different = _differences(place / "undisturbed", place / "stopped")
    show(f"segmentation of {slides} slides, stopped", rows, arguments.json)
    require(not different, f"not the bytes of an undisturbed run: {', '.join(different)}")


def _write(place: Path, slides: int) -> None:
    (place / "slides").mkdir()
    specs = slide_specs(1, SIDE, SIDE, train=slides, test=0)
    pictures = [render(spec)[0] for spec in specs]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(place / f"slides/{number:02d}.png")
    write_networks(LocalStore(str(place / "model")), random_networks(pictures[0], width=0.02))


def _start(place: Path, output: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "pipelines/segment.py"), "--model", str(place / "model")]
    where = ["--slides", str(place / "slides"), "--output", str(place / output)]
    with (place / f"{output}.log").open("wb") as log:
        return subprocess.Popen([*command, *where, *HOW], stdout=log, stderr=log, start_new_session=True)


def _stop(process: subprocess.Popen[bytes], output: Path, sent: signal.Signals, pause: float) -> int:
    """Stop a run `pause` s after it first changed the output, with all that it started; return its status."""
    before = _state(output)
    while process.poll() is None and _state(output) == before:
        time.sleep(0.05)
    end = time.monotonic() + pause
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(sent)
    status = process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what SIGKILL left
    return status


def _state(output: Path) -> set[str]:
    return {str(path) for path in output.rglob("*") if path.name != "run.lock"}


def _done(output: Path) -> dict[str, int]:
    """When the record of each finished slide was written, by its path."""
    return {str(path): path.stat().st_mtime_ns for path in output.glob("*/slide.json")}


def _differences(one: Path, other: Path) -> list[str]:
    files = [
        {str(path.relative_to(run)): path.read_bytes() for path in run.glob("*/*") if path.is_file()}
        for run in (one, other)
    ]
    names = files[0].keys() | files[1].keys()
    return sorted(
        name for name in names if files[0].get(name) != files[1].get(name) and not name.endswith("timings.json")
    )


def _log(place: Path, output: str) -> str:
    return (place / f"{output}.log").read_text(errors="replace")[-2000:]


if __name__ == "__main__":
    main()

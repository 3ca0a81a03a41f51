"""Stop the segmentation of slides at random moments and start it again, until it ends: the bytes must be the same.

The driver is stopped by SIGKILL, SIGTERM and SIGHUP in turn after a random number of changes of the output, `--kills`
times. Where a start comes to its end first, and after the last stop, all files but `timings.json` must equal those of a
run that nobody disturbed; then it begins anew. A slide that was done is not done again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kills import SIGNALS, Script, await_changes, stop_driver  # noqa: E402
from measure import options, require, show  # noqa: E402
from PIL import Image  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import render, slide_specs  # noqa: E402
from apacs_ray.testing.ensembles import random_networks, write_networks  # noqa: E402

SIDE = 640  # px of a slide
HOW = ["--segment.core", "160", "--segment.maps", "4", "--segment.fill_holes_um2", "5", "--segment.tissue", "false"]
LATEST = 6  # changes for each slide, at most, until the signal


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
        stops = 0
        while stops <= kills:
            sent, last = SIGNALS[stops % len(SIGNALS)], stops == kills
            process, changes = _start(place, "stopped"), generator.randint(1, LATEST * slides)
            status = process.wait() if last else _stop(process, place / "stopped", sent, changes)
            require(status in (0, -sent, 130), f"stop {stops}: status {status}: {_log(place, 'stopped')}")
            again = _done(place / "stopped")
            require(done.items() <= again.items(), f"stop {stops}: a slide that was done was done again")
            rows.append({"signal": sent.name, "changes": changes, "status": status, "slides done": len(again)})
            done, stops = again, stops + (status != 0 or last)
            if status == 0:
                different = _differences(place / "undisturbed", place / "stopped")
                require(not different, f"not the bytes of an undisturbed run: {', '.join(different)}")
                shutil.rmtree(place / "stopped")
                done = {}
    show(f"segmentation of {slides} slides, stopped", rows, arguments.json)


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
        return subprocess.Popen(
            [*command, *where, *HOW],
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup ignores
        )


def _stop(process: subprocess.Popen[bytes], output: Path, sent: signal.Signals, changes: int) -> int:
    """Stop a run, with all that it started, when so many files were made or replaced; return its status."""
    driver = Script(process)
    await_changes(driver, output, changes, 0.0)
    status, _ = stop_driver(driver, sent)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what SIGKILL left
    return status


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

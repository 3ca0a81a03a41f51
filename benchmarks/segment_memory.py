"""Peak memory of every process of `segment`, the driver and Ray's own included, by the slide's size: it must not grow.

The command is `pipelines/segment.py` as it stands here, on a synthetic smear that is repeated to the slide's size, with
a small random network, every px segmented, a tenth of them cell: of more, objects grow together into one over the whole
slide, whose outline is held until its end. Ten times a second the memory of its own (anonymous, resident) of each
process is read; a process is named as Ray names it at that moment. Apart from it: *mapped*, files and libraries that
others share and the kernel may drop, and *store*, the shared memory of Ray's object store, which has a limit.
Runs check that the source stays as it is: start this from a clone while you work on the package.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from measure import options, require, show  # noqa: E402
from tiling import write_slide  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import render, slide_specs  # noqa: E402
from apacs_ray.testing.ensembles import random_networks, write_networks  # noqa: E402

SIDES = (10_240, 40_960)
SMEAR = 2048  # px that are repeated
MEMBER = "fcn32"
HOW = ("--segment.use", MEMBER, "--segment.tissue", "false")
CELL = 0.1  # of all px
EVERY = 0.1  # s
KINDS = {"RssAnon": "own", "RssFile": "mapped", "RssShmem": "store"}  # of /proc/PID/status
LARGEST_RATIO = 1.2  # of a process's own memory, larger slide to smaller

Peaks = dict[str, Counter[str]]  # kind -> MB by process


def main() -> None:
    """Run the command on slides of both sizes, print the peaks and fail when one grows."""
    parser = options(__doc__ or "", "slides of 4096 and 8192 px")
    parser.add_argument("--width", type=float, default=0.02, help="of the networks (default: 0.02)")
    arguments = parser.parse_args()
    sides, smear, how = (4096, 8192) if arguments.quick else SIDES, SMEAR, HOW
    if arguments.smoke:
        sides, smear, how = (512,), 512, (*HOW, "--segment.core", "256")
    picture, _ = render(slide_specs(1, 640, 640, train=1, test=0)[0])
    peaks = []
    networks = random_networks(picture, width=arguments.width)
    how = (*how, "--segment.threshold", f"{_threshold(networks[MEMBER][1], smear):.4f}")
    with tempfile.TemporaryDirectory() as folder:
        write_networks(LocalStore(f"{folder}/model"), networks)
        for side in sides:
            write_slide(Path(folder, f"{side}.tif"), side, smear)
            began = time.monotonic()
            peaks.append(_watched(folder, side, how))
            print(f"{side} px: {time.monotonic() - began:.0f} s", flush=True)
    rows = _rows(peaks, sides)
    what = " and ".join(f"{side} px" for side in sides)
    show(f"peak memory of the processes of `segment`, MB, slides of {what}", rows, arguments.json)
    grow = [row["process"] for row in rows if row.get("ratio", 0) > LARGEST_RATIO]
    require(not grow, f"grows with the slide: {', '.join(grow)}")


@torch.inference_mode()
def _threshold(network: torch.nn.Module, smear: int) -> float:
    """Return the probability that a share of `CELL` of what is repeated exceeds."""
    picture, _ = render(slide_specs(0, smear, smear, train=1, test=0)[0])  # as `write_slide` has it
    image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    return float(np.quantile(torch.sigmoid(network(image)).numpy(), 1 - CELL))


def _watched(folder: str, side: int, how: tuple[str, ...]) -> Peaks:
    """Segment a slide, and return the peaks of all processes meanwhile."""
    script, output = str(ROOT / "pipelines/segment.py"), f"{folder}/out-{side}"
    given = ["--model", f"{folder}/model", "--slides", f"{folder}/{side}.tif", "--output", output]
    log = Path(folder, f"{side}.log")
    peaks: Peaks = {kind: Counter() for kind in KINDS.values()}
    with log.open("wb") as sink:
        process = subprocess.Popen([sys.executable, script, *given, *how], stdout=sink, stderr=sink)
    driver = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                for one in (driver, *driver.children(recursive=True)):
                    with contextlib.suppress(psutil.Error, OSError):
                        _note(peaks, "driver" if one == driver else _title(one), one.pid)
            time.sleep(EVERY)
    finally:
        process.terminate()
        process.wait()
    require(process.returncode == 0, f"{side} px: status {process.returncode}: {log.read_text()[-3000:]}")
    return peaks


def _title(process: psutil.Process) -> str:
    """How Ray calls a process, without what it does at the moment, or the program that it is."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return os.path.basename(script)


def _note(peaks: Peaks, title: str, pid: int) -> None:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in KINDS:
            of = peaks[KINDS[name]]
            of[title] = max(of[title], int(value.split()[0]) / 1024)


def _rows(peaks: list[Peaks], sides: tuple[int, ...]) -> list[dict[str, Any]]:
    smaller, larger = peaks[0], peaks[-1]
    rows = []
    for title, most in larger["own"].most_common():
        row: dict[str, Any] = {"process": title}
        if title in smaller["own"]:
            row |= {f"{sides[0]}": smaller["own"][title], "ratio": most / smaller["own"][title]}
        rows.append(row | {f"{sides[-1]}": most, "mapped": larger["mapped"][title], "store": larger["store"][title]})
    return rows


if __name__ == "__main__":
    main()

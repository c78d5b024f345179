"""What `refinedet detect` needs for many pictures, and what remains of a run that is killed again and again.

    python benchmarks/detect_scale.py [--pictures 20000] [--kills 10] [--seed 0] [--keep FOLDER]

Small pictures of noise are looked at by a random detector of the preset ``tiny``. One run goes through undisturbed
while its memory is watched; another is ended by SIGKILL at random moments, the last of them about when the final files
are written, and goes on by --resume. Prints a table: the growth of memory after the first 1,000 pictures, and whether
both runs end with the same bytes. Needs Linux, whose /proc tells the memory of a process.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.zoo.checkpoint import save_checkpoint

SIDE = 64
SETTLED = 1000
POLL_SECONDS = 0.02
START = "from refinedet_cli.cli.app import run; run()"


class Watched(NamedTuple):
    """A run that was watched to its end: its memory when it had settled and at most, MiB, and its length, seconds."""

    settled: float
    most: float
    seconds: float


class Killed(NamedTuple):
    """A run that was killed: after how many pictures each time, lines that are there twice, and pictures without."""

    at: list[int]
    repeated: int
    lost: int


class Lines:
    """Counts the lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self.count = path, 0, 0

    def update(self) -> int:
        """Count what has come."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                chunk = file.read()
            self._read += len(chunk)
            self.count += chunk.count(b"\n")
        return self.count


def make_pictures(folder: Path, count: int) -> None:
    """Draw noise in a hundred folders."""
    for i in range(count):
        path = folder / f"{i % 100:02}" / f"{i:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(path, compress_level=1)


def make_weights(path: Path) -> None:
    """Save a random detector that finds something in most pictures."""
    config = tiny(Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))).detector
    torch.manual_seed(0)
    network = build(config).network
    for name, parameter in network.named_parameters():
        if name.startswith(("arm", "odm")):
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 1.0)
    save_checkpoint(path, config, network.state_dict(), {})


def start(work: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a run, or go on with it, as a user would."""
    options = ["--out", str(out), "--weights", str(work / "tiny.safetensors"), "--device", "cpu", "--score", "0.7"]
    command = [
        sys.executable,
        "-c",
        START,
        "detect",
        str(work / "pictures"),
        *options,
        "--no-draw",
        "--quiet",
        "--resume",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def memory(process: subprocess.Popen[bytes]) -> float:
    """What a process holds of its own, MiB, without the code of libraries; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0.0)


def watch(work: Path, out: Path) -> Watched:
    """Run undisturbed."""
    begin, settled, most = time.perf_counter(), 0.0, 0.0
    process, lines = start(work, out), Lines(out / "detections.jsonl")
    while process.poll() is None:
        held = memory(process)
        if lines.update() >= SETTLED:
            settled, most = settled or held, max(most, held)
        time.sleep(10 * POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"the undisturbed run ended with {process.returncode}")
    return Watched(settled, most, time.perf_counter() - begin)


def kill_again_and_again(work: Path, out: Path, moments: Iterator[tuple[int, float]]) -> Killed:
    """Kill a run when so many pictures are done and some seconds have passed, then let it end."""
    journal, at = out / "detections.jsonl", []
    for count, delay in moments:
        process, lines = start(work, out), Lines(journal)
        # The first line is about the run.
        while process.poll() is None and lines.update() <= count:
            time.sleep(POLL_SECONDS)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        at.append(max(0, Lines(journal).update() - 1))
    if code := start(work, out).wait():
        raise SystemExit(f"the last run ended with {code}")
    ids = [document["id"] for document in map(json.loads, journal.read_text().splitlines()) if "id" in document]
    return Killed(at, len(ids) - len(set(ids)), len(list((work / "pictures").rglob("*.png"))) - len(set(ids)))


def table(pictures: int, watched: Watched, killed: Killed, same: bool) -> Table:
    """Lay out what was seen."""
    rows = [
        ("Pictures", f"{pictures:,} of {SIDE} x {SIDE} px"),
        ("Undisturbed run", f"{watched.seconds:.0f} s, {pictures / watched.seconds:.0f} pictures/s"),
        (f"Memory after {SETTLED:,} pictures", f"{watched.settled:.0f} MiB"),
        ("Growth after that, at most", f"{watched.most - watched.settled:.1f} MiB"),
        ("Killed after pictures", ", ".join(f"{count:,}" for count in killed.at)),
        ("Pictures recorded twice, or not at all", f"{killed.repeated}, {killed.lost}"),
        ("Same detections.json", "yes, to the byte" if same else "NO"),
    ]
    shown = Table(title="detect at scale", show_header=False, title_justify="left")
    shown.add_column(no_wrap=True)
    shown.add_column()
    for row in rows:
        shown.add_row(*row)
    return shown


def measure(work: Path, pictures: int, kills: int, seed: int) -> Table:
    """Make the pictures and both runs."""
    make_pictures(work / "pictures", pictures)
    make_weights(work / "tiny.safetensors")
    watched = watch(work, work / "whole")
    draw = random.Random(seed)
    counts = sorted(draw.randrange(pictures) for _ in range(kills - 1))
    moments = [(count, draw.uniform(0, 0.05)) for count in counts] + [(pictures - 1, draw.uniform(0, 0.5))]
    killed = kill_again_and_again(work, work / "killed", iter(moments[:kills]))
    whole, other = (work / name / "detections.json" for name in ("whole", "killed"))
    return table(pictures, watched, killed, whole.read_bytes() == other.read_bytes())


def main() -> None:
    """Read the options and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave everything there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.keep or Path(temporary)
        Console(width=110).print(measure(work, options.pictures, options.kills, options.seed))


if __name__ == "__main__":
    main()

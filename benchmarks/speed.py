"""Time this toolkit beside others that do the same, and beside what the machine can do.

Usage: python benchmarks/speed.py [--pictures DIR] [--out speed] [--only ROW ...] [--rounds N] [--threads N] [--quick]
       python benchmarks/speed.py --device cuda

Makes the table of a CPU, or with --device cuda that of a GPU, and leaves all times in speed.json. Without --pictures
the photographs of the demo are looked at, as JPEG files.

How times are taken: all sides of a row run in this process, with the same threads, on the same processors and pictures.
After a warm-up they take turns, A B, B A, A B and so on, so that a machine that changes its speed, or others that work
on it, hit both sides alike. A turn is as many calls as fit into about half a second, the same number for each side. The
figure is the median of the ratios (or times) of the rounds; 8 of 10 rounds lie in the range behind it.

What is compared: of torchvision a plain loop, one picture after the other from the file to boxes, in float32 as it
comes; of OpenVINO the same network, converted from the same weights, with its precision said and the hint LATENCY; for
post-processing a loop over the classes with torchvision's NMS. VGG-16 and torchvision's detectors have seeded random
weights, which cost what trained ones do once three things are set right, for them as for us: statistics of
normalisation are fitted to the pictures, class logits are spread, and background is made so likely that about 200
scores a picture pass the detector's own threshold. With its random head as drawn, which lets tens of thousands pass,
torchvision's detector is timed too, and that is in speed.json. Torchvision's detectors get 20 classes, as
ours have, not the 90 that they come with, which would make them slower.

Exit code 1 if a row could not be measured. A target that is missed is said in the table alone.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import speed_cpu
import speed_gpu
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from speed_timing import Bench, Finding, Sizes, number

from refinedet_cli.core.words import counted
from refinedet_cli.data.files import make_folder, write_json
from refinedet_cli.data.listing import find_images
from refinedet_cli.engine.device import select_device, select_precision
from refinedet_cli.engine.environment import describe_environment
from refinedet_cli.errors import RefineDetError

TABLES: Mapping[str, Mapping[str, speed_cpu.Row]] = {"cpu": speed_cpu.ROWS, "gpu": speed_gpu.ROWS}
ROUNDS, QUICK_ROUNDS = 11, 3
TURN_SECONDS, QUICK_TURN_SECONDS = 0.5, 0.1
QUICK = Sizes(batch=8, vgg_pictures=4, light_pictures=16, cases=500, matrices=(512, 1024))
PEERS = ("openvino", "onnxruntime", "pillow")
FLAGS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
WIDTH = 150


def demo_photographs(folder: Path) -> tuple[Path, ...]:
    """Save the photographs of examples/demo.py as JPEG."""
    demo = Path(__file__).resolve().parent.parent / "examples" / "demo.py"
    written = runpy.run_path(str(demo))["write_photographs"](folder / "png")
    paths = []
    for source in written:
        paths.append((folder / source.name).with_suffix(".jpg"))
        with Image.open(source) as image:
            image.convert("RGB").save(paths[-1], quality=90)
    return tuple(paths)


def machine(device: torch.device) -> dict[str, Any]:
    """Name what computes: plain data."""
    found = asdict(describe_environment(device, select_precision("auto", device)))
    # The name of somebody's machine belongs to nobody's table.
    del found["host"]
    found |= {name: _version(name) for name in PEERS}
    capabilities = torch.cpu.get_capabilities()
    found["flags"] = [name for name in FLAGS if capabilities.get(name)]
    found["processors"] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    found["load_before"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(found: Mapping[str, Any]) -> str:
    """Name what computes, for people."""
    flags = ", ".join(found["flags"]) or "none of " + ", ".join(FLAGS)
    threads, cores = counted(found["threads"], "thread"), counted(found["cores"], "core")
    processor = f"{found['cpu']}, {threads} on {cores} ({flags})"
    libraries = ", ".join(f"{name} {found[name]}" for name in ("torch", "torchvision", *PEERS) if found[name])
    gpu = f"{found['gpu']}, " if found["gpu"] else ""
    load = found["load_before"]
    busy = f"; load before: {load:.1f}" if load is not None else ""
    ours = f"refinedet {found['refinedet']}, {found['commit'] or 'no commit'}"
    return f"{gpu}{processor}{busy}\n{found['python']}, {libraries}\n{ours}"


def use_threads(threads: int | None) -> int:
    """Let everything here compute with so many threads; None takes all cores that may be used.

    Fewer threads also get fewer processors, so that what others start beside them is held to the same.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        threads = min(threads or len(allowed), len(allowed))
        os.sched_setaffinity(0, allowed[:threads])
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    return threads


def document(finding: Finding) -> dict[str, Any]:
    """Turn a line into plain data."""
    return {**asdict(finding), "figure": finding.figure._asdict(), "reached": finding.reached}


def table(findings: Sequence[Finding], title: str) -> Table:
    """Lay the lines out."""
    shown = Table(title=title, title_justify="left", leading=1)
    # Names of models are not to be broken.
    for name, width in {"Work": 30, "Ours": 16, "Theirs": 29, "Figure": 20, "Target": 12, "Reached": 7}.items():
        shown.add_column(name, min_width=width)
    for finding in findings:
        shown.add_row(*_cells(finding))
    return shown


def _cells(finding: Finding) -> tuple[str, ...]:
    figure = finding.figure
    unit = {"x": " times", "%": " %", "": ""}.get(finding.unit, f" {finding.unit}")
    value = f"{number(figure.median)}{unit}"
    if figure.low != figure.high:
        value += f" ({number(figure.low)} to {number(figure.high)})"
    # A word, not a colour, for tables are read in files too.
    target = "" if finding.target is None else f"{finding.sense} {_plain(finding.target, finding.unit)}"
    reached = {None: "", True: "yes", False: "NO"}[finding.reached]
    return finding.work, finding.ours, finding.theirs, value, target, reached


def _plain(target: float, unit: str) -> str:
    return f"{target:.2f}" if unit == "x" else f"{target:,g} {unit}".rstrip()


def measure(
    rows: Mapping[str, speed_cpu.Row], bench: Bench, out: Path, about: Mapping[str, Any], errors: Console
) -> tuple[list[Finding], dict[str, str]]:
    """Measure row by row; what is done is on disk at once.

    Returns:
        the lines of the table, and what went wrong, by row.
    """
    findings: list[Finding] = []
    documents: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for name, row in rows.items():
        errors.print(f"{name} ...", highlight=False)
        try:
            for finding in row(bench):
                findings.append(finding)
                documents.append({"row": name, **document(finding)})
        except Exception as error:  # whatever it is, the other rows are worth having
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        write_json(out, {"schema_version": 1, **about, "lines": documents, "failed": failed})
    return findings, failed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", metavar="DIR", help="folder of JPEG or WebP pictures")
    parser.add_argument("--out", type=Path, default=Path("speed"), metavar="DIR", help="where speed.json goes")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows to measure, by name")
    parser.add_argument("--rounds", type=int, help=f"in each of which every side has a turn (default {ROUNDS})")
    parser.add_argument("--threads", type=int, help="that compute (default: all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", choices=TABLES, help="which table to make (default: that of the device)")
    parser.add_argument("--quick", action="store_true", help="few pictures, cases and rounds: does it run?")
    options = parser.parse_args(arguments)
    options.table = options.table or ("gpu" if options.device == "cuda" else "cpu")
    rows = TABLES[options.table]
    if unknown := set(options.only) - set(rows):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    for name in ("rounds", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table; returns the exit code."""
    options = parse(arguments)
    try:
        return _run(options)
    except RefineDetError as error:
        print(f"{error.message}; {error.hint}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    device = select_device(options.device)
    use_threads(options.threads)
    rows = {name: row for name, row in TABLES[options.table].items() if not options.only or name in options.only}
    make_folder(options.out)
    with tempfile.TemporaryDirectory(prefix="refinedet-speed-") as temporary:
        folder = Path(temporary)
        found = [image.path for image in find_images([options.pictures])] if options.pictures else []
        pictures = tuple(found) or demo_photographs(folder / "photographs")
        bench = Bench(
            pictures=pictures,
            folder=folder,
            device=device,
            rounds=options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            turn_seconds=QUICK_TURN_SECONDS if options.quick else TURN_SECONDS,
            sizes=QUICK if options.quick else Sizes(),
        )
        about = {
            "machine": machine(device),
            "table": options.table,
            "quick": options.quick,
            "rounds": bench.rounds,
            "pictures": [path.name for path in pictures],
        }
        findings, failed = measure(rows, bench, options.out / "speed.json", about, Console(stderr=True))
    console = Console(width=WIDTH)
    title = f"Speed, {counted(bench.rounds, 'round')}{', QUICK: no numbers to cite' if options.quick else ''}"
    console.print(table(findings, title))
    console.print(describe(about["machine"]), highlight=False)
    for name, why in failed.items():
        console.print(f"NOT MEASURED: {name}: {why}", markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

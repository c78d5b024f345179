"""Start every recipe of examples/recipes on drawn stand-ins for its data sets, and see that it trains.

Usage: python benchmarks/recipes.py [NAME ...] [--steps 20] [--size 64] [--batch 2] [--device cpu]

The stand-ins have the folders, files and class lists of PASCAL VOC 2007, 2012 and COCO 2017, with a few drawn pictures
each. Networks, optimiser and losses are the recipe's own; input size, batch and length are not, unless --size 0 and
--batch 0 ask for them, and the rate is lowered with the batch. There are no ImageNet weights: backbones start at
random. A recipe that starts from another one's weights gets what that one has just trained. The table gives what the
recipe would do at full length, and the mean loss of the first and of the last quarter of the short run, which tells
that the run holds together and nothing else.

Exit code 1 if a run fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from refinedet_cli.core.presets import VOC_NAMES
from refinedet_cli.engine import run_log, training_session
from refinedet_cli.engine.device import DeviceName
from refinedet_cli.engine.recipe import milestone_steps
from refinedet_cli.engine.run_file import read_run_file
from refinedet_cli.engine.run_log import StepReport
from refinedet_cli.engine.run_record import LAST_FILE
from refinedet_cli.engine.train import Report
from refinedet_cli.engine.training_session import TrainingSession
from refinedet_cli.errors import RefineDetError
from refinedet_cli.zoo.importers.class_names import COCO_CLASSES

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
PICTURES = 8
SIDE = 80


@dataclass(frozen=True)
class Tried:
    """How the short run of a recipe went.

    Attributes:
        session: the recipe at full length, resolved on the stand-ins.
        first, last: mean loss of the first and of the last quarter of the steps.
        seconds: of the whole short run, loading, saving and evaluation included.
        steps: that it took.
    """

    session: TrainingSession
    first: float
    last: float
    seconds: float
    steps: int


@dataclass(frozen=True)
class Object:
    """One drawn object: the place of its class in the list, and its corners in pixels."""

    label: int
    left: int
    top: int
    right: int
    bottom: int


def make_stand_ins(root: Path) -> None:
    """Draw stand-ins for VOC2007, VOC2012 and COCO below a folder, as ``--root`` wants it."""
    for year, parts in (("VOC2007", ("train", "val", "test")), ("VOC2012", ("train", "val"))):
        _make_voc(root / "VOCdevkit" / year, parts)
    _make_coco(root / "coco")


def _draw(path: Path, seed: Sequence[int], classes: int) -> list[Object]:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
    objects = []
    for _ in range(int(generator.integers(1, 4))):
        label = int(generator.integers(classes))
        left, top, width, height = (int(v) for v in generator.integers((0, 0, 12, 12), (44, 44, 36, 36)))
        pixels[top : top + height, left : left + width] = (50 + 9 * (label % 20), 250 - 9 * (label % 20), 200)
        objects.append(Object(label, left, top, left + width, top + height))
    Image.fromarray(pixels).save(path, quality=95)
    return objects


def _make_voc(folder: Path, parts: Sequence[str]) -> None:
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    names: dict[str, list[str]] = {}
    for part, name in enumerate(parts):
        names[name] = [f"{folder.name[3:]}_{part}{i:05d}" for i in range(PICTURES)]
        for i, stem in enumerate(names[name]):
            objects = _draw(folder / "JPEGImages" / f"{stem}.jpg", (int(folder.name[3:]), part, i), len(VOC_NAMES))
            text = "".join(_voc_object(o, difficult=i == 0 and k == 0) for k, o in enumerate(objects))
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><folder>{folder.name}</folder><filename>{stem}.jpg</filename><size><width>{SIDE}</width>"
                f"<height>{SIDE}</height><depth>3</depth></size><segmented>0</segmented>{text}</annotation>\n"
            )
    names["trainval"] = names["train"] + names["val"]
    for name, stems in names.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def _voc_object(o: Object, *, difficult: bool) -> str:
    # VOC counts pixels from 1, and its right and bottom ones lie inside.
    return (
        f"<object><name>{VOC_NAMES[o.label]}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{int(difficult)}</difficult><bndbox><xmin>{o.left + 1}</xmin><ymin>{o.top + 1}</ymin>"
        f"<xmax>{o.right}</xmax><ymax>{o.bottom}</ymax></bndbox></object>"
    )


def _make_coco(folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    categories = [
        {"id": i, "name": n, "supercategory": "thing"}
        for i, n in zip(COCO_CLASSES.category_ids, COCO_CLASSES.names, strict=True)
    ]
    for part, name in enumerate(("train2017", "val2017")):
        (folder / name).mkdir()
        images, annotations = [], []
        for i in range(PICTURES):
            file_name = f"{part}{i:011d}.jpg"
            images.append({"id": 100 * part + i, "file_name": file_name, "width": SIDE, "height": SIDE})
            for o in _draw(folder / name / file_name, (2017, part, i), len(COCO_CLASSES)):
                width, height = o.right - o.left, o.bottom - o.top
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 100 * part + i,
                        "category_id": COCO_CLASSES.category_ids[o.label],
                        "bbox": [o.left, o.top, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))


def names_in_order() -> list[str]:
    """List the recipes, those that start from another one's weights last."""
    return sorted((path.stem for path in RECIPES.glob("*.toml")), key=lambda name: (name.endswith("-from-coco"), name))


def prepare(
    name: str, root: Path, runs: Path, settings: Sequence[str], *, resolve_only: bool, device: DeviceName = "cpu"
) -> TrainingSession:
    """Prepare a recipe on stand-ins.

    Args:
        name: of the recipe.
        root: folder of the stand-ins.
        runs: folder of all runs; a recipe that starts from another one's weights finds them there.
        settings: as ``--set`` takes them.
        resolve_only: prepare it without a folder to write to.
        device: where to compute.
    """
    path = RECIPES / f"{name}.toml"
    weights = read_run_file(path).weights
    return training_session.prepare(
        data=(),
        val=(),
        images=None,
        root=root,
        out=None if resolve_only else runs / name,
        weights="none" if weights is None else str(runs / Path(weights).parent.name / LAST_FILE),
        backbone_weights=None,
        preset=None,
        config=path,
        settings=settings,
        device=device,
        workers=0,
        cache=None,
        resume=False,
        overwrite=True,
    )


def smaller_batch(name: str, batch: int) -> list[str]:
    """Set another batch, 0 for the recipe's own, and the rate in proportion."""
    train = read_run_file(RECIPES / f"{name}.toml").settings["train"]
    return [f"train.batch={batch}", f"train.lr={train['lr'] * batch / train['batch']}"] if batch else []


def try_recipe(name: str, root: Path, runs: Path, settings: Sequence[str], device: DeviceName) -> Tried:
    """Resolve a recipe at full length, and train it briefly with a few settings changed.

    Raises:
        RefineDetError: it does not resolve, or does not train.
    """
    session = prepare(name, root, runs, settings, resolve_only=False, device=device)
    losses: list[float] = []

    def take(report: Report) -> None:
        if isinstance(report, StepReport):
            losses.append(report.total)

    started = time.perf_counter()
    result = session.run(take, training_session.never)
    seconds = time.perf_counter() - started
    for path in (runs / name).iterdir():
        if path.name != LAST_FILE:  # which another recipe may start from; the rest takes half a gigabyte
            path.unlink()
    full = prepare(name, root, runs, (), resolve_only=True, device=device)
    quarter = max(1, len(losses) // 4)
    return Tried(full, mean(losses[:quarter]), mean(losses[-quarter:]), seconds, result.steps)


def row(name: str, tried: Tried) -> str:
    """Write one row of the table."""
    detector, train = tried.session.preset.detector, tried.session.preset.train
    drops = ", ".join(f"{step // 1000}k" for step in milestone_steps(train, train.steps))
    network = f"{detector.network.backbone}, {detector.preprocess.height} px"
    recipe = f"batch {train.batch}, {train.steps // 1000}k steps, lr {train.lr:g} x {train.gamma:g} at {drops}"
    tried_out = f"{tried.steps} steps: loss {tried.first:6.2f} to {tried.last:6.2f}, {tried.seconds:5.1f} s"
    return f"{name:25}  {network:16}  {len(detector.classes):2} classes  {recipe:52}  {tried_out}"


def main() -> int:
    """Try the recipes that the arguments name, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes without .toml; all by default")
    parser.add_argument("--steps", type=int, default=20, help="length of each run")
    parser.add_argument("--size", type=int, default=64, help="side of the input in pixels; 0 for the recipe's")
    parser.add_argument("--batch", type=int, default=2, help="pictures a step; 0 for the recipe's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu")
    options = parser.parse_args()
    settings = [f"train.steps={options.steps}"]
    settings += [f"preprocess.{side}={options.size}" for side in ("height", "width") if options.size]
    # Every step is wanted in the table, not one in two seconds.
    run_log.REPORT_EVERY_SECONDS = 0.0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        root, runs = Path(folder) / "datasets", Path(folder) / "runs"
        make_stand_ins(root)
        for name in options.names or names_in_order():
            try:
                changed = [*settings, *smaller_batch(name, options.batch)]
                print(row(name, try_recipe(name, root, runs, changed, options.device)), flush=True)
            except RefineDetError as error:
                failed += 1
                print(f"{name:28} failed: {error.message}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

r"""Put a trained detector into weights/: half precision, with a manifest entry made from its own provenance.

Usage: python benchmarks/bundle.py RUN/best.safetensors --dataset mix20-val.json --recipe TEXT --cost TEXT \
           --data-licence TEXT

The file that is scored is the file that is written, by the same evaluation as ``refinedet eval``. Score a validation
set once per shipped file: numbers that were chosen by looking at them are not validation.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from refinedet_cli.core.presets import get_preset
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.evaluate import Evaluation, evaluate
from refinedet_cli.engine.lanes import lanes_for
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.zoo.checkpoint import file_sha256, load_detector, save_checkpoint

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
LARGEST = 16_000_000


def bundle(checkpoint: Path, dataset: str, folder: Path, entry: dict[str, Any]) -> tuple[Path, Evaluation]:
    """Write the half-precision file and its manifest entry into ``folder``, and score it.

    Args:
        checkpoint: a trained detector.
        dataset: what to score it on.
        folder: where the weights and manifest.toml are.
        entry: fields of the manifest that the checkpoint does not know: cost and licences.

    Returns:
        the written file and its evaluation.
    """
    loaded = load_detector(checkpoint)
    name = loaded.config.preset
    path = folder / f"{name}.safetensors"
    # Weights are not made for a post-processing: they go out with what their preset says today.
    today = get_preset(name, loaded.config.classes).detector.postprocess
    config = replace(loaded.config, postprocess=today)
    save_checkpoint(path, config, loaded.detector.network.state_dict(), loaded.provenance, dtype=torch.float16)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    data = open_dataset(dataset, split="val")
    cpu = torch.device("cpu")
    predictor = Predictor(load_detector(path), device=cpu, precision="fp32", lanes=lanes_for(cpu))
    evaluation = evaluate(predictor, data, batch=16, workers=2)
    result = evaluation.result
    described = {
        "file": path.name,
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "licence": "Apache-2.0",
        "classes": list(loaded.config.classes.names),
        "trained_on": loaded.provenance["data"]["name"],
        "trained_on_sha256": loaded.provenance["data"]["sha256"],
        "pictures_seen": loaded.provenance["pictures_seen"],
        "seed": loaded.provenance["seed"],
        "start": json.dumps(loaded.provenance["start"]),
        **entry,
        "scored_on": data.name,
        "scored_on_sha256": data.fingerprint,
        **{k: _rounded(getattr(result, k)) for k in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")},
        "AP50_of_class": {
            c: _rounded(r.AP50) for c, r in zip(evaluation.scored_classes, result.per_class, strict=True)
        },
    }
    file = folder / "manifest.toml"
    manifest = (tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}) | {name: described}
    write_whole(file, "\n".join(_table(n, e) for n, e in manifest.items()))
    return path, evaluation


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _table(name: str, entry: dict[str, Any]) -> str:
    """Write one table as TOML, whose strings, numbers and flat lists are spelled like JSON's."""
    # TOML has no null: what there is no number of is left out.
    plain = {k: v for k, v in entry.items() if not isinstance(v, dict) and v is not None}
    lines = [f"[{name}]", *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items())]
    for key, value in entry.items():
        if isinstance(value, dict):
            rows = [f"{json.dumps(k, ensure_ascii=False)} = {json.dumps(v)}" for k, v in value.items() if v is not None]
            lines += [f"\n[{name}.{key}]", *rows]
    return "\n".join([*lines, ""])


def main() -> None:
    """Bundle the checkpoint that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", required=True, help="what to score the written file on")
    parser.add_argument("--recipe", required=True, help="the commands that trained it")
    parser.add_argument("--cost", required=True, help="pictures, hours and machine of all its training")
    parser.add_argument("--data-licence", required=True, help="terms of the pictures and annotations")
    options = parser.parse_args()
    entry = {"recipe": options.recipe, "cost": options.cost, "data_licence": options.data_licence}
    path, evaluation = bundle(options.checkpoint, options.dataset, WEIGHTS, entry)
    result = evaluation.result
    print(f"{path.name}: AP {result.AP:.4f}, AP50 {result.AP50:.4f} on {options.dataset}")


if __name__ == "__main__":
    main()

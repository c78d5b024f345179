"""Find objects in pictures from Python. Usage: python examples/predict.py street.jpg park.jpg."""

from __future__ import annotations

import sys

from refinedet_cli.api import Detector

if len(sys.argv) < 2:
    sys.exit("usage: python examples/predict.py PICTURE [PICTURE ...]")
detector = Detector.load()  # the bundled one; or a run's folder, or org/repo on the Hugging Face Hub
for found in detector.predict(sys.argv[1:], score=0.3):
    print(f"{found.path}: {len(found)} objects")
    for name, score, (left, top, right, bottom) in zip(found.names, found.scores, found.boxes, strict=True):
        print(f"  {name} {score:.2f} from ({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f})")

"""Train a detector from Python, and use it. Usage: python examples/train.py DATA RUN [NAME=VALUE ...].

For example: python examples/train.py signs runs/signs train.epochs=30
"""

from __future__ import annotations

import json
import logging
import sys

from refinedet_cli.api import Detector, train


def main() -> None:
    """Train on the data of the first argument, into the folder of the second."""
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/train.py DATA RUN [NAME=VALUE ...]")
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what is said of data and start
    data, run, *given = sys.argv[1:]
    settings = {name: json.loads(value) for name, value in (text.split("=", 1) for text in given)}
    result = train(data, run, settings=settings)
    print(f"{result.steps} steps, best AP on the validation data: {result.best or 0:.3f}")
    print("it finds:", ", ".join(Detector.load(run).classes))


if __name__ == "__main__":  # training reads pictures in other processes, which begin by importing this file
    main()

"""Write a few photographs into a folder, for a first try of ``refinedet detect``.

Usage: python examples/demo.py demo/photos

The pictures are those that the installed scikit-image package carries (``pip install scikit-image``); nothing is
fetched.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import skimage.data

PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png")


def write_photographs(folder: Path) -> list[Path]:
    """Copy the photographs into ``folder`` and return where they are, in the order of `PHOTOGRAPHS`."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = Path(skimage.data.__file__).parent
    return [Path(shutil.copyfile(shipped / name, folder / name)) for name in PHOTOGRAPHS]


def main() -> None:
    """Write the photographs where the first argument says."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo.py FOLDER")
    for path in write_photographs(Path(sys.argv[1])):
        print(path)


if __name__ == "__main__":
    main()

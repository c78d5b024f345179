"""Find objects with an exported ONNX file, with onnxruntime and numpy alone.

Usage: python examples/run_onnx.py best.onnx picture.npy

The picture is an array uint8[height, width, 3], RGB, as any decoder gives it; resize, decoding and non-maximum
suppression are inside the file.
"""

import json
import sys

import numpy as np
import onnxruntime


def main(file: str, picture: str, score: float = 0.3) -> None:
    """Print one line for each object: class, score, and left, top, right, bottom in pixels."""
    session = onnxruntime.InferenceSession(file)
    names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    [boxes], [scores], [labels], [count] = session.run(None, {"images": np.load(picture)[None]})
    for box, sure, label in zip(boxes[:count], scores, labels, strict=False):
        if sure >= score:
            print(f"{names[label]} {sure:.2f}", *(f"{edge:.0f}" for edge in box))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/run_onnx.py FILE.onnx PICTURE.npy")
    main(*sys.argv[1:])

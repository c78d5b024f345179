"""The class lists that other projects' weights come with, in the order of their outputs."""

from __future__ import annotations

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import VOC_CLASSES

_COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
# COCO numbers its categories to 90 and leaves these out.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CLASSES = Classes(names=_COCO_NAMES, category_ids=tuple(i for i in range(1, 91) if i not in _UNUSED_IDS))
CLASS_LISTS = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}


def numbered(names: tuple[str, ...]) -> Classes:
    """Give names ids from 1 on."""
    return Classes(names=names, category_ids=tuple(range(1, len(names) + 1)))


def guessed_classes(number: int) -> tuple[Classes, str]:
    """Guess the classes by their number, and say so."""
    for title, classes in (("VOC", VOC_CLASSES), ("COCO", COCO_CLASSES)):
        if len(classes) == number:
            return classes, f"the {number} classes are those of {title}, in its order (by their number)"
    names = tuple(f"class{i}" for i in range(1, number + 1))
    return numbered(names), "the names of the classes are not in the file: --classes gives them"

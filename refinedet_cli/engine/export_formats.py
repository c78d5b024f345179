"""Writers of exported files: ONNX, OpenVINO and torch.export, and the quantiser."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refinedet_cli.core.deployed import Deployed, DeployedNetwork
from refinedet_cli.engine.artefact import CLASSES_KEY, METADATA_KEY, ArtefactInfo, import_onnxruntime, import_openvino

OPSET = 18
# What is quantised, of the network alone; all else stays float32.
_QUANTISED = ("Conv", "ConvTranspose", "Add", "Relu", "Clip", "MaxPool")


def write_onnx(module: Deployed, path: Path, info: ArtefactInfo) -> None:
    """Write a part of a detector as ONNX of standard operators, checked by ONNX itself."""
    import onnx

    example, shapes = _example(module, info)
    with _silent():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[module.input_name],
            output_names=list(module.output_names),
            dynamic_shapes=({**shapes},) if shapes else None,
            custom_translation_table={torch.ops.refinedet.class_nms.default: _onnx_class_nms},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model = program.model_proto
    describe_onnx(model, info)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


def describe_onnx(model: Any, info: ArtefactInfo) -> None:
    """Let an ONNX model say what it is; what it said before is replaced."""
    import onnx

    names = ["background", *info.config.classes.names]
    onnx.helper.set_model_props(model, {METADATA_KEY: info.to_json(), CLASSES_KEY: json.dumps(names)})


def write_torch_export(module: Deployed, path: Path, info: ArtefactInfo) -> None:
    """Write a part of a detector as a torch.export archive, which runs without this package."""
    example, shapes = _example(module, info)
    with _silent():
        program = torch.export.export(module, (example,), dynamic_shapes=(shapes,) if shapes else None, strict=False)
        # Not to the path: on a full disk that ends the whole process.
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={METADATA_KEY: info.to_json()})
    path.write_bytes(archive.getvalue())


def write_openvino(onnx_file: Path, path: Path, info: ArtefactInfo) -> None:
    """Turn an ONNX file into OpenVINO's two: ``path``, an .xml, and the .bin beside it."""
    openvino = import_openvino()
    model = openvino.convert_model(onnx_file)
    model.set_rt_info(info.to_json(), [METADATA_KEY])
    # What is half precision is so in the ONNX file; the rest, anchors among it, has to stay exact.
    openvino.save_model(model, path, compress_to_fp16=False)


def quantise(source: Path, path: Path, pixels: list[np.ndarray[Any, Any]], info: ArtefactInfo) -> None:
    """Quantise the network of a float ONNX file to int8, and leave everything around it as it is.

    Args:
        source: the file.
        path: where the quantised one goes.
        pixels: inputs of the graph, from which the ranges of activations are taken.
        info: of the quantised file.
    """
    import_onnxruntime()  # first, since it keeps what follows quiet
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name(f"{path.name}.prepared.onnx")
    try:
        with _silent():
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            model = onnx.load(prepared)
            network = _between_convolutions(model.graph)
            quantize_static(
                prepared,
                path,
                _Pictures(model.graph.input[0].name, pixels),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_QUANTISED),
                nodes_to_exclude=[node.name for node in model.graph.node if node.name not in network],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
    finally:
        prepared.unlink(missing_ok=True)
    quantised = onnx.load(path)
    describe_onnx(quantised, info)
    onnx.save(quantised, path)


class _Pictures:
    """Calibration data as the quantiser reads it."""

    def __init__(self, name: str, pixels: list[np.ndarray[Any, Any]]) -> None:
        self._inputs = iter([{name: image} for image in pixels])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._inputs, None)


def _between_convolutions(graph: Any) -> set[str]:
    """Name the nodes that lie on a way from one convolution to another, both included."""
    maker = {name: node for node in graph.node for name in node.output}
    after: set[str] = set()
    before: set[str] = set()
    # Nodes of an ONNX graph come in an order in which everything is made before it is used.
    for node in graph.node:
        if _is_convolution(node) or any(name in maker and maker[name].name in after for name in node.input):
            after.add(node.name)
    for node in reversed(graph.node):
        if _is_convolution(node) or node.name in before:
            before.add(node.name)
            before.update(maker[name].name for name in node.input if name in maker)
    return after & before


def _is_convolution(node: Any) -> bool:
    return node.op_type in ("Conv", "ConvTranspose")


def _example(module: Deployed, info: ArtefactInfo) -> tuple[Tensor, dict[int, Any]]:
    """Make an input to trace with, and name its dimensions that may vary."""
    # Dimensions of 1 would be taken for constants.
    batch = info.batch or 2
    shapes: dict[int, Any] = {} if info.batch else {0: torch.export.Dim("batch", min=1, max=4096)}
    if isinstance(module, DeployedNetwork):
        size = info.config.preprocess
        return torch.zeros(batch, 3, size.height, size.width), shapes
    shapes |= {1: torch.export.Dim("height", min=1, max=65_535), 2: torch.export.Dim("width", min=1, max=65_535)}
    return torch.zeros(batch, 375, 500, 3, dtype=torch.uint8), shapes


def _onnx_class_nms(boxes: Any, scores: Any, nms_iou: float) -> Any:
    """Put ONNX's own NMS in the place of `class_nms`, as a mask over the candidates."""
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18

    def filled(shape: Any, value: bool) -> Any:
        return op.ConstantOfShape(shape, value=onnx.helper.make_tensor("value", onnx.TensorProto.BOOL, [1], [value]))

    # Engines differ in whether an overlap of exactly the threshold suppresses; one step further up none can.
    above = float(np.nextafter(np.float32(nms_iou), np.float32(2)))
    most = op.Constant(value_ints=[np.iinfo(np.int32).max])
    chosen = op.NonMaxSuppression(boxes, scores, most, op.Constant(value_float=above), op.Constant(value_float=0.0))
    places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # (row, candidate), without the class
    kept = filled(op.Shape(chosen, start=0, end=1), value=True)
    return op.ScatterND(filled(op.Shape(boxes, start=0, end=2), value=False), places, kept)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep the remarks of exporters, which are for their developers, off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

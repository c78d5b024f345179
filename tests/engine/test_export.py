"""Exported files: what they find, what they say of themselves, and what the proof makes of damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.deployed import DeployedDetector, keep_in_loop
from refinedet_cli.core.presets import caffe_postprocess, tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.images import FoundImage
from refinedet_cli.engine import artefact, proof, sidecar
from refinedet_cli.engine import export as exporting
from refinedet_cli.engine.artefact import SUFFIXES, ArtefactInfo, ArtefactPredictor, is_artefact, open_artefact
from refinedet_cli.engine.export import ExportOptions, ExportResult, export, odd_pictures, prove
from refinedet_cli.engine.export_formats import describe_onnx, quantise, write_openvino, write_torch_export
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.proof import TOLERANCES
from refinedet_cli.engine.sidecar import GoldenPictures, Picture, check, prove_golden, read_sidecar
from refinedet_cli.errors import CheckpointError, ConfigError, DeviceError, GateError, UsageError
from refinedet_cli.zoo.checkpoint import EXPORTED_SUFFIXES, file_sha256, load_detector, save_checkpoint

CPU = torch.device("cpu")
CLASSES = Classes(names=("person", "cat", "dog", "car", "tvmonitor"), category_ids=(1, 17, 18, 3, 72))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = [
    noise(64, 64),
    noise(50, 75, seed=1),
    noise(1, 1, seed=2),
    noise(3, 8000, seed=3),
    np.repeat(noise(90, 40, seed=4)[..., :1], 3, axis=2),
    noise(50, 75, seed=5),
    noise(301, 203, seed=6),
    np.full((40, 40, 3), 128, np.uint8),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_spread) -> Path:
    path = save_spread(tmp_path_factory.mktemp("weights") / "tiny.safetensors", tiny(CLASSES).detector)
    loaded = load_detector(path)
    save_checkpoint(path, loaded.config, loaded.detector.network.state_dict(), {"seed": 7, "note": "für Test"})
    return path


@pytest.fixture(scope="module")
def predictor(weights) -> Predictor:
    return Predictor(load_detector(weights), device=CPU, precision="fp32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[FoundImage]:
    folder = tmp_path_factory.mktemp("photos")
    found = []
    for i, size in enumerate(((60, 80), (97, 41), (200, 150), (400, 310))):
        Image.fromarray(noise(*size, seed=i)).save(folder / f"{i}.png")
        found.append(FoundImage(folder / f"{i}.png", f"{i}.png"))
    return found


@pytest.fixture(scope="module")
def exported(weights, photos, tmp_path_factory) -> ExportResult:
    """The whole detector as ONNX, for any number of pictures."""
    out = tmp_path_factory.mktemp("onnx") / "deep" / "out"
    return export(weights, out, ExportOptions(batch=None, pictures=photos))


@pytest.fixture(scope="module")
def onnx_file(exported) -> Path:
    return exported.files[0]


@pytest.fixture(scope="module")
def openvino_file(exported, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "tiny.xml"
    write_openvino(exported.files[0], path, replace(exported.info, format="openvino"))
    return path


@pytest.fixture(scope="module")
def torch_file(weights, exported, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "tiny.pt2"
    module = DeployedDetector(load_detector(weights).detector, keep_in_loop)
    write_torch_export(module, path, replace(exported.info, format="torch-export"))
    return path


@pytest.fixture
def premade(monkeypatch, onnx_file) -> None:
    """Let an export take a file that was written before, since writing takes seconds."""
    monkeypatch.setattr(exporting, "write_onnx", lambda module, path, info: shutil.copy(onnx_file, path))


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    """The exported file in a folder of its own, with its sidecar."""
    for path in exported.files:
        shutil.copy(path, tmp_path)
    return tmp_path / exported.files[0].name


@pytest.fixture(scope="module")
def opened() -> Callable[[Path], ArtefactPredictor]:
    """Open an exported file; what was opened before stays open."""
    return lru_cache(lambda path: ArtefactPredictor(open_artefact(path, trusted=True), CPU))


@pytest.fixture(scope="module")
def expected(predictor) -> list[Detections]:
    """What the checkpoint finds in `PICTURES`, each on its own."""
    return [predictor.predict([image])[0] for image in PICTURES]


def assert_agree(reference: list[Detections], found: list[Detections], precision: str = "fp32") -> None:
    tolerance = TOLERANCES[precision]
    names = [f"picture {i}" for i in range(len(reference))]
    seen = proof.compare(zip(names, reference, found, strict=True), tolerance)
    assert proof.judge(seen, None, tolerance).failures == ()


# --- what is found


@pytest.mark.parametrize("kind", ["onnx_file", "openvino_file", "torch_file"])
def test_every_format_finds_what_the_checkpoint_finds(kind, opened, expected, request):
    candidate = opened(request.getfixturevalue(kind))
    together = candidate.predict(PICTURES)  # of several sizes, two of them alike
    assert len(together) == len(PICTURES)
    for image, found, right in zip(PICTURES, together, expected, strict=True):
        assert len(right.above(0.05)) >= 10
        assert_agree([right], [found])
        assert found.boxes.dtype == found.scores.dtype == torch.float32
        assert found.labels.dtype == torch.int64
        height, width = image.shape[:2]
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()


def test_what_is_found_is_writable_and_refused_as_a_checkpoint_refuses(onnx_file, opened):
    candidate = opened(onnx_file)
    assert candidate.predict([]) == []
    mirrored = PICTURES[1][:, ::-1]
    found = candidate.predict([mirrored])[0]
    found.boxes.mul_(2)
    with pytest.raises(ValueError, match=r"picture 1: .*repeat the grey channel"):
        candidate.predict([PICTURES[0], PICTURES[0][..., 0]])


def test_a_predictor_says_what_its_checkpoint_said(onnx_file, predictor, opened):
    candidate = opened(onnx_file)
    assert candidate.config == predictor.config
    assert candidate.classes == CLASSES
    assert candidate.provenance == predictor.provenance == {"seed": 7, "note": "für Test"}
    assert (candidate.path, candidate.precision, candidate.schedule) == (onnx_file, "fp32", None)
    assert candidate.engine.startswith("onnxruntime 1.")
    assert candidate.device == CPU


@pytest.mark.parametrize("kind", ["onnx_file", "openvino_file"])
def test_threads_get_what_was_found_in_their_own_picture(kind, opened, expected, request):
    candidate = opened(request.getfixturevalue(kind))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: candidate.predict([image])[0], PICTURES * 4))
    assert_agree(expected * 4, found)


def test_openvino_prepares_anew_after_many_sizes(openvino_file, monkeypatch):
    compiled = []
    core = artefact.openvino_core()
    monkeypatch.setattr(artefact._Compiled, "_MOST_SIZES", 3)
    monkeypatch.setattr(
        artefact, "openvino_core",
        lambda: SimpleNamespace(
            read_model=core.read_model,
            compile_model=lambda *given: compiled.append(1) or core.compile_model(*given),
        ),
    )  # fmt: skip
    candidate = ArtefactPredictor(open_artefact(openvino_file), CPU)
    sizes = [(40 + 8 * (i % 7), 48) for i in range(9)]
    first = [candidate.predict([noise(*size, seed=1)])[0] for size in sizes]
    assert len(compiled) == 3  # at the first, fourth and seventh size
    assert_agree(first[:2], first[7:])


def test_engines_are_named(openvino_file, torch_file, opened):
    assert opened(openvino_file).engine.startswith("OpenVINO 20")
    assert opened(torch_file).engine == f"torch.export {torch.__version__}"


def test_a_bare_half_precision_network_of_fixed_batch(weights, expected, photos, tmp_path, opened):
    options = ExportOptions("openvino", precision="fp16", content="network", batch=2, pictures=photos)
    result = export(weights, tmp_path, options)
    assert result.proof.holds
    assert [path.name for path in result.files] == [
        "tiny-network-fp16.xml",
        "tiny-network-fp16.bin",
        "tiny-network-fp16.xml.json",
    ]
    assert result.files[1].stat().st_size < 0.6 * weights.stat().st_size
    candidate = opened(result.files[0])
    assert (candidate.precision, candidate.artefact.info.batch) == ("fp16", 2)
    chosen = (0, 4, 6)  # of mixed sizes, and one place of the second batch is filled up
    assert_agree([expected[i] for i in chosen], candidate.predict([PICTURES[i] for i in chosen]), "fp16")
    assert not check(result.files[0]).proof.failures

    result.files[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tiny-network-fp16\.bin: there is no such file"):
        check(result.files[0])
    with pytest.raises(CheckpointError, match="not a readable OpenVINO file"):
        open_artefact(result.files[0])


def test_candidates_of_each_class(weights, photos, tmp_path, opened):
    options = ExportOptions(content="candidates", postprocess=caffe_postprocess(), pictures=photos[:1])
    result = export(weights, tmp_path, options)
    assert result.proof.holds
    assert result.files[0].name == "tiny-candidates.onnx"
    candidate = opened(result.files[0])
    assert candidate.config.postprocess == caffe_postprocess()
    boxes, scores = candidate.artefact.run(PICTURES[1][None])
    assert boxes.shape == (1, 5 * 255, 4)  # fewer anchors than the 1000 that are asked for
    assert scores.shape == (1, 5 * 255, 5)
    loaded = exporting.with_postprocess(load_detector(weights), caffe_postprocess())
    reference = Predictor(loaded, device=CPU, precision="fp32")
    for image in PICTURES[:4]:
        assert_agree(reference.predict([image]), candidate.predict([image]))


# --- int8


@pytest.fixture(scope="module")
def int8_file(exported, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "tiny-int8.onnx"
    pixels = [noise(80, 60, seed=seed)[None] for seed in range(4)]
    quantise(exported.files[0], path, pixels, replace(exported.info, precision="int8"))
    return path


def test_int8_is_small_and_finds_about_the_same(int8_file, onnx_file, expected, opened):
    assert int8_file.stat().st_size < 0.35 * onnx_file.stat().st_size
    assert [p.name for p in int8_file.parent.iterdir()] == [int8_file.name]
    candidate = opened(int8_file)
    assert candidate.precision == "int8"
    pairs = zip("abcdefgh", expected, candidate.predict(PICTURES), strict=True)
    seen = proof.compare(pairs, TOLERANCES["int8"])
    assert seen.boxes > 100
    assert seen.unmatched_share < 0.25
    assert seen.score_shift > 1e-3  # it is not the float network


def test_only_the_network_is_quantised(int8_file):
    graph = onnx.load(int8_file).graph
    maker = {name: node for node in graph.node for name in node.output}

    def made_from(names: list[str]) -> set[str]:
        """Kinds of everything that takes part in making these."""
        seen: dict[str, str] = {}
        waiting = [maker[name] for name in names if name in maker]
        while waiting:
            node = waiting.pop()
            if node.name not in seen:
                seen[node.name] = node.op_type
                waiting += [maker[name] for name in node.input if name in maker]
        return set(seen.values())

    first = next(node for node in graph.node if node.op_type == "Conv")
    entering = maker[maker[first.input[0]].input[0]]  # what is quantised to enter the first convolution
    assert entering.op_type == "QuantizeLinear"
    assert made_from([entering.input[0]]).isdisjoint({"QuantizeLinear", "DequantizeLinear", "Conv"})
    assert all(
        maker[node.input[0]].op_type == "DequantizeLinear"
        for node in graph.node
        if node.op_type in ("Conv", "ConvTranspose")
    )
    last = max(i for i, node in enumerate(graph.node) if node.op_type == "Conv")
    tail = [node.op_type for node in graph.node[last + 1 :]]
    assert {"Softmax", "TopK", "NonMaxSuppression"} <= set(tail)
    # Behind a convolution its own output may be quantised, and nothing else.
    for node in graph.node[last + 1 :]:
        if node.op_type == "QuantizeLinear":
            assert maker[node.input[0]].op_type in ("Conv", "Add", "Relu", "Clip")


@pytest.mark.usefixtures("premade")
def test_int8_goes_the_whole_way(weights, photos, tmp_path, monkeypatch, opened):
    loose = TOLERANCES["int8"]._replace(unmatched=1.0)
    monkeypatch.setitem(TOLERANCES, "int8", loose)
    result = export(
        weights, tmp_path, ExportOptions(precision="int8", batch=None, calibration=photos[:2], pictures=photos[:1])
    )
    assert [path.name for path in result.files] == ["tiny-int8.onnx", "tiny-int8.onnx.json"]
    assert opened(result.files[0]).precision == "int8"
    assert result.proof.agreement.pictures == 1 + len(odd_pictures())


# --- what a file says of itself


def test_the_whole_description_survives(onnx_file, openvino_file, torch_file, exported, weights, opened):
    info = exported.info
    assert ArtefactInfo.from_json(info.to_json(), onnx_file) == info
    for path, kind in ((onnx_file, "onnx"), (openvino_file, "openvino"), (torch_file, "torch-export")):
        assert opened(path).artefact.info == replace(info, format=kind)
        assert is_artefact(path)
    assert not is_artefact(weights)
    assert (info.weights, info.sha256) == ("tiny.safetensors", file_sha256(weights))
    assert info.made_with.keys() == {"refinedet", "python", "torch", "onnx", "onnxruntime"}
    entries = {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props}
    assert json.loads(entries["classes"]) == ["background", *CLASSES.names]


def test_the_file_holds_standard_operators_alone(onnx_file):
    model = onnx.load(onnx_file)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.name for entry in model.graph.output] == ["boxes", "scores", "labels", "counts"]
    assert not model.functions


def described(info: ArtefactInfo, **changed: object) -> str:
    return json.dumps({**json.loads(info.to_json()), **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": 2}, "newer version"),
        ({"version": "1"}, "damaged"),
        ({"content": "everything"}, "damaged"),
        ({"precision": "fp4"}, "damaged"),
        ({"format": "caffe"}, "damaged"),
        ({"batch": "two"}, "damaged"),
        ({"batch": 0}, "damaged"),
        ({"made_with": []}, "damaged"),
        ({"provenance": [1]}, "damaged"),
        ({"config": {"family": "refinedet"}}, "damaged"),
        ({"config": []}, "damaged"),
        ({"colour": "red"}, "damaged"),
    ],
    ids=str,
)
def test_a_damaged_description_is_told(exported, changed, words, tmp_path):
    with pytest.raises(CheckpointError, match=words) as raised:
        ArtefactInfo.from_json(described(exported.info, **changed), tmp_path / "x.onnx")
    assert "x.onnx" in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"refinedet"', "{}", "[" * 100_000])
def test_a_description_that_is_none(text):
    with pytest.raises(CheckpointError, match="damaged"):
        ArtefactInfo.from_json(text, Path("x.onnx"))


def small_model(*inputs: str) -> onnx.ModelProto:
    """A file of somebody else that adds numbers."""
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in (*inputs, "sum")]
    node = onnx.helper.make_node("Sum", list(inputs), ["sum"])
    graph = onnx.helper.make_graph([node], "sum", value[:-1], value[-1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("inputs", [("a",), ("a", "b")], ids=len)
def test_foreign_files_are_refused(tmp_path, inputs, exported):
    onnx.save(small_model(*inputs), tmp_path / "sum.onnx")
    with pytest.raises(CheckpointError, match=r"sum\.onnx: not a file that `refinedet export` wrote"):
        open_artefact(tmp_path / "sum.onnx")
    openvino = artefact.import_openvino()
    openvino.save_model(openvino.convert_model(tmp_path / "sum.onnx"), tmp_path / "sum.xml")
    with pytest.raises(CheckpointError, match=r"sum\.xml: not a file that `refinedet export` wrote"):
        open_artefact(tmp_path / "sum.xml")


@pytest.mark.parametrize("kind", ["onnx_file", "openvino_file", "torch_file"])
@pytest.mark.parametrize("size", [0, 1000, 0.5], ids=str)
def test_truncated_files_are_told(kind, size, request, tmp_path):
    source = request.getfixturevalue(kind)
    path = tmp_path / source.name
    content = source.read_bytes()
    path.write_bytes(content[: size if isinstance(size, int) else int(len(content) * size)])
    if path.suffix == ".xml":
        shutil.copy(source.with_suffix(".bin"), tmp_path)
    with pytest.raises(CheckpointError, match=path.name):
        open_artefact(path, trusted=True)


def test_missing_files_and_parts(tmp_path, openvino_file):
    with pytest.raises(CheckpointError, match="there is no such file"):
        open_artefact(tmp_path / "none.onnx")
    shutil.copy(openvino_file, tmp_path)
    with pytest.raises(CheckpointError, match="not a readable OpenVINO file"):
        open_artefact(tmp_path / openvino_file.name)
    shutil.copy(openvino_file.with_suffix(".bin"), tmp_path)
    whole = (tmp_path / "tiny.bin").read_bytes()
    (tmp_path / "tiny.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable OpenVINO file"):
        open_artefact(tmp_path / openvino_file.name)


def test_what_can_run_code_has_to_be_trusted(torch_file):
    with pytest.raises(UsageError, match="can run code") as raised:
        open_artefact(torch_file)
    assert "--trust" in str(raised.value.hint)


@pytest.mark.parametrize(("kind", "name"), [("onnx_file", "onnxruntime"), ("openvino_file", "openvino")])
def test_a_missing_library_is_told_with_the_cure(kind, name, request, monkeypatch):
    path = request.getfixturevalue(kind)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"^{name} is needed") as raised:
        open_artefact(path)
    assert raised.value.hint == 'pip install "refinedet[export]"'


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("onnx", ExportOptions()),
        ("onnxruntime", ExportOptions()),
        ("onnxscript", ExportOptions()),
        ("openvino", ExportOptions("openvino")),
    ],
)
def test_a_missing_library_stops_an_export_before_it_writes(name, options, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"^{name} is needed") as raised:
        export(weights, tmp_path / "out", options)
    assert raised.value.hint == 'pip install "refinedet[export]"'
    assert not list(tmp_path.rglob("*.onnx"))


def test_devices_that_are_not_there(onnx_file, openvino_file, torch_file):
    for path, device in ((onnx_file, "mps"), (openvino_file, "cuda"), (torch_file, "cuda")):
        with pytest.raises(DeviceError, match=path.name):
            open_artefact(path, device=torch.device(device), trusted=True)


# --- options that cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "--calibrate"),
        ({"precision": "int8", "format": "torch-export"}, "torch-export"),
        ({"precision": "fp16", "calibration": [None]}, "int8"),
    ],
)
def test_options_that_do_not_go_together(weights, tmp_path, options, words):
    with pytest.raises(UsageError) as raised:
        export(weights, tmp_path / "out", ExportOptions(**options))
    assert words in f"{raised.value.message} {raised.value.hint}"
    assert not (tmp_path / "out").exists()


def test_soft_nms_is_refused_with_the_way_out(weights, tmp_path):
    loaded = load_detector(weights)
    soft = replace(loaded.config, postprocess=replace(loaded.config.postprocess, soft_nms_iou=0.3))
    save_checkpoint(tmp_path / "soft.safetensors", soft, loaded.detector.network.state_dict(), {})
    with pytest.raises(ConfigError, match="soft-NMS") as raised:
        export(tmp_path / "soft.safetensors", tmp_path / "out", ExportOptions())
    assert "--postprocess paper" in str(raised.value.hint)
    assert not (tmp_path / "out").exists()


# --- the folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_leaves_the_file_and_its_sidecar(exported):
    assert exported.proof.holds
    assert exported.proof.agreement.pictures == 4 + len(odd_pictures())
    assert exported.proof.agreement.boxes > 500
    assert exported.golden == 3
    assert [path.name for path in exported.files] == ["tiny.onnx", "tiny.onnx.json"]
    assert names_in(exported.files[0].parent) == ["tiny.onnx", "tiny.onnx.json"]


def first_heads(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(entry for entry in model.graph.initializer if "odm.levels.0.weight" in entry.name)


def change_one_weight(model: onnx.ModelProto) -> None:
    entry = first_heads(model)
    values = onnx.numpy_helper.to_array(entry).copy()
    values[1, 3, 1, 1] += 0.5 * float(np.abs(values).max())
    entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))


def change_constant(shape: list[int], value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        [entry] = [
            entry
            for entry in model.graph.initializer
            if list(entry.dims) == shape and (onnx.numpy_helper.to_array(entry) == 127.5).all()
        ]
        values = np.full(shape, value, np.float32)
        entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))

    return change


def swap_channels(model: onnx.ModelProto) -> None:
    """Let the file take its pictures for BGR."""
    source = model.graph.input[0].name
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == source and node.op_type != "Shape":
                node.input[i] = "swapped"
    order = onnx.numpy_helper.from_array(np.array([2, 1, 0], np.int64), "swapped_order")
    model.graph.initializer.append(order)
    model.graph.node.insert(0, onnx.helper.make_node("Gather", [source, order.name], ["swapped"], axis=3))


DAMAGES = {
    "one weight": change_one_weight,
    "no mean": change_constant([3], 0.0),
    "no deviation": change_constant([3, 1, 1], 1.0),
    "channel order": swap_channels,
}


@pytest.fixture(scope="module")
def damaged(onnx_file, tmp_path_factory) -> Callable[[str], Path]:
    """A copy of the file with one of `DAMAGES`, whose description is unchanged."""
    folder = tmp_path_factory.mktemp("damaged")

    def make(name: str) -> Path:
        path = folder / f"{name}.onnx"
        if not path.exists():
            model = onnx.load(onnx_file)
            DAMAGES[name](model)
            onnx.save(model, path)
        return path

    return make


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_proof_catches_damage(damage, damaged, predictor, onnx_file, opened):
    candidate = opened(damaged(damage))
    assert candidate.artefact.info == opened(onnx_file).artefact.info
    pictures = [Picture(str(i), image) for i, image in enumerate(PICTURES[:3])]
    assert prove(predictor, opened(onnx_file), pictures).holds
    assert not prove(predictor, candidate, pictures).holds


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_kept_pictures_catch_damage_without_the_hash(damage, damaged, onnx_file, opened):
    kept = read_sidecar(onnx_file).golden
    assert prove_golden(opened(onnx_file).artefact, kept).holds
    harmed = opened(damaged(damage)).artefact
    assert not prove_golden(harmed, kept).holds
    assert not prove_golden(harmed, kept[-1:]).holds  # any one of them does


@pytest.mark.parametrize("damage", ["one weight", "channel order"])
def test_an_export_that_fails_its_proof_leaves_nothing(damage, damaged, weights, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write_onnx", lambda module, path, info: shutil.copy(damaged(damage), path))
    (tmp_path / "tiny.onnx").write_text("old")
    (tmp_path / "tiny.onnx.json").write_text("old too")
    result = export(weights, tmp_path, ExportOptions(batch=None, pictures=photos[:1]))
    assert not result.proof.holds
    assert (result.files, result.golden) == ((), 0)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "tiny.onnx": "old",
        "tiny.onnx.json": "old too",
    }


def test_an_export_that_breaks_off_leaves_nothing(weights, tmp_path, monkeypatch):
    def broken(module: object, path: Path, info: object) -> None:
        path.write_text("half")
        raise RuntimeError("no program")

    monkeypatch.setattr(exporting, "write_onnx", broken)
    with pytest.raises(RuntimeError, match="no program"):
        export(weights, tmp_path, ExportOptions())
    assert names_in(tmp_path) == []
    # A folder that was made for it goes too; one that was there stays.
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError, match="no program"):
        export(weights, tmp_path / "mine" / "new" / "out", ExportOptions())
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.usefixtures("premade")
def test_an_export_replaces_an_old_file_and_tells_how_far_it_is(weights, photos, tmp_path):
    (tmp_path / "tiny.onnx").write_text("old")
    stages = []
    result = export(weights, tmp_path, ExportOptions(batch=None, pictures=photos[:2]), stages.append)
    assert [(stage.name, stage.done) for stage in stages] == [("writing", 0), ("proving", 1), ("proving", 2)]
    assert result.files == (tmp_path / "tiny.onnx", tmp_path / "tiny.onnx.json")
    assert names_in(tmp_path) == ["tiny.onnx", "tiny.onnx.json"]
    assert check(result.files[0]).proof.holds


# --- the sidecar


def test_a_copied_file_is_proven_again(copied, exported):
    result = check(copied)
    assert result.proof.holds
    assert result.proof.agreement.pictures == 3
    assert result.proof.agreement.boxes > 200
    assert result.info == exported.info
    assert result.made_with == ()
    assert result.engine.startswith("onnxruntime")


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=str)
def test_a_changed_byte_is_told(copied, place):
    content = bytearray(copied.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    copied.write_bytes(content)
    with pytest.raises(GateError, match="not the file that was proven"):
        check(copied)


def test_a_missing_sidecar_is_told(copied):
    copied.with_name("tiny.onnx.json").unlink()
    with pytest.raises(CheckpointError, match=r"tiny\.onnx\.json: there is no such file"):
        check(copied)


def test_a_missing_file_is_told(copied):
    copied.unlink()
    with pytest.raises(CheckpointError, match=r"tiny\.onnx: there is no such file"):
        check(copied)


def edited(sidecar: Path, **changed: object) -> None:
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changed}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"files": {}}', '"files golden"', "[" * 100_000])
def test_a_damaged_sidecar_is_told(copied, text):
    copied.with_name("tiny.onnx.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        check(copied)


@pytest.mark.parametrize(
    "changed",
    [
        {"files": []},
        {"files": {"../tiny.onnx": {"sha256": "0"}}},
        {"files": {"tiny.onnx": {}}},
        {"golden": [{}]},
        {"golden": {"a": 1}},
        {"golden": [{"name": "a", "png": "????", "boxes": [], "scores": [], "labels": []}]},
    ],
    ids=str,
)
def test_a_sidecar_of_another_shape_is_told(copied, changed):
    edited(copied.with_name("tiny.onnx.json"), **changed)
    with pytest.raises(CheckpointError, match="damaged"):
        check(copied)


def test_without_kept_pictures_nothing_is_proven(copied):
    edited(copied.with_name("tiny.onnx.json"), golden=[])
    result = check(copied)
    assert not result.proof.holds
    assert "nothing was proven" in result.proof.failures[0]


def test_the_suffixes_of_exported_files_are_known_to_the_checkpoint():
    assert set(SUFFIXES.values()) == set(EXPORTED_SUFFIXES)


def test_other_versions_are_told(copied, exported, monkeypatch):
    then = exported.info.made_with
    monkeypatch.setattr(sidecar, "versions", lambda kind: {**then, "torch": "9.9", "new": "1"})
    assert check(copied).made_with == (("torch", then["torch"], "9.9"),)


def test_kept_pictures_are_those_with_most_objects_and_small(onnx_file):
    kept = read_sidecar(onnx_file).golden
    assert len(kept) == 3
    assert all(max(picture.pixels.shape) <= 320 for picture in kept)
    assert all(len(picture.found) > 50 for picture in kept)


def some(count: int, score: float = 0.9) -> Detections:
    return Detections(torch.zeros(count, 4), torch.full((count,), score), torch.ones(count, dtype=torch.int64))


def test_the_choice_of_pictures_to_keep():
    golden = GoldenPictures(above=0.5)
    read = []

    def picture(name: str) -> Callable[[], np.ndarray]:
        return lambda: read.append(name) or noise(641, 1280)

    for name, found in (
        ("two", some(2)),
        ("none", some(0)),
        ("unsure", some(50, score=0.4)),
        ("five", some(5)),
        ("one", some(1)),
        ("another one", some(1)),
        ("three", some(3)),
        ("another two", some(2)),
    ):
        golden.consider(name, picture(name), found)
    assert [kept.name for kept in golden.pictures] == ["five", "three", "two"]
    assert read == ["two", "five", "one", "three"]
    assert {kept.pixels.shape for kept in golden.pictures} == {(160, 320, 3)}
    assert {kept.pixels.dtype for kept in golden.pictures} == {np.dtype(np.uint8)}


def test_small_pictures_are_kept_as_they_are():
    golden = GoldenPictures(above=0.5)
    golden.consider("small", lambda: PICTURES[1], some(1))
    np.testing.assert_array_equal(golden.pictures[0].pixels, PICTURES[1])


# --- nothing leaves the machine

QUIET = """
import os, socket, sys

def refuse(*args, **kwargs):
    sys.stderr.write(f"a connection was tried: {args[1:]}")
    sys.stderr.flush()
    os._exit(9)

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from dataclasses import replace
from pathlib import Path
import numpy as np
from refinedet_cli.engine.artefact import open_artefact
from refinedet_cli.engine.export_formats import write_openvino

source, target = Path(sys.argv[1]), Path(sys.argv[2])
info = open_artefact(source).info
write_openvino(source, target, replace(info, format="openvino"))
found = open_artefact(target).run(np.zeros((1, 8, 8, 3), np.uint8))
assert len(found) == 4
"""


def test_engines_open_no_connection_and_write_nowhere_else(onnx_file, tmp_path):
    home, current, out, scratch = (tmp_path / name for name in ("home", "current", "out", "scratch"))
    for folder in (home, current, out, scratch):
        folder.mkdir()
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, onnx_file, out / "tiny.xml"],
        cwd=current,
        env={**environment, "HOME": str(home), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert names_in(out) == ["tiny.bin", "tiny.xml"]
    assert names_in(home) == []
    assert names_in(current) == []
    # torch makes an empty folder for its compiler.
    assert [path for path in scratch.rglob("*") if path.is_file()] == []


SIGNALLED = """
import signal
import sys
from pathlib import Path
from refinedet_cli.engine.artefact import open_artefact

first, second = (open_artefact(Path(sys.argv[1])) for _ in range(2))
del first
del second
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_are_handled_after_several_files_came_and_went(openvino_file):
    command = [sys.executable, "-c", SIGNALLED, openvino_file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n", "")


def test_a_description_replaces_the_old_one(exported):
    model = small_model("a")
    for precision in ("fp32", "int8"):
        describe_onnx(model, replace(exported.info, precision=precision))
    entries = [entry for entry in model.metadata_props if entry.key == "refinedet"]
    assert [json.loads(entry.value)["precision"] for entry in entries] == ["int8"]


@pytest.mark.parametrize(("count", "first", "last"), [(1, 0, 0), (128, 0, 127), (200, 0, 199), (1000, 0, 999)])
def test_calibration_pictures_are_spread_over_all(monkeypatch, exported, count, first, last):
    seen: list[int] = []
    monkeypatch.setattr(exporting, "read_image", lambda path: seen.append(int(path.stem)) or PICTURES[0])
    given = [FoundImage(Path(f"{i}.png"), f"{i}.png") for i in range(count)]
    inputs = exporting._calibration(ExportOptions(calibration=given), exported.info)
    assert len(inputs) == len(set(seen)) == min(count, 128)
    assert (seen[0], seen[-1]) == (first, last)

"""What all tests share: tolerances, the command line, drawn and sample data, and a closed door to the network."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.layers import AnchorHead
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.zoo.checkpoint import save_checkpoint

# Cases are the same in every run, and a busy machine fails none.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent

# rtol and atol of torch.testing.assert_close, for values of order one that went through a whole network.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


class Finished(NamedTuple):
    """How a call of the command line ended."""

    code: int
    stdout: str
    stderr: str

    def document(self) -> Any:
        """Read what a call with --json printed; it must have ended well."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)


class NetworkError(AssertionError):
    """A test tried to leave this machine."""


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Run a script of this repository as a module, by its path in it; each call gives a fresh one."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_script", ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tolerance() -> Callable[[torch.dtype], dict[str, float]]:
    """The one table of tolerances: ``assert_close(a, b, **tolerance(torch.float32))``."""
    return TOLERANCES.__getitem__


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The networks of the tests are so small that threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Call the command line in this process: ``code, stdout, stderr = run("detect", folder, "--json")``."""

    def call(*args: object) -> Finished:
        from refinedet_cli.cli.app import main

        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures beside the repository; they are not part of it, so a test that wants them may have to skip."""
    folder = Path(os.environ.get("REFINEDET_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set REFINEDET_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def draw_squares() -> Callable[..., dict[str, Any]]:
    """Draw squares on dark noise, picture by picture, and describe them as a COCO document, which is not written.

    ``draw_squares(folder, [[3], [3, 4]], {3: ("red", (200, 30, 30)), 4: ...})`` leaves 0.png and 1.png; ``limits`` are
    the lowest left, top and side of a square and the bounds that they stay below, px.
    """

    def draw(
        folder: Path,
        labels: Sequence[Sequence[int]],
        categories: Mapping[int, tuple[str, tuple[int, int, int]]],
        *,
        seed: int,
        size: tuple[int, int] = (64, 64),
        limits: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 14), (30, 30, 30)),
    ) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        width, height = size
        images, annotations = [], []
        for i, of_picture in enumerate(labels):
            pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
            for label in of_picture:
                left, top, side = (int(v) for v in generator.integers(*limits))
                pixels[top : top + side, left : left + side] = categories[label][1]
                box = {"bbox": [left, top, side, side], "area": side * side, "iscrowd": 0}
                annotations.append({"id": len(annotations), "image_id": i, "category_id": label, **box})
            Image.fromarray(pixels).save(folder / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        named = [{"id": label, "name": name} for label, (name, _) in categories.items()]
        return {"images": images, "annotations": annotations, "categories": named}

    return draw


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    """Describe a picture, which need not be there, and its objects: ``make_record(path, boxes, [1, 2], crowd=...)``.

    Unless told otherwise it has 64 x 64 px and image id 0, its objects are of class 1 with the areas of their boxes
    and ids from 0, and none is a crowd or difficult.
    """

    def make(path: Path, boxes: Any, labels: Sequence[int] | None = None, **changes: Any) -> Record:
        table = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        count = len(table)
        made = Record(
            image_id=0,
            path=path,
            width=64,
            height=64,
            boxes=table,
            labels=np.ones(count, np.int64) if labels is None else np.array(labels, dtype=np.int64),
            areas=(table[:, 2:] - table[:, :2]).prod(axis=1),
            crowd=np.zeros(count, bool),
            difficult=np.zeros(count, bool),
            annotation_ids=np.arange(count),
            file_name=path.name,
        )
        return replace(made, **changes)

    return make


@pytest.fixture(scope="session")
def dataset_of(make_record: Callable[..., Record]) -> Callable[..., Dataset]:
    """Make a data set of pictures that are not there, one for each list of labels: ``dataset_of([[1, 2], [1], []])``.

    Every object fills the upper left quarter; ``crowds`` names (picture, place) pairs.
    """

    def make(
        labels: Sequence[Sequence[int]],
        *,
        crowds: Collection[tuple[int, int]] = (),
        names: Sequence[str] = ("a", "b", "c"),
        size: tuple[int, int] = (64, 64),
    ) -> Dataset:
        width, height = size
        records = [
            make_record(
                Path(f"{i}.png"),
                [[0, 0, width / 2, height / 2]] * len(own),
                own,
                crowd=np.array([(i, place) in crowds for place in range(len(own))], dtype=bool),
                image_id=i,
                width=width,
                height=height,
            )
            for i, own in enumerate(labels)
        ]
        classes = Classes(names=tuple(names), category_ids=tuple(range(1, len(names) + 1)))
        return Dataset("made up", classes, tuple(records))

    return make


@pytest.fixture(scope="session")
def save_random() -> Callable[[Path, DetectorConfig], Path]:
    """Save a seeded random detector whose scores differ from box to box, so that it finds something everywhere."""

    def save(path: Path, config: DetectorConfig) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build(config).network
            for name, parameter in network.named_parameters():
                if name.startswith(("arm", "odm", "head")):
                    torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 1.0)
        save_checkpoint(path, config, network.state_dict(), {})
        return path

    return save


@pytest.fixture(scope="session")
def save_spread() -> Callable[[Path, DetectorConfig], Path]:
    """Save a seeded random detector that is sure of what it says, as a trained one is: rounding decides little.

    What it says depends on the picture as much as with a trained network, the class logits of a level have a standard
    deviation of `SPREAD`, the ARM drops some anchors, and most places are background, so that the limits on candidates
    and detections are hardly reached.
    """

    def save(path: Path, config: DetectorConfig) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build(config).network
            raw = _spread_heads(network, _pictures_to_spread_on(config), config)
        logits = raw.logits if config.family == "ssd" else raw.odm_logits
        assert float(logits.std(dim=1).mean()) >= 2
        assert float(logits.std(dim=0).mean()) >= 1  # told apart by picture, not by place alone
        save_checkpoint(path, config, network.state_dict(), {})
        return path

    return save


SPREAD = 3.0


def _pictures_to_spread_on(config: DetectorConfig) -> torch.Tensor:
    """Draw input: eight pictures of large patches, eight of noise."""
    size = config.preprocess
    patches = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6), size=(size.height, size.width))
    pixels = torch.cat([patches, torch.rand(8, 3, size.height, size.width)]) * 255
    return (pixels - torch.tensor(size.mean)[:, None, None]) / torch.tensor(size.std)[:, None, None]


@torch.no_grad()
def _spread_heads(network: Any, inputs: torch.Tensor, config: DetectorConfig) -> Any:
    """Fit statistics of normalisation to the input, draw the heads anew, and scale what they give; returns the last."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(inputs)
    network.eval()
    given: dict[torch.nn.Module, torch.Tensor] = {}
    heads = [module for module in network.modules() if isinstance(module, AnchorHead)]
    levels = [(head, level) for head in heads for level in head.levels]
    for _, level in levels:
        torch.nn.init.normal_(level.weight)
        torch.nn.init.zeros_(level.bias)
        level.register_forward_hook(lambda level, _, output: given.__setitem__(level, output))
    network(inputs)
    for head, level in levels:
        level._forward_hooks.clear()
        logits, offsets = given[level].unflatten(1, (-1, head.classes + 4)).split([head.classes, 4], dim=2)
        weights, biases = (t.unflatten(0, (-1, head.classes + 4)) for t in (level.weight, level.bias))
        weights[:, : head.classes] *= SPREAD / logits.std()
        weights[:, head.classes :] *= 0.7 / offsets.std()
        biases[:, 0] = 3.0 if head.classes == 2 else 9.0
    return network(inputs)


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Detections, Detections], None]:
    """Compare detections within 1e-4; of two nearly tied ones either may come first, and nothing found fails."""

    def check(a: Detections, b: Detections) -> None:
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-4)
        near = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=2) < 1e-2
        equal = near & (a.labels[:, None] == b.labels) & ((a.scores[:, None] - b.scores).abs() < 1e-4)
        assert equal.any(dim=0).all()
        assert equal.any(dim=1).all()

    return check


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_script: Callable[[str], ModuleType]) -> Iterator[Any]:
    """A Hugging Face Hub on this machine, which the client of this process uses: see hub_server.py for what it can."""
    with load_script("tests/hub_server.py").running_hub(tmp_path, monkeypatch) as server:
        yield server


def _refuse_unless_local(address: Any) -> None:
    # A path (or bytes) is a Unix socket; a tuple begins with the host.
    host = address[0] if isinstance(address, tuple) else None
    if host is not None and host not in ("localhost", "::1", "") and not str(host).startswith("127."):
        raise NetworkError(f"a test tried to reach {host}")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_unless_local(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_unless_local(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_unless_local((host,))
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let golden values be written anew, on purpose."""
    parser.addoption("--record-golden", action="store_true", help="write tests/golden from what is found now")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

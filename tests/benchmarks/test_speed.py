"""The benchmark of speed: how it takes turns, what it compares, and that every row runs; times are not looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from refinedet_cli.core.build import build
from refinedet_cli.core.presets import VOC_CLASSES, tiny


class Scripts(NamedTuple):
    """The files of the benchmark."""

    speed: ModuleType
    cases: ModuleType
    cpu: ModuleType
    detectors: ModuleType
    gpu: ModuleType
    timing: ModuleType
    training: ModuleType


@pytest.fixture
def scripts(root, monkeypatch) -> Scripts:
    monkeypatch.syspath_prepend(root / "benchmarks")
    names = ("speed", *(f"speed_{name}" for name in Scripts._fields[1:]))
    found = Scripts(*map(import_module, names))
    # Other tests of this process keep their threads and processors.
    monkeypatch.setattr(found.speed, "use_threads", lambda threads: threads or 1)
    monkeypatch.setattr(found.detectors, "SAMPLE", 2)
    return found


@pytest.fixture
def pictures(noise_set: Path) -> tuple[Path, ...]:
    """Two JPEG files in a folder of their own."""
    folder = noise_set.parent / "pictures"
    folder.mkdir()
    paths = []
    for i in range(2):
        paths.append(folder / f"{i}.jpg")
        with Image.open(noise_set.parent / f"{i}.png") as image:
            image.save(paths[-1], quality=90)
    return tuple(paths)


@pytest.fixture
def sizes(scripts) -> Any:
    return scripts.timing.Sizes(
        paper="tiny", default="tiny", batch=2, vgg_pictures=3, light_pictures=3, photograph=(1024, 768), cases=12,
        matrices=(16, 32),
    )  # fmt: skip


@pytest.fixture
def bench(scripts, pictures, sizes, tmp_path) -> Any:
    folder = tmp_path / "work"
    folder.mkdir()
    return scripts.timing.Bench(
        pictures=pictures, folder=folder, device=torch.device("cpu"), rounds=2, turn_seconds=0.001, sizes=sizes
    )


class Machine:
    """A clock that only goes on while somebody works, and a list of who did."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def work(self, name: str, seconds: float) -> Any:
        def call() -> None:
            self.calls += name
            self.now += seconds

        return call

    def clock(self) -> float:
        return self.now


# --- times


def test_sides_take_turns_there_and_back(scripts, bench):
    machine = Machine()
    bench = replace(bench, clock=machine.clock, rounds=3, turn_seconds=1.0)
    sides = {"a": machine.work("a", 1.0), "b": machine.work("b", 3.0)}
    seconds = scripts.timing.take_turns(bench, sides, warm_up=2)
    # Twice to warm up and once to plan, for each.
    assert machine.calls == "aaabbb" + "ab" + "ba" + "ab"
    assert seconds == {"a": (1.0, 1.0, 1.0), "b": (3.0, 3.0, 3.0)}


def test_short_work_is_repeated_as_often_on_both_sides_and_led_by_a_call_that_does_not_count(scripts, bench):
    machine = Machine()
    bench = replace(bench, clock=machine.clock, rounds=2, turn_seconds=6.0)
    sides = {"a": machine.work("a", 1.0), "b": machine.work("b", 2.0)}
    seconds = scripts.timing.take_turns(bench, sides, warm_up=0)
    assert machine.calls == "ab" + "aaaabbbb" + "bbbbaaaa"
    assert seconds == {"a": (1.0, 1.0), "b": (2.0, 2.0)}


def test_figures_are_medians_of_rounds(scripts):
    timing = scripts.timing
    # The machine is ten times slower in the second round, which the ratio does not see.
    assert timing.ratio([1.0, 10.0, 1.0], [2.0, 20.0, 3.0]) == (2.0, 2.0, 3.0)
    assert timing.share([1.0, 1.0, 1.0], [4.0, 2.0, 10.0]) == (25.0, 10.0, 50.0)
    assert timing.milliseconds([0.001, 0.003, 0.002]) == pytest.approx((2.0, 1.0, 3.0))
    assert timing.rate([0.5, 0.25, 1.0], 4) == "8.00 pictures/s"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(12.345, "12.3"), (0.012345, "0.0123"), (123456.7, "123,457"), (1.0, "1.00"), (0.0, "0"), (-2.5, "-2.50")],
)
def test_three_digits_count(scripts, value, shown):
    assert scripts.timing.number(value) == shown


@pytest.mark.parametrize(
    ("sense", "target", "value", "reached"),
    [
        ("at least", 2.2, 2.2, True),
        ("at least", 2.2, 2.19, False),
        ("under", 5.0, 5.0, False),
        ("under", 5.0, 4.99, True),
        ("at most", 0.0, 0.0, True),
        ("at most", 0.0, 1.0, False),
        ("at least", None, 1.0, None),
    ],
)
def test_targets_are_reached_or_not(scripts, sense, target, value, reached):
    figure = scripts.timing.spread([value])
    assert scripts.timing.Finding(work="", ours="", figure=figure, target=target, sense=sense).reached is reached


# --- what is compared


def test_a_random_head_is_made_to_act_like_a_trained_one(scripts):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 16, 20, 20, generator=generator)
    layer = nn.Conv2d(16, 3 * (5 + 4), 1)
    head = scripts.detectors.Head([layer], classes=5, stride=9)

    def outputs() -> torch.Tensor:
        return layer(features).detach().permute(0, 2, 3, 1).reshape(3, -1, 9)

    offsets = outputs()[..., 5:]
    scripts.detectors.act_like_trained(head, lambda: outputs()[..., :5], 0.01)
    passing = (outputs()[..., :5].softmax(dim=-1)[..., 1:] > 0.01).sum() / 3
    assert passing == pytest.approx(scripts.detectors.PASSING, rel=0.02)
    assert float(outputs()[..., 1:5].std()) == pytest.approx(scripts.detectors.SPREAD, rel=0.1)
    assert_close(outputs()[..., 5:], offsets)


def test_torchvisions_detector_acts_like_a_trained_one_and_is_kept_as_drawn_too(scripts, bench):
    stand = scripts.detectors.peer(bench, "ssdlite320_mobilenet_v3_large", 20)
    assert sum(stand.passing) / len(stand.passing) == pytest.approx(scripts.detectors.PASSING, rel=0.05)
    assert min(stand.raw_passing) > 100 * scripts.detectors.PASSING
    assert not any(module.training for model in (stand.model, stand.raw) for module in model.modules())
    assert scripts.detectors.look(stand.model, bench.pictures, bench.device) > 0


def test_ours_lets_as_many_scores_pass(scripts, bench):
    weights = scripts.detectors.paper_weights(bench)
    detector = scripts.detectors.load_ours(str(weights))
    with torch.no_grad():
        logits = detector.network(scripts.detectors.sample_inputs(bench, detector, 2)).odm_logits
    passing = (logits.softmax(dim=-1)[..., 1:] > detector.config.postprocess.score_threshold).sum() / 2
    assert passing == pytest.approx(scripts.detectors.PASSING, rel=0.05)


def test_openvino_computes_the_same_network(scripts, bench):
    detector = scripts.detectors.load_ours(str(scripts.detectors.paper_weights(bench)))
    inputs = scripts.detectors.sample_inputs(bench, detector, 1)
    raw = scripts.cpu._tensors(scripts.cpu._inferred(detector.network, inputs))
    run = scripts.cpu.openvino_networks(detector, inputs, 1)["fp32"]
    far, agrees = scripts.cpu.difference(raw, run(inputs.numpy()), 1e-3)
    assert agrees
    assert 0 < far < 1e-3
    assert not scripts.cpu.difference([values + 0.1 for values in raw], run(inputs.numpy()), 1e-3)[1]


def test_the_plain_loop_finds_what_post_processing_finds(scripts, bench):
    detector = scripts.detectors.load_ours(str(scripts.detectors.paper_weights(bench)))
    post = replace(detector.config.postprocess, candidates=10_000, keep=10_000)
    detector = build(replace(detector.config, postprocess=post))
    with torch.no_grad():
        raw = scripts.cpu.dense_output(detector.network.eval()(torch.zeros(1, 3, 64, 64)))
    found = scripts.cpu.process(detector, raw)
    boxes = torch.cat(scripts.cpu.loop(detector, raw))
    assert int(found.counts) == len(boxes) > 100
    ours = sorted(map(tuple, found.boxes[0, : len(boxes)].tolist()))
    assert_close(torch.tensor(ours), torch.tensor(sorted(map(tuple, boxes.tolist()))), rtol=0, atol=1e-5)


def test_the_large_photographs_are_large(scripts, bench):
    for path in scripts.cpu.large_photographs(bench):
        with Image.open(path) as image:
            assert (image.size, image.format, image.mode) == ((1024, 768), "JPEG", "RGB")


# --- correctness


def test_no_case_is_wrong(scripts):
    assert scripts.cases.wrong_cases(60) == 0


def test_a_wrong_suppression_is_counted(scripts, monkeypatch):
    right = scripts.cases.suppress
    monkeypatch.setattr(
        scripts.cases, "suppress", lambda c, config: right(c, replace(config, nms_iou=config.nms_iou / 2))
    )
    assert scripts.cases.wrong_cases(60) > 5


def test_a_suppression_that_drops_the_last_is_counted(scripts, monkeypatch):
    right = scripts.cases.suppress

    def forgetful(candidates: Any, config: Any) -> Any:
        found = right(candidates, config)
        return found._replace(counts=(found.counts - 1).clamp(min=0))

    monkeypatch.setattr(scripts.cases, "suppress", forgetful)
    assert scripts.cases.wrong_cases(60) > 30


@pytest.mark.parametrize("change", ["score_threshold", "candidates"])
def test_a_wrong_choice_of_candidates_is_counted(scripts, monkeypatch, change):
    right = scripts.cases.top_candidates
    worse = {"score_threshold": 0.4, "candidates": 2}
    monkeypatch.setattr(
        scripts.cases, "top_candidates", lambda s, config: right(s, replace(config, **{change: worse[change]}))
    )
    assert scripts.cases.wrong_cases(60) > 5


# --- training


def test_the_timed_criterion_has_the_value_and_the_gradients_of_its_own(scripts, bench):
    detector = build(tiny(VOC_CLASSES).detector)
    batch = scripts.training.noise_batch(detector, 2, pin=False)
    timed = scripts.training.TimedCriterion(detector.criterion, bench)

    def gradients(criterion: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = criterion(detector.network(batch.images), batch.targets)
        wanted = [p for p in detector.network.parameters() if p.requires_grad]
        return loss.total.detach(), list(torch.autograd.grad(loss.total, wanted, allow_unused=True))

    detector.network.eval()  # the same statistics twice
    assert_close(gradients(timed), gradients(detector.criterion))
    (seconds,) = timed.seconds
    assert seconds > 0


def test_steps_are_those_of_the_rounds_and_hold_their_criterion(scripts, bench):
    steps = scripts.training.train_steps(bench, "tiny", 2, precision="fp32", criterion=True)
    assert len(steps.seconds) == len(steps.criterion) == bench.rounds
    assert all(0 < part < whole for part, whole in zip(steps.criterion, steps.seconds, strict=True))
    assert not any(bench.folder.iterdir())


# --- rows and the command


class FakePeer(nn.Module):
    """Looks like a detector of torchvision, and finds one box."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{"boxes": torch.zeros(1, 4)} for _ in images]


@pytest.fixture
def small(scripts, sizes, monkeypatch) -> None:
    """Make --quick tiny, and the others quick to build."""
    stand = scripts.detectors.Stand(FakePeer(), FakePeer(), (200,), (100_000,))
    monkeypatch.setattr(scripts.cpu, "peer", lambda *_: stand)

    def same_network(detector: Any, inputs: torch.Tensor, threads: int) -> Any:
        def run(_: Any) -> Any:
            return [t.numpy() for t in scripts.cpu._tensors(scripts.cpu._inferred(detector.network, inputs))]

        return dict.fromkeys(("bf16", "fp32"), run)

    monkeypatch.setattr(scripts.cpu, "openvino_networks", same_network)
    monkeypatch.setattr(scripts.speed, "QUICK", sizes)
    monkeypatch.setattr(scripts.speed, "QUICK_TURN_SECONDS", 0.001)


def call(scripts: Scripts, pictures: tuple[Path, ...], out: Path, *options: str) -> int:
    code: int = scripts.speed.main(
        ["--quick", "--rounds", "1", "--pictures", str(pictures[0].parent), "--out", str(out), *options]
    )
    return code


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("table", ["cpu", pytest.param("gpu", id="of a GPU, on a CPU")])
def test_every_row_runs_and_is_told(scripts, pictures, tmp_path, capsys, table):
    assert call(scripts, pictures, tmp_path / "out", "--table", table) == 0
    shown = capsys.readouterr()
    document = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert document["failed"] == {}
    assert {line["row"] for line in document["lines"]} == set(scripts.speed.TABLES[table])
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert "host" not in document["machine"]
    for line in document["lines"]:
        assert line["work"].split()[0] in shown.out
        assert line["figure"]["low"] <= line["figure"]["median"] <= line["figure"]["high"]
        assert all(second > 0 for seconds in line["seconds"].values() for second in seconds)
    assert "DIFFER" not in shown.out
    assert f"torch {torch.__version__}" in shown.out
    # A column of its own, and no name is cut.
    assert "Reached" in shown.out
    assert "…" not in shown.out


@pytest.mark.usefixtures("small")
def test_a_row_that_fails_ends_with_1_and_the_others_are_measured(scripts, pictures, tmp_path, capsys, monkeypatch):
    def broken(bench: Any) -> Any:
        raise RuntimeError("no [luck]")
        yield

    rows = {"broken": broken, "correctness": scripts.cpu.correctness}
    monkeypatch.setattr(scripts.speed, "TABLES", {"cpu": rows, "gpu": {}})
    assert call(scripts, pictures, tmp_path) == 1
    shown = capsys.readouterr()
    assert "NOT MEASURED: broken: RuntimeError: no [luck]" in shown.out
    assert "Traceback" in shown.err
    document = json.loads((tmp_path / "speed.json").read_text())
    assert document["failed"] == {"broken": "RuntimeError: no [luck]"}
    assert [line["row"] for line in document["lines"]] == ["correctness"]


@pytest.mark.usefixtures("small")
def test_a_missed_target_is_told_and_no_error(scripts, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scripts.cpu, "wrong_cases", lambda *_: 3)
    assert call(scripts, pictures, tmp_path, "--only", "correctness") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "3 wrong" in line]
    assert "NO" in line
    assert "at most 0" in line
    (line,) = json.loads((tmp_path / "speed.json").read_text())["lines"]
    assert line["reached"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "warp"], "no row is called warp; there are detect-vgg16,"),
        (["--device", "cuda", "--only", "loss"], "no row is called loss; there are forward,"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--threads", "-1"], "--threads must be at least 1, not -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(scripts, options, said, capsys):
    with pytest.raises(SystemExit):
        scripts.speed.main(options)
    assert said in capsys.readouterr().err


def test_a_folder_without_pictures_is_told(scripts, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert scripts.speed.main(["--pictures", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 4
    assert "none" in capsys.readouterr().err


def test_the_photographs_of_the_demo_are_the_default(scripts, tmp_path):
    pytest.importorskip("skimage")
    paths = scripts.speed.demo_photographs(tmp_path / "photographs")
    assert len(paths) == 5
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.width > 400


def test_fewer_threads_get_fewer_processors(scripts, root, monkeypatch):
    given: list[Any] = []
    monkeypatch.undo()
    monkeypatch.setattr(scripts.speed.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(scripts.speed.os, "sched_setaffinity", lambda _, cores: given.append(cores), raising=False)
    monkeypatch.setattr(scripts.speed.torch, "set_num_threads", given.append)
    assert [scripts.speed.use_threads(threads) for threads in (None, 2, 9)] == [4, 2, 4]
    assert given == [[0, 1, 2, 3], 4, [0, 1], 2, [0, 1, 2, 3], 4]


def test_nothing_waits_on_a_cpu_and_there_is_no_graph(scripts):
    machine = Machine()
    work = machine.work("a", 1.0)
    assert scripts.gpu.count_syncs(work, torch.device("cpu")) is None
    assert scripts.gpu.capture(work, torch.device("cpu")) is work
    assert machine.calls == ""


@pytest.mark.gpu
def test_a_graph_gives_what_the_work_gives_and_waits_are_counted(scripts, bench):
    device = torch.device("cuda")
    values = torch.arange(4.0, device=device)
    replay = scripts.gpu.capture(lambda: values * 2, device)
    values += 1
    assert replay().tolist() == [2, 4, 6, 8]
    assert scripts.gpu.count_syncs(lambda: values * 2, device) == 0
    assert scripts.gpu.count_syncs(lambda: values.sum().item(), device) == 1

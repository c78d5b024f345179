"""The multi-task loss, against a slow reference in plain Python that takes one picture and one anchor at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.config import Classes, LossConfig
from refinedet_cli.core.loss import multibox_loss
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.refinedet import Criterion, RawOutput
from refinedet_cli.core.structures import LossParts, Target, Targets

VARIANCES = (0.1, 0.2)
Box = tuple[float, float, float, float]


def config_of(classes: int, loss: LossConfig | None = None):
    named = Classes(names=tuple(f"c{i}" for i in range(classes)), category_ids=tuple(range(classes)))
    config = tiny(named).detector
    # Shapes of unlike area: equal ones tie wherever an object lies inside both, and the reference rounds differently.
    shapes = tuple(
        tuple((w * f, h * f) for (w, h), f in zip(level, (1, 1.1, 0.9), strict=True)) for level in config.anchors.shapes
    )
    return replace(config, anchors=replace(config.anchors, shapes=shapes), loss=loss or LossConfig())


ANCHORS = tile_anchors(config_of(1).anchors, 64, 64)
COUNT = len(ANCHORS)


# The reference.


@dataclass
class Sums:
    conf: float = 0.0
    loc: float = 0.0
    positives: int = 0
    negatives: int = 0


def corners(box: Box) -> Box:
    x, y, w, h = box
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def iou(a: Box, b: Box) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0.0) * max(h, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def moved(anchor: Box, offset: list[float]) -> Box:
    x, y, w, h = anchor
    dx, dy, dw, dh = offset
    return (x + dx * 0.1 * w, y + dy * 0.1 * h, w * math.exp(dw * 0.2), h * math.exp(dh * 0.2))


def wanted(box: Box, anchor: Box) -> list[float]:
    x, y, w, h = anchor
    return [
        ((box[0] + box[2]) / 2 - x) / w / 0.1,
        ((box[1] + box[3]) / 2 - y) / h / 0.1,
        math.log((box[2] - box[0]) / w) / 0.2,
        math.log((box[3] - box[1]) / h) / 0.2,
    ]


def cross_entropy(logits: list[float], label: int) -> float:
    top = max(logits)
    return top + math.log(sum(math.exp(v - top) for v in logits)) - logits[label]


def smooth_l1(value: float) -> float:
    return 0.5 * value * value if abs(value) < 1 else abs(value) - 0.5


def giou(a: Box, b: Box) -> float:
    # With the epsilon of the library's loss, which counts where boxes are small.
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0.0) * max(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return common / (union + 1e-7) - (hull - union) / (hull + 1e-7)


def matched(anchors: list[Box], boxes: list[Box], threshold: float) -> tuple[list[int], list[float]]:
    overlap = [[iou(corners(a), b) for b in boxes] for a in anchors]
    overlap = [[v if v >= 1e-6 else 0.0 for v in row] for row in overlap]
    owner, left = [-1] * len(anchors), set(range(len(boxes)))
    pairs = sorted((-v, a, o) for a, row in enumerate(overlap) for o, v in enumerate(row) if v > 0)
    for _, a, o in pairs:
        if o in left and owner[a] == -1:
            owner[a] = o
            left.remove(o)
    best = [max(row, default=0.0) for row in overlap]
    for a, row in enumerate(overlap):
        if owner[a] == -1 and row and best[a] >= threshold:
            owner[a] = row.index(best[a])
    return owner, best


def module_reference(
    logits: Tensor,
    offsets: Tensor,
    anchors: list[Box],
    target: Target,
    positive_iou: float,
    negative_iou: float,
    ratio: float,
    allowed: list[bool],
    box: str = "smooth_l1",
    quality: float = 0.0,
) -> Sums:
    rows, moves = logits.double().tolist(), offsets.double().tolist()
    boxes, labels = [tuple(b) for b in target.boxes.double().tolist()], target.labels.tolist()
    owner, best = matched(anchors, boxes, positive_iou)
    sums, pool = Sums(), []
    for a, o in enumerate(owner):
        if o >= 0:
            sums.positives += 1
            reached = corners(moved(anchors[a], moves[a]))
            share = 1 - quality * (1 - iou(reached, boxes[o]))
            sums.conf += share * cross_entropy(rows[a], labels[o]) + (1 - share) * cross_entropy(rows[a], 0)
            if box == "giou":
                sums.loc += 1 - giou(reached, boxes[o])
            else:
                sums.loc += sum(smooth_l1(p - w) for p, w in zip(moves[a], wanted(boxes[o], anchors[a]), strict=True))
        elif best[a] < negative_iou and allowed[a]:
            pool.append(cross_entropy(rows[a], 0))
    hardest = sorted(pool, reverse=True)[: int(ratio * sums.positives)]
    sums.negatives = len(hardest)
    sums.conf += sum(hardest)
    return sums


def reference(raw: RawOutput, targets: list[Target], loss: LossConfig) -> dict[str, float]:
    arm, odm = Sums(), Sums()

    def add(to: Sums, more: Sums) -> None:
        to.conf, to.loc, to.positives = to.conf + more.conf, to.loc + more.loc, to.positives + more.positives

    plain = [tuple(a) for a in ANCHORS.double().tolist()]
    for i, target in enumerate(targets):
        anchors, allowed = plain, [True] * COUNT
        if raw.arm_logits is not None:
            folded = Target(target.boxes, torch.ones_like(target.labels))
            add(
                arm,
                module_reference(
                    raw.arm_logits[i], raw.arm_offsets[i], plain, folded,
                    loss.arm_positive_iou, loss.arm_negative_iou, loss.neg_ratio, allowed,
                ),
            )  # fmt: skip
            anchors = [moved(a, o) for a, o in zip(plain, raw.arm_offsets[i].double().tolist(), strict=True)]
            objectness = raw.arm_logits[i].double().softmax(-1)[:, 1]
            allowed = (objectness >= loss.arm_filter).tolist()
        add(
            odm,
            module_reference(
                raw.odm_logits[i], raw.odm_offsets[i], anchors, target,
                loss.odm_positive_iou, loss.odm_negative_iou, loss.neg_ratio, allowed, loss.odm_box, loss.quality,
            ),
        )  # fmt: skip
    result = {"odm_conf": odm.conf / max(1, odm.positives), "odm_loc": odm.loc / max(1, odm.positives)}
    result["odm_loc"] *= loss.odm_box_weight
    result["odm_positives"] = odm.positives
    result["total"] = result["odm_conf"] + loss.loc_weight * result["odm_loc"]
    if raw.arm_logits is not None:
        result["arm_conf"], result["arm_loc"] = arm.conf / max(1, arm.positives), arm.loc / max(1, arm.positives)
        result["arm_positives"] = arm.positives
        result["total"] += result["arm_conf"] + loss.loc_weight * result["arm_loc"]
    return result


# Cases.


def random_target(generator: torch.Generator, count: int, classes: int) -> Target:
    sides = 0.08 + 0.6 * torch.rand(count, 2, generator=generator)
    low = torch.rand(count, 2, generator=generator) * (1 - sides)
    labels = torch.randint(1, classes + 1, (count,), generator=generator)
    return Target(torch.cat([low, low + sides], dim=1), labels)


def random_raw(seed: int, batch: int, classes: int, *, arm: bool = True, grad: bool = False) -> RawOutput:
    generator = torch.Generator().manual_seed(seed)

    def draw(last: int, spread: float) -> Tensor:
        return (spread * torch.randn(batch, COUNT, last, generator=generator)).requires_grad_(grad)

    first = (draw(2, 3.0), draw(4, 1.0)) if arm else (None, None)
    return RawOutput(*first, draw(classes + 1, 2.0), draw(4, 1.0), (64, 64))


def chosen(logits: Tensor) -> list[int]:
    """Anchors of each picture that the class term looked at: those that it pulls on."""
    assert logits.grad is not None
    return (logits.grad.abs().sum(dim=-1) > 0).sum(dim=1).tolist()


def compare(loss: LossParts, expected: dict[str, float]) -> None:
    found = {"total": float(loss.total.detach()), **{k: float(v) for k, v in loss.parts.items()}}
    found |= {f"{k}_positives": float(v) for k, v in loss.positives.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name


LOSSES = {
    "paper": LossConfig(),
    "stable": LossConfig(arm_positive_iou=0.7, arm_negative_iou=0.3, neg_ratio=2.5, loc_weight=2.0),
    "all negatives": LossConfig(neg_ratio=1000.0, arm_filter=0.2, odm_positive_iou=0.6, odm_negative_iou=0.4),
    "no filter, no negatives": LossConfig(neg_ratio=0.0, arm_filter=0.0),
    "weighted boxes": LossConfig(odm_box_weight=0.25, loc_weight=3.0),
    "giou": LossConfig(odm_box="giou", odm_box_weight=2.0),
    "quality": LossConfig(quality=0.7, cascade_gradient=True),
    "giou, quality": LossConfig(odm_box="giou", quality=1.0),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("arm", [True, False], ids=["arm", "no arm"])
def test_equals_the_reference(loss, classes, arm):
    criterion = Criterion(config_of(classes, loss))
    for seed, counts in enumerate([(2, 0, 5), (1,), (0, 3), (7, 1)]):
        generator = torch.Generator().manual_seed(100 + seed)
        targets = [random_target(generator, n, classes) for n in counts]
        raw = random_raw(seed, len(counts), classes, arm=arm)
        compare(criterion(raw, Targets.pack(targets)), reference(raw, targets, loss))


def test_a_batch_is_mined_picture_by_picture():
    generator = torch.Generator().manual_seed(1)
    targets = [random_target(generator, n, 2) for n in (4, 0, 1)]
    raw = random_raw(1, 3, 2, grad=True)
    # Background where there is no object costs most, so that mining over the whole batch would take it.
    with torch.no_grad():
        raw.odm_logits[1, :, 1] += 50
        raw.arm_logits[1, :, 1] += 50
    loss = Criterion(config_of(2))(raw, Targets.pack(targets))
    loss.total.backward()
    plain = [tuple(a) for a in ANCHORS.double().tolist()]
    for logits, offsets, refined in (
        (raw.arm_logits, raw.arm_offsets, False),
        (raw.odm_logits, raw.odm_offsets, True),
    ):
        seen = chosen(logits)
        for i, target in enumerate(targets):
            moves = raw.arm_offsets[i].detach().double().tolist()
            anchors = [moved(a, o) for a, o in zip(plain, moves, strict=True)] if refined else plain
            owner, _ = matched(anchors, [tuple(b) for b in target.boxes.double().tolist()], 0.5)
            positives = sum(o >= 0 for o in owner)
            assert seen[i] == 4 * positives, (refined, i)
            assert int((offsets.grad[i].abs().sum(dim=-1) > 0).sum()) == positives


def test_no_object_in_the_batch_costs_nothing():
    raw = random_raw(3, 2, 3, grad=True)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    loss = Criterion(config_of(3))(raw, Targets.pack([empty, empty]))
    assert float(loss.total.detach()) == 0.0
    assert [float(v) for v in (*loss.parts.values(), *loss.positives.values())] == [0.0] * 6
    loss.total.backward()
    for output in raw[:4]:
        assert_close(output.grad, torch.zeros_like(output), rtol=0, atol=0)


def test_positives_pass_the_filter_and_negatives_do_not():
    target = random_target(torch.Generator().manual_seed(4), 3, 3)
    raw = random_raw(4, 1, 3, grad=True)
    with torch.no_grad():
        raw.arm_logits[..., 0] += 100  # nothing is an object, says the ARM
    loss = Criterion(config_of(3))(raw, Targets.pack([target]))
    open_gate = Criterion(config_of(3, LossConfig(arm_filter=0)))(raw, Targets.pack([target]))
    assert float(loss.positives["odm"]) == float(open_gate.positives["odm"]) >= 3
    assert_close(loss.parts["odm_loc"], open_gate.parts["odm_loc"], rtol=0, atol=0)
    loss.total.backward()
    assert chosen(raw.odm_logits) == [int(loss.positives["odm"])]


def test_the_filter_is_inclusive():
    # Softmax gives exactly a half for every anchor; more than that is asked for in the second case.
    target = random_target(torch.Generator().manual_seed(5), 2, 1)
    for limit, ratio in ((0.5, 4), (0.5000001, 1)):
        raw = random_raw(5, 1, 1, grad=True)
        with torch.no_grad():
            raw.arm_logits.zero_()
        loss = Criterion(config_of(1, LossConfig(arm_filter=limit)))(raw, Targets.pack([target]))
        loss.total.backward()
        assert chosen(raw.odm_logits) == [ratio * int(loss.positives["odm"])]


def test_the_odm_does_not_pull_on_the_arm():
    targets = Targets.pack([random_target(torch.Generator().manual_seed(6), 4, 3)])
    raw = random_raw(6, 1, 3, grad=True)
    config = config_of(3)
    Criterion(config)(raw, targets).total.backward()
    alone = [t.detach().clone().requires_grad_() for t in raw[:2]]
    arm = multibox_loss(
        *alone, ANCHORS, targets._replace(labels=torch.ones_like(targets.labels)),
        positive_iou=0.5, negative_iou=0.5, neg_ratio=3.0, variances=VARIANCES,
    )  # fmt: skip
    (arm.conf + arm.loc).backward()
    for both, only in zip(raw[:2], alone, strict=True):
        assert float(only.grad.abs().sum()) > 0
        assert_close(both.grad, only.grad, rtol=0, atol=0)
    for output in raw[2:4]:
        assert float(output.grad.abs().sum()) > 0


@pytest.mark.parametrize("box", ["smooth_l1", "giou"])
def test_the_cascade_lets_the_odms_boxes_pull_on_the_arms_and_nothing_else(box):
    targets = Targets.pack([random_target(torch.Generator().manual_seed(6), 4, 3)])
    gradients = {}
    for cascade in (False, True):
        raw = random_raw(6, 1, 3, grad=True)
        Criterion(config_of(3, LossConfig(odm_box=box, cascade_gradient=cascade)))(raw, targets).total.backward()
        gradients[cascade] = [output.grad for output in raw[:4]]
    for place, (without, with_) in enumerate(zip(gradients[False], gradients[True], strict=True)):
        assert torch.equal(without, with_) == (place != 1)
    # What has changed are the offsets of anchors that an ODM box is responsible for.
    moved_more = (gradients[True][1] != gradients[False][1]).any(dim=-1)
    assert 0 < int(moved_more.sum()) <= int((gradients[True][3] != 0).any(dim=-1).sum())


def test_quality_moves_weight_to_background_by_what_the_box_misses():
    # One object, one positive: the anchor itself, whose box is shifted by a fifth of its width.
    anchor = ANCHORS[len(ANCHORS) // 2]
    box = anchor.clone()
    box[0] += anchor[2] / 5
    x, y, w, h = box.tolist()
    target = Targets.pack([Target(torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2]]), torch.tensor([1]))])
    logits, offsets = torch.tensor([[[0.0, 2.0]]]), torch.zeros(1, 1, 4)

    def conf(quality: float) -> float:
        loss = multibox_loss(
            logits, offsets, anchor[None], target, positive_iou=0.5, negative_iou=0.5, neg_ratio=0.0,
            variances=VARIANCES, quality=quality,
        )  # fmt: skip
        return float(loss.conf)

    # The overlap is 0.8 / 1.2, so a third of the weight is missing; background costs 2 more than the class.
    assert conf(0.0) == pytest.approx(math.log(1 + math.exp(-2.0)))
    assert conf(1.0) - conf(0.0) == pytest.approx(2 / 3)
    assert conf(0.5) - conf(0.0) == pytest.approx(1 / 3)


def test_gradients_equal_finite_differences():
    targets = Targets.pack([random_target(torch.Generator().manual_seed(7), n, 2) for n in (2, 1)])
    generator = torch.Generator().manual_seed(7)
    few = ANCHORS[-15:]  # the two coarsest levels
    logits = torch.randn(2, 15, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    offsets = torch.randn(2, 15, 4, dtype=torch.float64, generator=generator, requires_grad=True)

    def terms(logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        loss = multibox_loss(
            logits, offsets, few, targets, positive_iou=0.5, negative_iou=0.5, neg_ratio=3.0, variances=VARIANCES
        )
        return loss.conf, loss.loc

    assert float(terms(logits, offsets)[0].detach()) > 0
    assert torch.autograd.gradcheck(terms, (logits, offsets))


@pytest.mark.parametrize("huge", [1e4, -1e4])
@pytest.mark.parametrize("seed", range(3))
def test_absurd_outputs_give_a_finite_loss_and_gradient(huge, seed):
    targets = Targets.pack([random_target(torch.Generator().manual_seed(seed), n, 2) for n in (3, 0)])
    noise = random_raw(seed, 2, 2)
    raw = RawOutput(*((huge * t.sign()).requires_grad_() for t in noise[:4]), (64, 64))
    loss = Criterion(config_of(2))(raw, targets)
    for value in (loss.total, *loss.parts.values(), *loss.positives.values()):
        assert bool(value.isfinite())
    loss.total.backward()
    for output in raw[:4]:
        assert bool(output.grad.isfinite().all())


def test_low_precision_outputs_are_summed_in_float32():
    targets = Targets.pack([random_target(torch.Generator().manual_seed(8), 3, 2)])
    low = RawOutput(*(t.bfloat16() for t in random_raw(8, 1, 2)[:4]), (64, 64))
    high = RawOutput(*(t.float() for t in low[:4]), (64, 64))
    criterion = Criterion(config_of(2))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = criterion(low, targets)
    plain = criterion(high, targets)
    for found, expected in zip(under_autocast, plain, strict=True):
        assert_close(found, expected, rtol=0, atol=0)
    assert under_autocast.total.dtype == torch.float32


def test_a_loss_computed_for_inspection_does_not_disturb_training():
    criterion = Criterion(config_of(2))
    targets = Targets.pack([random_target(torch.Generator().manual_seed(9), 3, 2)])
    with torch.inference_mode():
        first = float(criterion(random_raw(9, 1, 2), targets).total)
    raw = random_raw(9, 1, 2, grad=True)
    loss = criterion(raw, targets).total
    loss.backward()
    assert float(loss.detach()) == first


def test_one_object_by_hand():
    # One object on the first of two anchors, offsets 0 and even logits.
    anchor = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]])
    targets = Targets.pack([Target(torch.tensor([[0.275, 0.25, 0.775, 0.75]]), torch.tensor([2]))])
    loss = multibox_loss(
        torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), anchor, targets,
        positive_iou=0.5, negative_iou=0.5, neg_ratio=3.0, variances=VARIANCES,
    )  # fmt: skip
    assert float(loss.positives) == 1.0
    # The object lies 0.05 of the anchor to its right: 0.5 after the variance, 0.125 after smooth L1.
    assert_close(loss.loc, torch.tensor(0.125))
    assert_close(loss.conf, torch.tensor(2 * math.log(4)))


EMPTY = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("counts", [(3, 0), (0, 2, 0)])
def test_pictures_without_objects_give_their_hardest_negatives(counts):
    generator = torch.Generator().manual_seed(11)
    targets = Targets.pack([random_target(generator, n, 2) for n in counts])
    plain, mining = (random_raw(11, len(counts), 2, grad=True) for _ in range(2))
    Criterion(config_of(2))(plain, targets).total.backward()
    Criterion(config_of(2, LossConfig(background_negatives=5)))(mining, targets).total.backward()
    passed = mining.arm_logits.detach().softmax(dim=-1)[..., 1] >= 0.01
    for before, after, eligible in (
        (plain.arm_logits, mining.arm_logits, torch.ones_like(passed)),
        (plain.odm_logits, mining.odm_logits, passed),
    ):
        cost = torch.where(eligible, -after.detach().log_softmax(dim=-1)[..., 0], -1.0)
        for i, count in enumerate(counts):
            if count:  # nothing changes for a picture with objects
                assert_close(after.grad[i], before.grad[i], rtol=0, atol=0)
            else:
                taken = (after.grad[i].abs().sum(dim=-1) > 0).nonzero().flatten().tolist()
                assert sorted(taken) == sorted(cost[i].topk(5).indices.tolist())
    assert_close(mining.arm_offsets.grad, plain.arm_offsets.grad, rtol=0, atol=0)
    assert_close(mining.odm_offsets.grad, plain.odm_offsets.grad, rtol=0, atol=0)


def background_loss(pictures, negatives, ratio, target=EMPTY, logits=None):
    """Six anchors of even logits; the object, if there is one, lies on the first of the first picture."""
    anchors = torch.tensor([[0.1 + 0.15 * i, 0.5, 0.1, 0.1] for i in range(6)])
    return multibox_loss(
        torch.zeros(pictures, 6, 4) if logits is None else logits, torch.zeros(pictures, 6, 4), anchors,
        Targets.pack([target, *[EMPTY] * (pictures - 1)]),
        positive_iou=0.5, negative_iou=0.5, neg_ratio=ratio, variances=VARIANCES, background_negatives=negatives,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("pictures", "negatives", "ratio", "conf"),
    [
        pytest.param(1, 0, 3.0, 0, id="off"),
        pytest.param(1, 2, 3.0, 2, id="few are divided by one"),
        pytest.param(1, 5, 3.0, 3, id="more weigh no more than the ratio"),
        pytest.param(8, 5, 3.0, 3, id="nor do those of a whole batch"),
        pytest.param(8, 99, 3.0, 3, id="nor all there are"),
        pytest.param(8, 5, 0.0, 1, id="without mining elsewhere they weigh as one"),
    ],
)
def test_a_batch_of_background_alone(pictures, negatives, ratio, conf):
    logits = torch.zeros(pictures, 6, 4, requires_grad=True)
    loss = background_loss(pictures, negatives, ratio, logits=logits)
    assert_close(loss.conf, torch.tensor(conf * math.log(4)))
    assert [float(loss.loc), float(loss.positives)] == [0.0, 0.0]
    loss.conf.backward()
    # Each mined anchor pulls 3/4 towards background and 1/4 from each class.
    assert_close(logits.grad[..., 0].sum(), torch.tensor(-0.75 * conf))
    assert_close(logits.grad[..., 1:].sum(), torch.tensor(0.75 * conf))


def test_background_beside_an_object_keeps_the_weight_of_the_object():
    on_first = Target(torch.tensor([[0.05, 0.45, 0.15, 0.55]]), torch.tensor([1]))
    alone = background_loss(1, 5, 3.0, on_first)
    beside = background_loss(9, 5, 3.0, on_first)
    assert_close(alone.conf, torch.tensor(4 * math.log(4)))  # the object and three negatives
    assert_close(beside.conf, torch.tensor(7 * math.log(4)))  # forty more weigh three
    assert_close(beside.loc, alone.loc)


def test_gradients_of_background_equal_finite_differences():
    generator = torch.Generator().manual_seed(12)
    targets = Targets.pack([random_target(generator, 2, 2), EMPTY])
    logits = torch.randn(2, 15, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    def conf(logits: Tensor) -> Tensor:
        return multibox_loss(
            logits, torch.zeros(2, 15, 4, dtype=torch.float64), ANCHORS[-15:], targets,
            positive_iou=0.5, negative_iou=0.5, neg_ratio=3.0, variances=VARIANCES, background_negatives=4,
        ).conf  # fmt: skip

    assert torch.autograd.gradcheck(conf, (logits,))

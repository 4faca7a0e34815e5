"""Losses, measures and made pictures, against the plainest way to write them."""

import math

import pytest
import torch

from examples.boxes import Detections, average_precision, giou_loss, iou, suppress
from examples.detection import SCALES, assign, decode, detection_loss, focal_loss, place_anchors
from examples.segmentation import confusion, mean_iou
from examples.shapes import CLASSES, EVALUATED, draw, draw_many


def some_boxes(count, seed, side=20):
    torch.manual_seed(seed)
    corner = torch.randint(0, side, (count, 2))
    return torch.cat([corner, corner + torch.randint(1, side, (count, 2))], 1).float()


def overlap_of(a, b):
    """IoU by counting pixels."""
    return len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b))


def pixels(box):
    left, top, right, bottom = (int(side) for side in box)
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def test_iou_counts_pixels():
    first, second = some_boxes(6, 0), some_boxes(5, 1)
    expected = [[overlap_of(a, b) for b in second] for a in first]
    torch.testing.assert_close(iou(first, second), torch.tensor(expected))


def test_giou_loss_is_the_papers_formula_and_trains_boxes_that_do_not_meet():
    first, second = some_boxes(8, 2), some_boxes(8, 3)
    for a, b, loss in zip(first, second, giou_loss(first, second), strict=True):
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        union = len(pixels(a) | pixels(b))
        assert loss.item() == pytest.approx(
            1 - (len(pixels(a) & pixels(b)) / union - (hull - union) / hull).item(), abs=1e-5
        )
    apart = torch.tensor([[0.0, 0, 4, 4]], requires_grad=True)
    giou_loss(apart, torch.tensor([[10.0, 10, 14, 14]])).sum().backward()
    assert apart.grad[0, 2] < 0  # growing towards the other lowers the loss


def test_suppression_keeps_the_best_of_boxes_that_overlap():
    boxes, scores = some_boxes(60, 4, side=8), torch.rand(60, generator=torch.Generator().manual_seed(5))
    left, expected = sorted(range(60), key=lambda k: -scores[k]), []
    while left:
        best = left.pop(0)
        expected.append(best)
        left = [k for k in left if overlap_of(boxes[k], boxes[best]) <= 0.5]
    assert suppress(boxes, scores).tolist() == expected
    assert 1 < len(expected) < 60


def naive_ap(found, truth, label):
    """Precision at every recall that is reached, the best at it or beyond, in plain Python."""
    wanted = {(p, k) for p, t in enumerate(truth) for k in range(len(t.labels)) if t.labels[k] == label}
    ranked = sorted(
        ((f.scores[k].item(), p, k) for p, f in enumerate(found) for k in range(len(f.labels)) if f.labels[k] == label),
        reverse=True,
    )
    taken, points, right = set(), [], 0
    for rank, (_, p, k) in enumerate(ranked):
        overlaps = [(overlap_of(found[p].boxes[k], truth[p].boxes[j]), -j) for q, j in wanted if q == p]
        best, index = max(overlaps, default=(0, 0))
        if best >= 0.5 and (p, -index) not in taken:
            taken.add((p, -index))
            right += 1
        points.append((right / len(wanted), right / (rank + 1)))
    area, before = 0.0, 0.0
    for recall, _ in points:
        area += (recall - before) * max((precision for r, precision in points if r >= recall), default=0)
        before = recall
    return area


def test_average_precision_equals_the_definition_written_out():
    torch.manual_seed(6)
    truth, found = [], []
    for picture in range(12):
        boxes, labels = some_boxes(4, picture), torch.randint(0, 3, (4,))
        truth.append(Detections(boxes, labels, torch.ones(4)))
        moved = (boxes + torch.randint(-3, 4, (4, 4))).float()
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        boxes = torch.cat([moved, boxes, some_boxes(4, 100 + picture)])
        found.append(Detections(boxes, torch.cat([labels, labels, torch.randint(0, 3, (4,))]), torch.rand(12)))
    expected = 100 * sum(naive_ap(found, truth, label) for label in range(3)) / 3
    assert 10 < expected < 90
    assert average_precision(found, truth, 5) == pytest.approx(expected, abs=1e-3)  # classes 3 and 4 do not occur
    assert average_precision(truth, truth, 3) == pytest.approx(100)
    nothing = [Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)) for _ in truth]
    assert average_precision(nothing, truth, 3) == 0


def test_mean_iou_equals_sets_of_pixels_and_leaves_out_what_is_nowhere():
    torch.manual_seed(7)
    truth, predicted = torch.randint(0, 3, (2, 9, 11)), torch.randint(0, 3, (2, 9, 11))
    shares = []
    for label in range(3):
        a, b = (set(map(tuple, (m == label).nonzero().tolist())) for m in (truth, predicted))
        shares.append(len(a & b) / len(a | b))
    assert mean_iou(confusion(predicted, truth, 4)) == pytest.approx(100 * sum(shares) / 3, abs=1e-4)
    assert mean_iou(confusion(truth, truth, 4)) == 100


def test_focal_loss_is_the_papers_formula_and_cross_entropy_without_focus():
    torch.manual_seed(8)
    logits, wanted = torch.randn(5, 3) * 3, torch.randint(0, 2, (5, 3)).float()
    expected = 0.0
    for x, y in zip(logits.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        pt, alpha = (p, 0.25) if y else (1 - p, 0.75)
        expected -= alpha * (1 - pt) ** 2 * math.log(pt)
    assert focal_loss(logits, wanted).item() == pytest.approx(expected, rel=1e-5)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    torch.testing.assert_close(focal_loss(logits, wanted, alpha=0.5, gamma=0.0) * 2, plain)


def test_anchors_lie_about_their_places_and_shifts_move_and_scale_them():
    anchors = place_anchors((2, 3), 8)
    assert anchors.shape == (2 * 3 * len(SCALES), 4)
    side = SCALES[1] * 8
    assert anchors[2 * 4 + 1].tolist() == [
        12 - side / 2,
        12 - side / 2,
        12 + side / 2,
        12 + side / 2,
    ]  # row 1, column 1
    assert torch.equal(decode(anchors, torch.zeros(5, len(anchors), 4))[3], anchors)
    moved = decode(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[0.5, 0.0, math.log(2), 0.0]]))
    torch.testing.assert_close(moved, torch.tensor([[0.0, 0, 20, 20]]))


def test_each_box_owns_an_anchor_and_the_right_answer_has_nearly_no_loss():
    scene = draw(3, (64, 96))
    anchors = torch.cat([place_anchors((64 // s, 96 // s), s) for s in (4, 8, 16, 32)])
    owner = assign(anchors, scene.boxes)
    assert set(owner[owner >= 0].tolist()) == set(range(len(scene.boxes)))
    overlap = iou(anchors, scene.boxes)
    assert (overlap[owner == -1].max(1).values < 0.4).all()
    has_box = owner >= 0
    logits = torch.full((1, len(anchors), len(CLASSES)), -20.0)
    logits[0, has_box, scene.labels[owner[has_box]]] = 20
    sides, boxes = anchors[:, 2:] - anchors[:, :2], scene.boxes[owner.clamp(min=0)]
    moves = ((boxes[:, 2:] + boxes[:, :2]) - (anchors[:, 2:] + anchors[:, :2])) / 2 / sides
    shifts = torch.cat([moves, ((boxes[:, 2:] - boxes[:, :2]) / sides).log()], 1)
    assert detection_loss(logits, shifts[None], anchors, [scene]).item() == pytest.approx(0, abs=1e-4)
    assert detection_loss(-logits, shifts[None], anchors, [scene]).item() > 1


def test_a_scene_is_a_function_of_its_seed_and_its_parts_agree():
    for scene, again in zip(draw_many(range(20), (64, 96)), draw_many(range(20), (64, 96)), strict=True):
        assert torch.equal(scene.picture, again.picture)
        assert 0 <= scene.picture.min() < scene.picture.max() <= 1
        assert len(scene.boxes) == len(scene.labels) >= 1
        for box, label in zip(scene.boxes.int().tolist(), scene.labels, strict=True):
            left, top, right, bottom = box
            part = scene.mask[top:bottom, left:right] == label + 1
            assert part.any(0)[[0, -1]].all()  # the box is tight
            assert part.any(1)[[0, -1]].all()
        covered = torch.zeros_like(scene.mask, dtype=torch.bool)
        for left, top, right, bottom in scene.boxes.int().tolist():
            covered[top:bottom, left:right] = True
        assert not scene.mask[~covered].any()
    assert not torch.equal(draw(EVALUATED, (64, 96)).picture, draw(0, (64, 96)).picture)

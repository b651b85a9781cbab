"""Test the split and the scores of examples/unknown.py, without its training, which takes minutes."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import unknown


def test_a_draw_splits_the_known_images_and_leaves_two_classes_out():
    labels = np.arange(1000) % 10
    parts, classes = unknown.split(3, labels)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1000))
    assert [len(parts[name]) for name in ("train", "val", "test", "unknown")] == [480, 160, 160, 200]
    assert len(classes) == 8
    assert not np.isin(labels[parts["unknown"]], classes).any()
    assert all(np.isin(labels[parts[name]], classes).all() for name in ("train", "val", "test"))
    assert len({tuple(unknown.split(draw, labels)[1]) for draw in range(5)}) > 1


@pytest.mark.parametrize(("size", "auroc"), [(0.1, 100), (10, 50), (100, 0)])
def test_every_score_separates_unknown_images_by_the_size_of_their_logits(size, auroc):
    g = np.random.default_rng(0)
    labels = np.arange(400) % 8
    logits = np.eye(8)[labels] * 10 + g.normal(0, 0.1, (400, 8))
    others = np.eye(8)[labels] * size + g.normal(0, 0.1, (400, 8))
    rows = unknown.measure(
        {"val": logits[:200], "test": logits[200:], "unknown": others},
        {"val": labels[:200], "test": labels[200:], "unknown": np.full(400, unknown.NO_LABEL)},
        2.0,
    )
    assert len(rows) == 4
    for found, refused, answered, right in rows.values():
        assert found == pytest.approx(auroc, abs=12)
        assert refused == pytest.approx({100: 100, 50: 5, 0: 0}[auroc], abs=8)
        assert answered == pytest.approx(95, abs=6)
        assert right == 100

"""What a row of features holds, by hand-computed columns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from featdiff.exceptions import UsageError
from featdiff.features.layout import LOGITS, PRE_LOGITS, FeatureLayout, Kind, Part

LAYOUT = FeatureLayout.of(
    {
        ("layer1", Kind.MEAN): 3,
        ("layer4", Kind.MEAN): 5,
        (PRE_LOGITS, Kind.PRE_LOGITS): 4,
        ("layer4", Kind.SPATIAL_STD): 5,
        (PRE_LOGITS, Kind.SPATIAL_STD): 4,
        (LOGITS, Kind.LOGITS): 2,
    }
)
WRITTEN = {
    "layer1": [0, 3],
    "layer4": [3, 8],
    "pre_logits": [8, 12],
    "layer4:std": [12, 17],
    "pre_logits:std": [17, 21],
    "logits": [21, 23],
}


def test_parts_lie_side_by_side_in_their_order() -> None:
    assert [(part.layer, part.kind.value, part.start, part.stop) for part in LAYOUT.parts] == [
        ("layer1", "mean", 0, 3),
        ("layer4", "mean", 3, 8),
        ("pre_logits", "pre_logits", 8, 12),
        ("layer4", "std", 12, 17),
        ("pre_logits", "std", 17, 21),
        ("logits", "logits", 21, 23),
    ]
    assert [part.width for part in LAYOUT.parts] == [3, 5, 4, 5, 4, 2]
    assert [part.columns for part in LAYOUT.parts] == [slice(*ends) for ends in WRITTEN.values()]
    assert [part.name for part in LAYOUT.parts] == list(WRITTEN)
    assert LAYOUT.width == 23


def test_of_stages() -> None:
    layout = FeatureLayout.of_stages({"a": 6, "b": 20})
    assert layout == FeatureLayout.of({("a", Kind.MEAN): 6, ("b", Kind.MEAN): 20})
    assert layout.parts == (Part("a", Kind.MEAN, 0, 6), Part("b", Kind.MEAN, 6, 26))
    assert layout.width == 26
    assert layout.layers == layout.stages == list(layout.parts)
    assert layout.pre_logits is None and layout.logits is None
    assert layout.spatial_std(layout.last_stage) is None


def test_stages_layers_and_single_parts() -> None:
    first, last, pre_logits, last_std, pre_logits_std, logits = LAYOUT.parts
    assert LAYOUT.stages == [first, last]
    assert LAYOUT.stage_names == ["layer1", "layer4"]
    assert LAYOUT.layers == [first, last, pre_logits]
    assert LAYOUT.last_stage == last
    assert LAYOUT.pre_logits == pre_logits
    assert LAYOUT.logits == logits
    assert LAYOUT.spatial_std(first) is None
    assert LAYOUT.spatial_std(last) == last_std
    assert LAYOUT.spatial_std(pre_logits) == pre_logits_std


def test_find() -> None:
    assert LAYOUT.find("layer4", Kind.MEAN) == Part("layer4", Kind.MEAN, 3, 8)
    assert LAYOUT.find("layer4", Kind.SPATIAL_STD) == Part("layer4", Kind.SPATIAL_STD, 12, 17)
    assert LAYOUT.find("layer1", Kind.SPATIAL_STD) is None
    assert LAYOUT.find("layer2", Kind.MEAN) is None


def test_named() -> None:
    names = [LAYOUT.named(column).name for column in range(23)]
    assert names == [name for name, (start, stop) in WRITTEN.items() for _ in range(start, stop)]
    for column in (-1, 23):
        with pytest.raises(IndexError, match=f"a row of 23 numbers has no column {column}"):
            LAYOUT.named(column)


def test_without() -> None:
    assert LAYOUT.without(Kind.LOGITS) == FeatureLayout(LAYOUT.parts[:-1])
    assert LAYOUT.without(Kind.LOGITS).width == 21
    assert LAYOUT.without(Kind.LOGITS).without(Kind.SPATIAL_STD).width == 12
    assert LAYOUT.without(Kind.LOGITS).without(Kind.LOGITS) == LAYOUT.without(Kind.LOGITS)
    with pytest.raises(UsageError, match="the columns of 'logits' \\(21:23\\) do not begin at 12"):
        LAYOUT.without(Kind.SPATIAL_STD)


def test_take() -> None:
    rows = torch.arange(46.0).reshape(2, 23)
    parts = [LAYOUT.parts[3], LAYOUT.parts[0]]  # in the order that was asked for
    expected = [[12, 13, 14, 15, 16, 0, 1, 2], [35, 36, 37, 38, 39, 23, 24, 25]]
    np.testing.assert_array_equal(LAYOUT.take(rows, parts), expected)
    np.testing.assert_array_equal(LAYOUT.take(rows, LAYOUT.parts), rows)
    assert LAYOUT.take(rows[:0], parts).shape == (0, 8)


# ---- as text ----


def test_written_and_read_again() -> None:
    assert LAYOUT.to_json() == WRITTEN
    assert list(LAYOUT.to_json()) == list(WRITTEN)
    assert FeatureLayout.from_json(json.loads(json.dumps(LAYOUT.to_json()))) == LAYOUT


def test_order_of_names_does_not_matter() -> None:
    """Some writers sort keys."""
    text = json.dumps(WRITTEN, sort_keys=True)
    assert list(json.loads(text)) != list(WRITTEN)
    assert FeatureLayout.from_json(json.loads(text)) == LAYOUT


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"a": [1, 3]}, r"the columns of 'a' \(1:3\) do not begin at 0"),
        ({"a": [0, 3], "b": [4, 6]}, r"the columns of 'b' \(4:6\) do not begin at 3"),
        ({"a": [0, 3], "b": [2, 6]}, r"the columns of 'b' \(2:6\) do not begin at 3"),
        ({"a": [0, 3], "a:std": [0, 3]}, r"the columns of 'a:std' \(0:3\) do not begin at 3"),
        ({"a": [0, 3], "b": [3, 3]}, r"the columns of 'b' \(3:3\) hold nothing"),
        ({"a": [0, 3], "b": [3, 1]}, r"the columns of 'b' \(3:1\) hold nothing"),
        ({"a": [0, 3], "b": [3]}, r"the columns of 'b' must be two numbers, start and stop, not \[3\]"),
        ({}, "a row of features needs at least one part"),
    ],
)
def test_columns_that_make_no_sense(names: dict[str, list[int]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FeatureLayout.from_json(names)


def test_empty_parts_are_refused() -> None:
    with pytest.raises(UsageError, match="the columns of 'b' .* hold nothing"):
        FeatureLayout.of_stages({"a": 3, "b": 0})

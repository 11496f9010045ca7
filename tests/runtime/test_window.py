"""How a budget of tokens becomes kernel and stride."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_engines.bundle import Pooling
from ppllava_engines.errors import UsageError
from ppllava_runtime.anyres import Tiling
from ppllava_runtime.window import (
    Axes,
    Window,
    choose_pictures_window,
    choose_tile_window,
    choose_window,
    window_within,
)
from tiny_bundle import tiny_manifest, write_bundle

DEFAULT = Window((2, 3, 3), (2, 3, 3))
FULL: Axes = (32, 24, 24)

axes = st.tuples(st.integers(1, 32), st.integers(1, 27), st.integers(1, 27))


def test_the_published_budget_gives_the_published_window() -> None:
    assert window_within(1024, FULL, DEFAULT) == DEFAULT
    assert DEFAULT.output(FULL) == (16, 8, 8)


@pytest.mark.parametrize(
    ("budget", "output"),
    [
        (1, (1, 1, 1)),
        (64, (7, 3, 3)),
        (128, (8, 4, 4)),
        (256, (10, 5, 5)),
        (512, (10, 7, 7)),
        (2048, (16, 11, 11)),
        (10**6, FULL),
    ],
)
def test_a_budget_keeps_the_proportions(budget: int, output: Axes) -> None:
    assert window_within(budget, FULL, DEFAULT).output(FULL) == output


@given(budget=st.integers(1, 3000), size=axes)
def test_a_budget_is_kept_and_no_token_left_out(budget: int, size: Axes) -> None:
    window = window_within(budget, size, DEFAULT)
    assert 1 <= window.num_tokens(size) <= budget
    for i, k, s, o in zip(size, window.kernel, window.stride, window.output(size), strict=True):
        assert (o - 1) * s + k == i
        assert s <= k <= 2 * s


@given(size=axes)
def test_a_budget_for_everything_takes_everything(size: Axes) -> None:
    assert window_within(math.prod(size), size, DEFAULT) == Window((1, 1, 1), (1, 1, 1))


def test_the_default_shrinks_to_fit() -> None:
    assert choose_window((1, 2, 24), DEFAULT).output((1, 2, 24)) == (1, 1, 8)


@pytest.mark.parametrize("pooling", [Pooling((16, 8, 8)), Pooling((16, 8, 8), stride=(2, 3, 3))])
def test_a_fixed_number_of_windows_is_kept_where_there_are_tokens(
    tmp_path: Path, pooling: Pooling
) -> None:
    write_bundle(tmp_path)
    model = dataclasses.replace(tiny_manifest(tmp_path).model, pooling=pooling, grid=(24, 24))
    assert Window(*model.video_window(FULL)) == DEFAULT
    for num_frames in range(1, 65):
        size = (num_frames, 24, 24)
        window = Window(*model.video_window(size))
        assert window.output(size) == (min(num_frames, 16), 8, 8)
    plain = dataclasses.replace(model, pooling=None)
    assert plain.video_window(FULL) == (plain.kernel, plain.stride)


@given(
    picture=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    grid=st.tuples(st.integers(1, 27), st.integers(1, 27)),
    budget=st.integers(0, 3000),
)
def test_a_budget_holds_for_all_views_of_a_picture(
    picture: tuple[int, int], grid: tuple[int, int], budget: int
) -> None:
    tiling = Tiling.of(picture, [(24, 48), (48, 24), (48, 48)], 24)
    budget += tiling.num_tokens(1, 1)
    one, h, w = choose_tile_window(tiling, grid, DEFAULT, num_tokens=budget).output((1, *grid))
    assert one == 1
    assert tiling.num_tokens(h, w) <= budget


def test_a_budget_below_one_token_per_view_is_refused() -> None:
    tiling = Tiling.of((48, 48), [(48, 48)], 24)
    assert choose_tile_window(tiling, (24, 24), DEFAULT, num_tokens=7).num_tokens(FULL) > 0
    with pytest.raises(UsageError) as caught:
        choose_tile_window(tiling, (24, 24), DEFAULT, num_tokens=6)
    assert str(caught.value) == (
        "the number of tokens is 6, but this picture in 5 views takes 7 or more"
    )


@given(
    picture=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_the_least_budget_that_is_named_for_a_picture_is_enough_and_none_below_is(
    picture: tuple[int, int], grid: tuple[int, int]
) -> None:
    tiling = Tiling.of(picture, [(24, 48), (48, 24), (48, 48)], 24)
    with pytest.raises(UsageError) as caught:
        choose_tile_window(tiling, grid, DEFAULT, num_tokens=0)
    least = int(str(caught.value).split()[-3])
    _, h, w = choose_tile_window(tiling, grid, DEFAULT, num_tokens=least).output((1, *grid))
    assert tiling.num_tokens(h, w) == least
    with pytest.raises(UsageError, match=f"takes {least} or more"):
        choose_tile_window(tiling, grid, DEFAULT, num_tokens=least - 1)


@pytest.mark.parametrize(
    ("picture", "canvas", "of_one", "least", "output"),
    [((2, 400), (24, 48), 4, 2, (1, 2, 1)), ((10, 1), (48, 24), 5, 4, (1, 1, 2))],
)
def test_a_thin_picture_takes_fewest_tokens_where_unpadding_leaves_nothing_of_its_tiles(
    picture: tuple[int, int], canvas: tuple[int, int], of_one: int, least: int, output: Axes
) -> None:
    tiling = Tiling.of(picture, [canvas], 24)
    assert tiling.num_tokens(1, 1) == of_one
    window = choose_tile_window(tiling, (4, 4), DEFAULT, num_tokens=least)
    assert window.output((1, 4, 4)) == output
    with pytest.raises(UsageError, match=f"takes {least} or more"):
        choose_tile_window(tiling, (4, 4), DEFAULT, num_tokens=least - 1)


def test_nothing_is_pooled_over_the_views_of_a_picture() -> None:
    tiling = Tiling.of((48, 48), [(48, 48)], 24)
    asked = choose_tile_window(tiling, (24, 24), DEFAULT, (1, 2, 2), (7, 2, 2))
    assert asked == Window((1, 2, 2), (1, 2, 2))
    assert choose_tile_window(tiling, (24, 24), DEFAULT) == Window((1, 3, 3), (1, 3, 3))
    with pytest.raises(UsageError, match="kernel 2,2,2 does not fit into the 1,24,24 tokens"):
        choose_tile_window(tiling, (24, 24), DEFAULT, (2, 2, 2))


@given(count=st.integers(1, 32), budget=st.integers(0, 3000))
def test_a_budget_is_shared_between_pictures_that_stay_apart(count: int, budget: int) -> None:
    size, own = (count, 24, 24), Window((1, 3, 3), (1, 3, 3))
    if budget < count:
        with pytest.raises(UsageError, match=f"these {count} pictures take {count} or more"):
            choose_pictures_window(size, own, num_tokens=budget)
        return
    window = choose_pictures_window(size, own, num_tokens=budget)
    assert (window.kernel[0], window.stride[0]) == (1, 1)
    assert window.output(size)[0] == count
    assert window.num_tokens(size) <= budget
    assert choose_pictures_window((1, 24, 24), own, num_tokens=budget // count) == window


def test_a_budget_for_pictures_that_the_model_joins_is_that_of_a_video() -> None:
    joined = choose_pictures_window(FULL, DEFAULT, num_tokens=64)
    assert joined == window_within(64, FULL, DEFAULT)


def test_kernel_and_stride_stand_for_each_other() -> None:
    assert choose_window(FULL, DEFAULT, kernel=(4, 4, 4)) == Window((4, 4, 4), (4, 4, 4))
    assert choose_window(FULL, DEFAULT, stride=(4, 4, 4)) == Window((4, 4, 4), (4, 4, 4))
    assert choose_window(FULL, DEFAULT, (4, 4, 4), (2, 2, 2)) == Window((4, 4, 4), (2, 2, 2))


@pytest.mark.parametrize(
    ("kernel", "stride", "num_tokens", "sentence"),
    [
        ((2, 3, 3), None, 9, "give a number of tokens or kernel and stride, not both"),
        (None, None, 0, "the number of tokens is 0, expected 1 or more"),
        ((2, 0, 3), None, None, "kernel is 2,0,3, expected three numbers of 1 or more"),
        ((1, 1, 1), (1, 1, -1), None, "stride is 1,1,-1, expected three numbers of 1 or more"),
        (
            (33, 1, 1),
            None,
            None,
            "kernel 33,1,1 does not fit into the 32,24,24 tokens (t,h,w) that were seen: make it "
            "smaller",
        ),
    ],
)
def test_refuses(
    kernel: Axes | None, stride: Axes | None, num_tokens: int | None, sentence: str
) -> None:
    with pytest.raises(UsageError) as caught:
        choose_window(FULL, DEFAULT, kernel, stride, num_tokens)
    assert str(caught.value) == sentence

"""Stills are cut and put together again as LLaVA-NeXT does, to the last row."""

from __future__ import annotations

import warnings
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ppllava_runtime.anyres import Size, Tiling
from ppllava_runtime.preprocess import pixel_values

SIDE = 24
PINPOINTS = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72), (72, 96))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

pictures = st.tuples(st.integers(1, 300), st.integers(1, 300))


def published(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ModuleType = pytest.importorskip(
            f"transformers.models.llava_next.{module}",
            reason="transformers is in the extra 'export'",
        )
    return found


@pytest.mark.parametrize(
    "picture",
    [(37, 83), (83, 37), (500, 211), (24, 24), (9, 7), (6, 200), (300, 5), (51, 45), (48, 97)],
)
@pytest.mark.parametrize("pinpoints", [PINPOINTS, PINPOINTS[:1], PINPOINTS[::-1]])
def test_views_equal_the_published_processor(picture: Size, pinpoints: tuple[Size, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = published("image_processing_pil_llava_next").LlavaNextImageProcessorPil(
            size={"height": SIDE, "width": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=[list(size) for size in pinpoints],
            image_mean=MEAN,
            image_std=STD,
            input_data_format="channels_last",
        )
        pixels = np.random.default_rng(0).integers(0, 256, (*picture, 3), np.uint8)
        (expected,) = processor([pixels], return_tensors="np")["pixel_values"]
    views = Tiling.of(picture, pinpoints, SIDE).views(pixels)
    np.testing.assert_array_equal(pixel_values(views, SIDE, MEAN, STD), expected)


@given(picture=pictures, side=st.integers(1, 27))
@example(picture=(300, 1), side=3)
@example(picture=(1, 300), side=2)
@example(picture=(102, 90), side=2)
def test_arranges_as_the_published_model(picture: Size, side: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is in the extra 'export'")
    module = published("modeling_llava_next")
    tiling, h, w = Tiling.of(picture, PINPOINTS, SIDE), side, side
    rows, columns = module.get_anyres_image_grid_shape(picture, [*map(list, PINPOINTS)], SIDE)
    assert tiling.grid == (rows, columns)
    pooled = np.random.default_rng(0).normal(size=(tiling.num_views, h, w, 2)).astype(np.float32)
    newline = np.array([7.0, 8.0], np.float32)

    tiles = torch.from_numpy(pooled[1:]).reshape(rows, columns, h, w, 2).permute(4, 0, 2, 1, 3)
    kept = module.unpad_image(tiles.reshape(2, rows * h, columns * w), picture)
    np.testing.assert_array_equal(tiling.arranged(pooled[1:]), kept.permute(1, 2, 0))
    ends = torch.from_numpy(newline)[:, None, None].expand(*kept.shape[:-1], 1)
    lines = torch.cat([kept, ends], -1).flatten(1).T
    expected = np.concatenate([pooled[0].reshape(-1, 2), lines])
    got = tiling.assembled(pooled, newline)
    np.testing.assert_array_equal(got, expected)
    assert tiling.num_tokens(h, w) == len(got)


@given(picture=pictures, h=st.integers(1, 9), w=st.integers(1, 9))
def test_removes_padding_and_nothing_else(picture: Size, h: int, w: int) -> None:
    tiling = Tiling.of(picture, PINPOINTS, SIDE)
    seen = tiling.views(np.full((*picture, 3), 255, np.uint8))[1:, :, :, 0] > 0
    # In each of h×w cells of a tile, how much of it is picture.
    rows, columns = tiling.grid
    whole = seen.reshape(rows, columns, SIDE, SIDE).swapaxes(1, 2)
    parts = whole.reshape(rows * SIDE, columns * SIDE)
    down, right = parts.any(axis=1).mean(), parts.any(axis=0).mean()
    kept = tiling.arranged(np.ones((rows * columns, h, w, 1)))
    # Rounding down loses less than a cell, and so does the pixel that resizing rounds up.
    assert abs(len(kept) - down * rows * h) < 1 + 2 * h / SIDE + 1
    assert abs(kept.shape[1] - right * columns * w) < 1 + 2 * w / SIDE + 1
    assert tiling.num_tokens(h, w) == h * w + kept.shape[0] * (kept.shape[1] + 1)


def test_a_whole_view_alone_ends_with_a_newline() -> None:
    tiling = Tiling.of((50, 30), (), SIDE)
    assert tiling.views(np.zeros((50, 30, 3), np.uint8)).shape == (1, SIDE, SIDE, 3)
    pooled = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    got = tiling.assembled(pooled, np.array([-1, -2], np.float32))
    assert got.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [-1, -2]]
    assert tiling.num_tokens(2, 2) == 5


def test_tiles_are_the_picture_in_reading_order() -> None:
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[24:, 48:72] = 200  # the third tile of the second row
    tiling = Tiling.of((48, 96), [(48, 96)], SIDE)
    views = tiling.views(pixels)
    assert views[1:].max(axis=(1, 2, 3)).tolist() == [0, 0, 0, 0, 0, 0, 200, 0]
    np.testing.assert_array_equal(tiling.arranged(views[1:]), pixels)

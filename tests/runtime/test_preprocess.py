"""Pixel for pixel what the published processor computes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from ppllava_runtime.preprocess import pixel_values

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(("height", "width"), [(37, 83), (500, 211), (24, 24), (9, 7)])
def test_equals_the_published_processor(height: int, width: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "transformers.models.clip.image_processing_pil_clip",
            reason="transformers is in the extra 'export'",
        )
        processor = module.CLIPImageProcessorPil(
            size={"height": 24, "width": 24}, do_center_crop=False, image_mean=MEAN, image_std=STD
        )
        frames = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
        expected = processor(list(frames), return_tensors="np")["pixel_values"]
    got = pixel_values(frames, 24, MEAN, STD)
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_scales_and_normalises_each_channel() -> None:
    frames = np.zeros((1, 4, 4, 3), np.uint8)
    frames[..., 0], frames[..., 2] = 255, 51
    got = pixel_values(frames, 2, (0.5, 0.25, 0.0), (0.5, 0.5, 2.0))
    np.testing.assert_array_equal(got[0, :, 0, 0], np.array([1.0, -0.5, 0.1], np.float32))


def test_averages_when_shrinking() -> None:
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[:, ::2] = 255  # stripes, which a filter without antialiasing would keep or lose
    got = pixel_values(frames, 4, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(got, 0.5, atol=0.01)

"""Weights in int8: how near they are, and that no pair of them overflows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ppllava_engines.onnxruntime import open_session
from ppllava_export.int8_weights import column_steps, round_columns

FINITE = st.floats(-1e4, 1e4, width=32).filter(lambda number: number == 0 or abs(number) > 1e-20)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 7), st.integers(1, 3)), elements=FINITE))
def test_pairs_fit_and_each_weight_is_within_half_a_step(weight: NDArray[np.float32]) -> None:
    steps = column_steps(weight)
    rounded = round_columns(weight, steps)
    assert steps.shape == weight.shape[1:]
    assert (steps > 0).all()
    sizes = np.abs(rounded.astype(int))
    assert sizes.max() <= 127
    padded = np.pad(sizes, ((0, len(sizes) % 2), (0, 0)))
    pairs = padded[::2] + padded[1::2]
    assert pairs.max() <= 128
    assert (pairs.max(axis=0)[weight.any(axis=0)] >= 126).all()  # no column wastes levels
    error = np.abs(rounded * steps.astype(np.float64) - weight)
    assert (error <= 0.50001 * steps).all()


@pytest.mark.parametrize("inputs", [1, 3, 33, 256, 1023])
@pytest.mark.parametrize("lean", [False, True])
def test_products_of_the_largest_inputs_are_exact(inputs: int, lean: bool, tmp_path: Path) -> None:
    """On whatever this machine multiplies with: on VNNI they are anyway."""
    rng = np.random.default_rng(inputs)
    first = rng.integers(1, 128, ((inputs + 1) // 2, 17))
    weight = np.stack([first, 127 - first], axis=1).reshape(-1, 17)[:inputs]
    weight = weight * rng.choice([-1, 1], 17) / 127
    rounded = round_columns(weight, np.full(17, 1 / 127, np.float32))
    assert (column_steps(weight) <= np.float32(1.0001 / 127)).all()
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ("n", inputs))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ("n", 17))],
        [numpy_helper.from_array(rounded, "weight")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10),
        tmp_path / "product.onnx",
    )
    session = open_session(tmp_path / "product.onnx", 1, lean=lean)
    for rows in (1, 2, 5, 16):
        x = np.full((rows, inputs), 255, np.uint8)
        (got,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(got, x.astype(np.int64) @ rounded.astype(np.int64))

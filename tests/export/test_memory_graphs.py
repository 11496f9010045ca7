"""The graphs of other memories: what they take, what they compute, and whose weights they read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

import ppllava_export.graphs
from ppllava_engines.bundle import Bundle, GraphSpec, TensorSpec
from ppllava_engines.engine import open_engine
from ppllava_engines.errors import InternalError
from ppllava_engines.memory_layout import to_int8
from ppllava_engines.onnxruntime import open_session
from ppllava_export.calibration import observe
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.graphs import export_pool, export_vision
from ppllava_export.memory_graphs import export_memory_graphs
from tiny_checkpoint import Family, write_checkpoint

Array = NDArray[Any]

FRAMES = 5
WINDOWS = [((2, 2, 2), (2, 2, 2)), ((2, 3, 2), (1, 1, 2)), ((5, 4, 4), (1, 1, 1))]


@dataclass(frozen=True)
class Graphs:
    """The graphs in a folder, and what is fed to them."""

    folder: Path
    specs: dict[str, GraphSpec]

    @property
    def numpy_type(self) -> Any:
        return np.dtype(self.specs["text"].outputs[0].dtype)

    @property
    def pixels(self) -> Array:
        rng = np.random.default_rng(0)
        return rng.standard_normal((FRAMES, 3, 32, 32)).astype(self.numpy_type)

    @property
    def text(self) -> Array:
        (width,) = self.specs["text"].outputs[0].shape[1:]
        text = np.random.default_rng(1).standard_normal((1, int(width)))
        return (text / np.linalg.norm(text)).astype(self.numpy_type)

    def run(self, name: str, **feeds: Array) -> dict[str, Array]:
        spec = self.specs[name]
        got = open_engine(self.folder / spec.path, spec, "cpu", 1).run(feeds)
        return {key: np.asarray(value) for key, value in got.items()}

    def see(self, name: str) -> dict[str, Array]:
        return self.run(name, pixel_values=self.pixels)

    def of_tokens(self, tokens: Array) -> dict[str, Array]:
        """What the vision graph makes of given tokens: keys, hidden and the keys' norms."""
        model = onnx.load(self.folder / self.specs["vision"].path)
        (norm,) = (node.output[0] for node in model.graph.node if node.op_type == "Clip")
        pixels = model.graph.input[0]
        model.graph.output.append(helper.make_tensor_value_info(norm, TensorProto.FLOAT, None))
        for node in model.graph.node:
            node.output[:] = ["" if n == "vision_tokens" else n for n in node.output]
        kind = pixels.type.tensor_type.elem_type
        shape = ["T", *tokens.shape[1:]]  # fixed, ONNX Runtime would not load the static int8 one
        model.graph.input.append(helper.make_tensor_value_info("vision_tokens", kind, shape))
        del model.graph.value_info[:]
        kept = [node for node in model.graph.node if any(node.output)]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        path = self.folder / "graphs/of_tokens.onnx"
        onnx.save(model, path)
        session = open_session(path, 1)
        path.unlink()
        feeds = {"pixel_values": self.pixels, "vision_tokens": tokens.astype(self.numpy_type)}
        names = [output.name for output in session.get_outputs()]
        return dict(zip([*names[:2], "norms"], session.run(names, feeds), strict=True))


def window(kernel: tuple[int, ...], stride: tuple[int, ...]) -> dict[str, Array]:
    return {"kernel": np.array(kernel), "stride": np.array(stride)}


def pooled_by_groups(
    graphs: Graphs, tokens: Array, weights: Array, axes: dict[str, Array]
) -> Array:
    (kernel, *_), (stride, *_) = axes["kernel"], axes["stride"]
    parts = [
        graphs.run(
            "pool_tokens",
            tokens=tokens[first : first + kernel],
            weights=weights[first : first + kernel],
            **axes,
        )["pooled"]
        for first in range(0, len(tokens) - kernel + 1, stride)
    ]
    return np.concatenate(parts)


def far(got: Array, expected: Array) -> float:
    """The largest error as a share of the largest magnitude."""
    assert got.shape == expected.shape
    difference = np.abs(got.astype(np.float64) - expected).max()
    return float(difference / np.abs(expected.astype(np.float64)).max())


def exported(folder: Path, *, family: Family = "clip", static: bool = False) -> Graphs:
    """Fp32 graphs of a checkpoint of the test's own."""
    checkpoint = load_checkpoint(write_checkpoint(folder, family=family), limit=torch.inf)
    model, config = checkpoint.model(), checkpoint.config
    seen = None
    if static:
        pixels = np.random.default_rng(0).standard_normal((FRAMES, 3, 32, 32)).astype(np.float32)
        with torch.no_grad():
            seen = observe(model, [pixels])
    projector = model.multi_modal_projector
    text = TensorSpec("text_embed", "float32", (1, config.projection_dim))
    specs = {
        "vision": export_vision(checkpoint, torch.float32, folder, seen),
        "text": GraphSpec("", (), (text,)),
        "pool": export_pool(checkpoint, torch.float32, folder),
    }
    specs |= export_memory_graphs(projector, config.grid, torch.float32, folder)
    return Graphs(folder, specs)


def copied(bundle: Path, folder: Path) -> Graphs:
    shutil.copytree(bundle / "graphs", folder / "graphs")
    return Graphs(folder, Bundle.open(bundle).manifest.graphs)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def fp32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "siglip":
        return exported(folder, family="siglip")
    return copied(request.getfixturevalue("bundle"), folder)


@pytest.fixture(scope="module")
def fp16(bundle_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return copied(bundle_fp16, tmp_path_factory.mktemp("fp16"))


def described(spec: GraphSpec) -> list[list[str]]:
    return [[f"{t.name} {t}" for t in tensors] for tensors in (spec.inputs, spec.outputs)]


def test_they_take_and_give_what_the_contract_says(fp16: Graphs) -> None:
    assert {name: described(spec) for name, spec in fp16.specs.items() if "_" in name} == {
        "pool_int8": [
            [
                "keys float16 (T,16,16)",
                "hidden int8 (T,16,64)",
                "scales float32 (T,16)",
                "text_embed float16 (1,16)",
                "kernel int64 (3)",
                "stride int64 (3)",
            ],
            ["pooled float16 (N,64)", "relevance float32 (T,4,4)"],
        ],
        "vision_tokens": [
            ["pixel_values float16 (T,3,32,32)"],
            ["tokens float16 (T,16,32)", "norms float32 (T,16)"],
        ],
        "weigh_tokens": [
            ["tokens float16 (T,16,32)", "norms float32 (T,16)", "text_embed float16 (1,16)"],
            ["relevance float32 (T,4,4)", "weights float32 (T,4,4)"],
        ],
        "pool_tokens": [
            [
                "tokens float16 (t,16,32)",
                "weights float32 (t,4,4)",
                "kernel int64 (3)",
                "stride int64 (3)",
            ],
            ["pooled float16 (N,64)"],
        ],
    }


def test_fp32_bundles_have_a_float16_memory_too(fp32: Graphs) -> None:
    inputs, outputs = described(fp32.specs["pool_fp16"])
    assert [text.split(" (")[0] for text in inputs] == [
        "keys float16",
        "hidden float16",
        "text_embed float32",
        "kernel int64",
        "stride int64",
    ]
    assert outputs == ["pooled float32 (N,64)", "relevance float32 (T,4,4)"]
    for spec in fp32.specs.values():
        if not spec.path:
            continue
        onnx.checker.check_model(onnx.load(fp32.folder / spec.path), full_check=True)


def test_tokens_are_those_that_keys_and_hidden_are_made_of(fp32: Graphs) -> None:
    seen, kept = fp32.see("vision"), fp32.see("vision_tokens")
    again = fp32.of_tokens(kept["tokens"])
    for name, expected in (seen | {"norms": kept["norms"][..., None]}).items():
        np.testing.assert_array_equal(again[name], expected)


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_tokens_pool_as_keys_and_hidden_do(
    fp32: Graphs, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    tokens = fp32.see("vision_tokens")["tokens"].astype(np.float16)
    made, axes = fp32.of_tokens(tokens.astype(np.float32)), window(kernel, stride)
    norms = made.pop("norms")[..., 0]
    expected = fp32.run("pool", text_embed=fp32.text, **made, **axes)
    weighed = fp32.run("weigh_tokens", tokens=tokens, norms=norms, text_embed=fp32.text)
    assert far(weighed["relevance"], expected["relevance"]) <= 1e-5
    assert weighed["weights"].sum() == pytest.approx(1, abs=1e-5)
    pooled = pooled_by_groups(fp32, tokens, weighed["weights"], axes)
    assert far(pooled, expected["pooled"]) <= 1e-5


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
def test_small_memories_lose_what_their_rounding_does(
    fp32: Graphs, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    seen, axes = fp32.see("vision"), window(kernel, stride)
    expected = fp32.run("pool", text_embed=fp32.text, **seen, **axes)
    half = {name: array.astype(np.float16) for name, array in seen.items()}
    rounded, scales = to_int8(seen["hidden"])
    # Exactly what a wide memory gives that was rounded alike: but for the sums' own rounding of
    # float16, the memories' graphs lose nothing more.
    for name, feeds, like, limit in (
        ("pool_fp16", half, half["hidden"], 2e-3),
        (
            "pool_int8",
            {"keys": half["keys"], "hidden": rounded, "scales": scales},
            rounded * scales[..., None],
            1e-5,
        ),
    ):
        got = fp32.run(name, text_embed=fp32.text, **feeds, **axes)
        wide = {"keys": half["keys"].astype(np.float32), "hidden": like.astype(np.float32)}
        same = fp32.run("pool", text_embed=fp32.text, **wide, **axes)
        assert far(got["pooled"], same["pooled"]) <= limit
        np.testing.assert_array_equal(got["relevance"], same["relevance"])
        assert far(got["pooled"], expected["pooled"]) <= 0.02
    assert np.abs(rounded.astype(int)).max() == 127


def test_no_array_of_a_question_about_clip_tokens_has_keys(fp16: Graphs) -> None:
    model = onnx.load(fp16.folder / fp16.specs["weigh_tokens"].path)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (attribute.g for attribute in scan.attribute if attribute.name == "body")
    products = [node for node in body.node if node.op_type == "MatMul"]
    assert [node.input[1] for node in products] == ["direction"]
    outside = {node.op_type for node in model.graph.node}
    assert outside == {"Cast", "Transpose", "MatMul", "Scan", "Reshape", "Mul", "Softmax"}


def test_frames_come_in_any_number(fp32: Graphs) -> None:
    tokens = fp32.see("vision_tokens")
    one = {name: array[:1] for name, array in tokens.items()}
    one["tokens"] = one["tokens"].astype(np.float16)
    weighed = fp32.run("weigh_tokens", text_embed=fp32.text, **one)
    assert weighed["weights"].shape == (1, 4, 4)
    axes = window((1, 2, 2), (1, 2, 2))
    feeds = {"tokens": one["tokens"], "weights": weighed["weights"]}
    assert fp32.run("pool_tokens", **feeds, **axes)["pooled"].shape == (4, 64)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_parts_of_a_static_int8_graph_stay_int8(tmp_path: Path, family: Family) -> None:
    graphs = exported(tmp_path, family=family, static=True)
    tokens = graphs.see("vision_tokens")["tokens"].astype(np.float16)
    made, axes = graphs.of_tokens(tokens.astype(np.float32)), window((2, 2, 2), (2, 2, 2))
    norms = made.pop("norms")[..., 0]
    expected = graphs.run("pool", text_embed=graphs.text, **made, **axes)
    weighed = graphs.run("weigh_tokens", tokens=tokens, norms=norms, text_embed=graphs.text)
    pooled = pooled_by_groups(graphs, tokens, weighed["weights"], axes)
    # Rounded by the same steps; a value at the edge of one may fall to either side of it.
    assert far(weighed["relevance"], expected["relevance"]) <= 0.02
    assert far(pooled, expected["pooled"]) <= 0.02
    for name in ("weigh_tokens", "pool_tokens"):
        model = onnx.load(graphs.folder / graphs.specs[name].path)
        assert any(t.data_type == TensorProto.INT8 and t.dims for t in model.graph.initializer)


def test_weights_in_data_files_are_not_stored_twice(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Graphs(bundle, Bundle.open(bundle).manifest.graphs)
    monkeypatch.setattr(ppllava_export.graphs, "EXTERNAL_BYTES", 0)
    beside = exported(tmp_path)
    files = {path.name for path in (tmp_path / "graphs").iterdir()}
    names = set(beside.specs) - {"text"}
    assert files == {f"{name}.onnx" for name in names} | {"vision.onnx.data", "pool.onnx.data"}
    places: dict[str, set[tuple[str, ...]]] = {}
    for name in ("vision", "pool", *(names - {"vision", "pool"})):
        model = onnx.load(tmp_path / beside.specs[name].path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                place = tuple(entry.value for entry in tensor.external_data)
                places.setdefault(tensor.name, set()).add(place)
            else:  # no weight: a norm's at most
                assert tensor.ByteSize() < 1024, (name, tensor.name)
        assert model.ByteSize() < 64 << 10
    assert "linear_2_weight" in places
    assert all(len(found) == 1 for found in places.values()), places
    for name in ("vision", "vision_tokens"):
        for key, expected in inside.see(name).items():
            np.testing.assert_array_equal(beside.see(name)[key], expected)
    tokens = inside.see("vision_tokens")
    tokens["tokens"] = tokens["tokens"].astype(np.float16)
    weights = [
        graphs.run("weigh_tokens", text_embed=graphs.text, **tokens)["weights"]
        for graphs in (inside, beside)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    axes = window((2, 2, 2), (1, 2, 2))
    pooled = [
        pooled_by_groups(graphs, tokens["tokens"], weights[0], axes) for graphs in (inside, beside)
    ]
    np.testing.assert_array_equal(pooled[0], pooled[1])


def test_a_bfloat16_bundle_has_none(checkpoint: Path, tmp_path: Path) -> None:
    projector = load_checkpoint(checkpoint, limit=torch.inf).model().multi_modal_projector
    assert export_memory_graphs(projector, (4, 4), torch.bfloat16, tmp_path) == {}


def test_a_vision_graph_of_another_kind_is_refused(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle / "graphs", tmp_path / "graphs")
    model = onnx.load(tmp_path / "graphs/vision.onnx")
    (divide,) = (node for node in model.graph.node if node.op_type == "Div")
    divide.op_type = "Mul"
    onnx.save(model, tmp_path / "graphs/vision.onnx")
    projector = load_checkpoint(checkpoint, limit=torch.inf).model().multi_modal_projector
    with pytest.raises(InternalError, match="keys of the vision graph come from Mul, expected"):
        export_memory_graphs(projector, (4, 4), torch.float32, tmp_path)

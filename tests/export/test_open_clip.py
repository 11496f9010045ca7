"""An open_clip model's alignment in a checkpoint computes what open_clip itself computes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    NotFoundError,
    PPLLaVAError,
    UsageError,
)
from ppllava_export import export_bundle
from ppllava_export.checkpoint import Checkpoint, load_checkpoint, load_config
from ppllava_export.config_files import read_model_config
from ppllava_export.graphs import export_text, export_vision
from ppllava_export.modules.alignment import SiglipProjector
from ppllava_export.modules.config import ModelConfig
from ppllava_export.open_clip_source import OpenClipSpec, replace_alignment
from tiny_checkpoint import save_tensors, write_checkpoint

open_clip = pytest.importorskip(
    "open_clip", reason="open_clip_torch, which is compared with, is missing"
)

ALIGNMENT = ("multi_modal_projector.clip_", "multi_modal_projector.logit_")
TOLERANCE = 2e-5  # of the largest magnitude, as for every stage in fp32
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {
    "context_length": 40,
    "vocab_size": 514,
    "width": 48,
    "heads": 3,
    "layers": 2,
}
CLIP: dict[str, Any] = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP: dict[str, Any] = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        **TEXT,
        "mlp_ratio": 2.5,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


def changed(part: str, **fields: Any) -> dict[str, Any]:
    return {**CLIP, part: {**CLIP[part], **fields}}


MODELS: dict[str, dict[str, Any]] = {
    "tiny-gelu": CLIP,
    "tiny-quickgelu": {**CLIP, "quick_gelu": True},
    "tiny-own-text": {**CLIP, "custom_text": True},
    "tiny-tanh": changed("text_cfg", act_kwargs={"approximate": "tanh"}, context_length=77),
    "tiny-eps": changed("vision_cfg", norm_kwargs={"eps": 1e-3}),
    "tiny-siglip": SIGLIP,
    "tiny-wide": changed("vision_cfg", width=64),
    "tiny-last": changed("text_cfg", pool_type="last", no_causal_mask=True),
    "tiny-scaled": changed("text_cfg", ls_init_value=0.1),
    "tiny-blocks": changed("text_cfg", qk_norm=True),
    "tiny-unprojected": changed("text_cfg", proj_type="none"),
    "tiny-pooler": changed("vision_cfg", attentional_pool=True, attn_pooler_heads=4),
    "tiny-resnet": changed("vision_cfg", layers=[1, 1, 1, 1], width=32),
    "tiny-hub": changed("text_cfg", hf_model_name="nowhere/nothing"),
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(sizes), encoding="utf-8")
    open_clip.add_model_config(folder)


def build(name: str) -> Any:
    """An open_clip model with weights of which none is what it would be without training."""
    torch.manual_seed(5)
    model = open_clip.create_model(name, load_weights=False)
    for parameter in model.parameters():
        if parameter.ndim < 2 and parameter.numel() > 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    nn.init.constant_(model.logit_scale, 3.1)
    return model.requires_grad_(False).eval()


def save(model: nn.Module, path: Path) -> str:
    """The spec that names the model's weights, which are in `path` afterwards."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".pt":  # as open_clip's training saves it on several devices
        parallel = {f"module.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": parallel}, path)
    else:
        torch.save(tensors, path)
    return str(path)


def question(model: Any, length: int, end: int) -> Tensor:
    """Ids (1, context_length) from 1 to below the ends, `end` at last, zeros after it."""
    ids = torch.zeros(1, model.context_length, dtype=torch.int64)
    ids[0, :length] = torch.randint(1, 500, (length,), generator=torch.manual_seed(length))
    ids[0, length - 1] = end
    return ids


def near(actual: Any, expected: Tensor) -> None:
    np.testing.assert_allclose(
        np.asarray(actual), expected.numpy(), rtol=0, atol=TOLERANCE * float(expected.abs().max())
    )


def expected_keys(model: Any, tokens: Tensor) -> Tensor:
    return F.normalize(model.visual.ln_post(tokens) @ model.visual.proj, dim=-1)


FILES = {
    "tiny-gelu": ".safetensors",
    "tiny-quickgelu": ".safetensors",
    "tiny-own-text": ".bin",
    "tiny-tanh": ".pt",
    "tiny-eps": ".safetensors",
}


@pytest.fixture(params=FILES)
def aligned(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path
) -> tuple[Any, Checkpoint]:
    """A model, and the tiny checkpoint with that model's alignment."""
    model = build(request.param)
    file = save(model, tmp_path / f"weights{FILES[request.param]}")
    return model, load_checkpoint(checkpoint, clip=f"open_clip:{request.param}:{file}")


def test_modules_compute_what_open_clip_computes(aligned: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = aligned
    projector = checkpoint.model().multi_modal_projector
    for length in (2, 9, model.context_length):
        ids = question(model, length, 513)
        near(projector.text_embed(ids[:, :length]), model.encode_text(ids, normalize=True))
    tokens = 3 * torch.randn(2, 16, 32, generator=torch.manual_seed(1))
    near(projector.keys(tokens), expected_keys(model, tokens))
    assert checkpoint.logit_scale() == pytest.approx(float(model.logit_scale.exp()))
    text = checkpoint.config.text
    assert (text.positions, text.extended) == (model.context_length, False)


def run(folder: Path, name: str, **inputs: Tensor) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(
        folder / f"graphs/{name}.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    feed = {key: value.numpy() for key, value in inputs.items()}
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("aligned", ["tiny-gelu", "tiny-quickgelu"], indirect=True)
def test_graphs_compute_what_open_clip_computes(
    aligned: tuple[Any, Checkpoint], tmp_path: Path
) -> None:
    model, checkpoint = aligned
    export_text(checkpoint, torch.float32, tmp_path)
    export_vision(checkpoint, torch.float32, tmp_path)
    ids = question(model, 12, 513)
    text = run(tmp_path, "text", input_ids=ids[:, :12])["text_embed"]
    near(text, model.encode_text(ids, normalize=True))
    pixels = torch.randn(3, 3, 32, 32, generator=torch.manual_seed(2))
    tokens = checkpoint.model().vision_tower.vision_model(pixels)
    keys = run(tmp_path, "vision", pixel_values=pixels)["keys"]
    near(keys, expected_keys(model, tokens))


# The SigLIP family


@pytest.fixture
def siglip(checkpoint: Path) -> ModelConfig:
    """The config of a checkpoint whose vision tower is as wide as timm's test model."""
    config = load_config(checkpoint)
    encoder = replace(config.vision.encoder, hidden_size=64, hidden_act="gelu_pytorch_tanh")
    return replace(
        config,
        family="siglip",
        vision=replace(config.vision, encoder=encoder),
        text=replace(config.text, bos_token_id=None, eos_token_id=1, pad_token_id=1),
        projection_dim=64,
    )


@pytest.fixture
def siglip_model() -> Any:
    pytest.importorskip("timm", reason="timm, which open_clip's SigLIP towers are of, is missing")
    return build("tiny-siglip")


def test_siglip_computes_what_open_clip_computes(
    siglip: ModelConfig, siglip_model: Any, tmp_path: Path
) -> None:
    file = save(siglip_model, tmp_path / "weights.safetensors")
    config, tensors = replace_alignment(siglip, f"open_clip:tiny-siglip:{file}")
    assert (config.text.pad_token_id, config.text.positions) == (1, TEXT["context_length"])
    with torch.device("meta"):
        projector = SiglipProjector(config).requires_grad_(False).eval()
    given = {name.removeprefix("multi_modal_projector."): t for name, t in tensors.items()}
    given["logit_scale"] = given["logit_scale"].reshape(projector.logit_scale.shape)
    absent = projector.load_state_dict(given, assign=True, strict=False)
    assert not absent.unexpected_keys
    assert all(name.startswith("linear_") for name in absent.missing_keys)
    ids = question(siglip_model, TEXT["context_length"], 1)
    near(projector.text_embed(ids), siglip_model.encode_text(ids, normalize=True))
    # Attention over one token alone gives its value, so that the head without its output
    # projection is what PPLLaVA does with every token.
    trunk = siglip_model.visual.trunk
    nn.init.eye_(trunk.attn_pool.proj.weight)
    nn.init.zeros_(trunk.attn_pool.proj.bias)
    tokens = 3 * torch.randn(10, 1, 64, generator=torch.manual_seed(3))
    pooled = trunk.attn_pool(trunk.norm(tokens))
    near(projector.keys(tokens)[:, 0], F.normalize(pooled, dim=-1))


def test_families_do_not_mix(checkpoint: Path, siglip: ModelConfig, siglip_model: Any) -> None:
    del siglip_model  # it is only known to be there
    with pytest.raises(IncompatibleError, match=r"pools 'last'.*no causal mask.*CLIP family"):
        replace_alignment(load_config(checkpoint), "open_clip:tiny-siglip")
    with pytest.raises(IncompatibleError, match=r"pools 'argmax'.*causal mask.*SigLIP family"):
        replace_alignment(siglip, "open_clip:tiny-gelu")
    encoder = replace(siglip.vision.encoder, hidden_size=72)
    wide = replace(siglip, vision=replace(siglip.vision, encoder=encoder))
    with pytest.raises(IncompatibleError, match=r"is 64 wide, the checkpoint's 72; .*gives 64"):
        replace_alignment(wide, "open_clip:tiny-siglip")
    ends = replace(siglip, text=replace(siglip.text, eos_token_id=514))
    with pytest.raises(IncompatibleError, match="vocabulary of 514 lacks"):
        replace_alignment(ends, "open_clip:tiny-siglip")


# Checkpoints without what is replaced


@pytest.mark.parametrize("named", [None, "org/unknown", "../empty"])
def test_what_is_replaced_need_not_be_there(tmp_path: Path, named: str | None) -> None:
    folder = write_checkpoint(tmp_path, clip_weight=named)
    shutil.rmtree(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    tensors = load_file(folder / "model.safetensors")
    replaced = [name for name in tensors if name.startswith(ALIGNMENT)]
    assert len(replaced) > 30
    save_tensors(folder, {name: t for name, t in tensors.items() if name not in replaced})
    with pytest.raises(DataError):
        load_checkpoint(folder)
    model = build("tiny-gelu")
    spec = f"open_clip:tiny-gelu:{save(model, tmp_path / 'weights.safetensors')}"
    if named is not None:
        projector = load_checkpoint(folder, clip=spec).model().multi_modal_projector
        ids = question(model, 9, 513)
        near(projector.text_embed(ids[:, :9]), model.encode_text(ids, normalize=True))
        return
    manifest = export_bundle(folder, tmp_path / "bundle", clip=spec, skip_tokenizer=True)
    assert (manifest.model.text_positions, manifest.model.text_eos_token_id) == (40, 513)


def test_a_siglip_checkpoint_needs_no_text_tower_either(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, family="siglip", clip_weight=None)
    config, files = read_model_config(folder, shapes=None)
    assert (config.projection_dim, files.clip) == (32, None)
    assert (config.text.eos_token_id, config.text.pad_token_id) == (1, 1)


# Random weights


def test_random_weights_are_warned_of_and_always_the_same(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again = (warned(config, "open_clip:tiny-gelu") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = first["multi_modal_projector.clip_text_model.encoder.layers.1.mlp.fc1.weight"]
    assert weights.std() > 0.01


def warned(config: ModelConfig, spec: str) -> dict[str, Tensor]:
    with pytest.warns(UserWarning, match="random weights.*name a file"):
        return replace_alignment(config, spec)[1]


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-wide", "is 64 wide, the checkpoint's 32"),
        ("tiny-last", r"pools 'last', expected 'argmax'; .* has no causal mask"),
        ("tiny-scaled", "scale what they add"),
        ("tiny-blocks", "text blocks are CustomResidualAttentionBlock"),
        ("tiny-unprojected", "text projection is missing"),
        ("tiny-pooler", "VisionTransformer, does not end in the norm"),
        ("tiny-resnet", "ModifiedResNet, does not end in the norm"),
        ("tiny-hub", "'nowhere/nothing'"),
        ("coca_ViT-B-32", "it is a CoCa"),
    ],
)
def test_models_that_the_graphs_cannot_compute(checkpoint: Path, name: str, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message) as caught:
        load_checkpoint(checkpoint, clip=f"open_clip:{name}")
    assert caught.value.exit_code == 78
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("tiny-gelu", UsageError, "expected open_clip:MODEL"),
        ("clip:tiny-gelu", UsageError, "expected open_clip:MODEL"),
        ("open_clip:", UsageError, "expected open_clip:MODEL"),
        ("open_clip:tiny-gelu:", UsageError, "expected open_clip:MODEL"),
        ("open_clip:tiny-gelo", UsageError, "no model 'tiny-gelo', expected e.g. .*tiny-gelu"),
        ("open_clip:hf-hub", UsageError, "no model 'hf-hub'"),
        ("open_clip:tiny-gelu:none.safetensors", NotFoundError, "no file none.safetensors"),
        ("open_clip:hf-hub:org/name", NotFoundError, "no file org/name"),
    ],
)
def test_specs_that_name_nothing(
    checkpoint: Path, spec: str, kind: type[PPLLaVAError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        replace_alignment(load_config(checkpoint), spec)


def test_spec_keeps_colons_of_the_file() -> None:
    spec = OpenClipSpec.parse("open_clip:ViT-B-32:a:b.pt")
    assert spec == OpenClipSpec("ViT-B-32", Path("a:b.pt"))
    assert spec.warning() is None


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("ran",)


def spoil(model: Any, path: Path, kind: str) -> None:
    """Writes weights that are wrong in one way."""
    tensors: dict[str, Any] = {name: t.contiguous() for name, t in model.state_dict().items()}
    if kind == "missing":
        del tensors["ln_final.weight"], tensors["visual.conv1.weight"]
    elif kind == "unexpected":
        tensors["more"] = torch.zeros(2)
    elif kind == "misshapen":
        tensors["text_projection"] = tensors["text_projection"][:, :7]
    elif kind == "nan":
        tensors["ln_final.weight"] = torch.full((48,), torch.nan)
    elif kind == "integers":
        tensors["ln_final.weight"] = torch.zeros(48, dtype=torch.int8)
    elif kind == "code":
        tensors["more"] = Code()
    torch.save(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "linked":
        os.link(path, path.with_name("other"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"2 missing: .*visual\.conv1\.weight"),
        ("unexpected", r"1 unexpected: more \(2,\)"),
        ("misshapen", r"1 misshapen: text_projection \(48, 7\) instead of \(48, 20\)"),
        ("nan", r"final_layer_norm\.weight \(nan\)"),
        ("integers", r"final_layer_norm\.weight \(torch\.int8\)"),
        ("code", "mkdir"),
        ("truncated", "weights.pt"),
        ("linked", "hard links"),
    ],
)
def test_files_that_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(build("tiny-gelu"), tmp_path / "weights.pt", kind)
    with pytest.raises(DataError, match=message):
        load_checkpoint(checkpoint, clip=f"open_clip:tiny-gelu:{tmp_path / 'weights.pt'}")
    assert not (tmp_path / "ran").exists()

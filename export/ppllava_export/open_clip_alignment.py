"""The parts of an open_clip model that bring questions and patches together, in PPLLaVA's terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .modules.config import EncoderConfig, ModelConfig, TextConfig

_PROJECTOR = "multi_modal_projector."
_TEXT = f"{_PROJECTOR}clip_text_model."
_MODELS = ("CLIP", "CustomTextCLIP")
_BLOCK = "ResidualAttentionBlock"
_HEAD = "AttentionPoolLatent"


class OpenClipAlignment:
    """A view of an open_clip model beside the config of a checkpoint that it is meant for.

    The model's classes are known by their names, because open_clip and timm are only imported
    where a model is built.
    """

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        self._model: Any = model
        self._text: Any = getattr(model, "text", model)
        self._visual: Any = model.get_submodule("visual")
        self._config = config
        self._siglip = config.family == "siglip"

    def reasons(self) -> Iterator[str]:
        """Yields every reason why PPLLaVA's graphs cannot compute what this model computes."""
        kind = type(self._model).__name__
        if kind not in _MODELS:
            yield f"it is a {kind}, expected one of {', '.join(_MODELS)}"
            return
        yield from self._text_reasons()
        yield from self._siglip_reasons() if self._siglip else self._clip_reasons()

    def config(self) -> ModelConfig:
        """Returns the checkpoint's config with this model's sizes."""
        text, block = self._text, self._text.transformer.resblocks[0]
        encoder = EncoderConfig(
            hidden_size=text.positional_embedding.shape[1],
            intermediate_size=block.mlp.c_fc.out_features,
            num_hidden_layers=len(text.transformer.resblocks),
            num_attention_heads=block.attn.num_heads,
            hidden_act=_activation(block.mlp.gelu),
            layer_norm_eps=text.ln_final.eps,
        )
        vocab_size, positions = text.token_embedding.num_embeddings, len(text.positional_embedding)
        tower = self._config.vision.encoder
        if self._siglip:
            mlp = self._visual.trunk.attn_pool.mlp
            head = replace(
                tower,
                intermediate_size=mlp.fc1.out_features,
                hidden_act=_activation(mlp.act),
                layer_norm_eps=self._visual.trunk.norm.eps,
            )
            ids = replace(self._config.text, encoder=encoder)
        else:
            head = replace(tower, layer_norm_eps=self._visual.ln_post.eps)
            # Pooled is the highest id, which CLIP's tokenizers give to the end.
            ids = TextConfig(encoder, 0, 0, False, vocab_size - 2, vocab_size - 1)
        return replace(
            self._config,
            text=replace(ids, vocab_size=vocab_size, positions=positions, extended=False),
            projection_dim=len(self._text_projection()),
            visual_head=head,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by their names in a checkpoint, as far as possible as views."""
        text = self._text
        parts = {
            f"{_TEXT}embeddings.token_embedding.weight": text.token_embedding.weight,
            f"{_TEXT}embeddings.position_embedding.weight": text.positional_embedding,
            **_affine(f"{_TEXT}final_layer_norm", text.ln_final),
            f"{_PROJECTOR}logit_scale": self._model.logit_scale,
        }
        for index, block in enumerate(text.transformer.resblocks):
            parts |= _block(f"{_TEXT}encoder.layers.{index}.", block)
        parts |= self._siglip_tensors() if self._siglip else self._clip_tensors()
        return {name: tensor.detach() for name, tensor in parts.items()}

    def _text_reasons(self) -> Iterator[str]:
        text, block = self._text, self._text.transformer.resblocks[0]
        if type(block).__name__ != _BLOCK:
            yield f"its text blocks are {type(block).__name__}, expected {_BLOCK}"
            return
        if not isinstance(block.ls_1, nn.Identity):
            yield "its text blocks scale what they add"
        if getattr(text, "cls_emb", None) is not None:
            yield "its text tower has a class token"
        if not _activation(block.mlp.gelu):
            yield f"its text tower's activation is {type(block.mlp.gelu).__name__}"
        pool = getattr(text, "text_pool_type", None) or text.pool_type
        expected = "last" if self._siglip else "argmax"
        if pool != expected:
            yield f"its text tower pools {pool!r}, expected {expected!r}"
        if (text.attn_mask is None) is not self._siglip:
            masks = ("has a causal mask", "has no causal mask")
            yield f"its text tower {masks[text.attn_mask is None]}"
        linear = isinstance(text.text_projection, nn.Linear)
        if text.text_projection is None or linear is not self._siglip:
            kinds = ("a matrix", "a linear layer")
            found = "missing" if text.text_projection is None else kinds[linear]
            yield f"its text projection is {found}, expected {kinds[self._siglip]}"

    def _clip_reasons(self) -> Iterator[str]:
        visual, width = self._visual, self._config.vision.encoder.hidden_size
        norm, projection = getattr(visual, "ln_post", None), getattr(visual, "proj", None)
        if norm is None or projection is None or visual.attn_pool is not None:
            yield (
                f"its vision tower, a {type(visual).__name__}, does not end in the norm and the "
                "projection of the CLIP family"
            )
        elif norm.normalized_shape != (width,):
            yield f"its vision tower is {norm.normalized_shape[0]} wide, the checkpoint's {width}"

    def _siglip_reasons(self) -> Iterator[str]:
        width = self._config.vision.encoder.hidden_size
        trunk = getattr(self._visual, "trunk", None)
        pool: Any = getattr(trunk, "attn_pool", None)
        plain = (
            trunk is not None
            and type(pool).__name__ == _HEAD
            and pool.pos_embed is None
            and pool.kv.bias is not None
            and isinstance(pool.q, nn.Linear)
            and isinstance(pool.norm, nn.LayerNorm)
            and isinstance(trunk.norm, nn.LayerNorm)
            and _activation(pool.mlp.act)
            and all(isinstance(part, nn.Identity) for part in (pool.mlp.norm, trunk.fc_norm))
            and not len(self._visual.head)
        )
        if not plain:
            yield (
                f"its vision tower, a {type(self._visual).__name__}, does not end in the norm and "
                "the attention pooling of the SigLIP family"
            )
        elif pool.kv.in_features != width:
            yield f"its vision tower is {pool.kv.in_features} wide, the checkpoint's {width}"
        projection = self._text.text_projection
        if isinstance(projection, nn.Linear) and projection.out_features != width:
            yield f"its text tower gives {projection.out_features} numbers, patches have {width}"
        text, vocab_size = self._config.text, self._text.token_embedding.num_embeddings
        if max(text.eos_token_id, text.pad_token_id or 0) >= vocab_size:
            yield f"its vocabulary of {vocab_size} lacks the checkpoint's end or padding token"

    def _text_projection(self) -> Tensor:
        """Returns the matrix (P, width) that ends the text tower."""
        projection = self._text.text_projection
        return projection.weight if isinstance(projection, nn.Linear) else projection.T

    def _clip_tensors(self) -> dict[str, Tensor]:
        return {
            f"{_PROJECTOR}clip_text_projection.weight": self._text_projection().contiguous(),
            f"{_PROJECTOR}clip_visual_projection.weight": self._visual.proj.T.contiguous(),
            **_affine(f"{_PROJECTOR}clip_visual_ln", self._visual.ln_post),
        }

    def _siglip_tensors(self) -> dict[str, Tensor]:
        pool, head = self._visual.trunk.attn_pool, f"{_PROJECTOR}clip_visual_head."
        return {
            **_affine(f"{_TEXT}head", self._text.text_projection),
            **_affine(f"{_PROJECTOR}clip_visual_ln", self._visual.trunk.norm),
            # A checkpoint packs the three; of these only the last is ever computed with.
            f"{head}attention.in_proj_weight": torch.cat([pool.q.weight, pool.kv.weight]),
            f"{head}attention.in_proj_bias": torch.cat([pool.q.bias, pool.kv.bias]),
            **_affine(f"{head}layernorm", pool.norm),
            **_affine(f"{head}mlp.fc1", pool.mlp.fc1),
            **_affine(f"{head}mlp.fc2", pool.mlp.fc2),
        }


def _block(name: str, block: Any) -> dict[str, Tensor]:
    parts = {
        **_affine(f"{name}layer_norm1", block.ln_1),
        **_affine(f"{name}layer_norm2", block.ln_2),
        **_affine(f"{name}self_attn.out_proj", block.attn.out_proj),
        **_affine(f"{name}mlp.fc1", block.mlp.c_fc),
        **_affine(f"{name}mlp.fc2", block.mlp.c_proj),
    }
    for kind in ("weight", "bias"):
        packed = getattr(block.attn, f"in_proj_{kind}").chunk(3)
        for letter, part in zip("qkv", packed, strict=True):
            parts[f"{name}self_attn.{letter}_proj.{kind}"] = part
    return parts


def _affine(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _activation(module: nn.Module) -> str:
    """Returns what checkpoints call this activation, "" for one that they do not have."""
    if isinstance(module, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[module.approximate]
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else ""

"""The tensors that published checkpoints carry and no module here reads."""

from __future__ import annotations

import re

from .config import ModelConfig

_TOWER = re.escape("vision_tower.vision_model.")
_PROJECTOR = re.escape("multi_modal_projector.")
_BLOCK = re.compile(rf"{_TOWER}(encoder\.layers|btadapter_[ST]_layers)\.(\d+)\..*")
_ANY = re.compile(
    rf"{_TOWER}(post_layernorm|head)\..*"  # what follows the tower's features
    r"|(.*\.)?position_ids"  # buffers
    r"|language_model\..*\.rotary_emb\.inv_freq"
)
_SIGLIP = re.compile(
    # the pooling head's query and output: of its attention only the values are computed
    rf"{_PROJECTOR}clip_visual_head\.(probe|attention\.out_proj\.(weight|bias))"
    rf"|{_PROJECTOR}logit_bias"  # the same for every token, so that no softmax sees it
)
_BRANCH = re.compile(rf"{_TOWER}btadapter_(time_embed\.weight|cls_token)")


def is_unused(name: str, config: ModelConfig) -> bool:
    """Returns whether a checkpoint of `config` may hold the tensor `name` though it is not read.

    Such are the blocks behind the features' layer, as many as the config states and no more.
    """
    block = _BLOCK.fullmatch(name)
    if block is not None:
        index, adapter = int(block[2]), config.vision.btadapter
        if block[1] == "encoder.layers":
            return config.trunk_blocks <= index < config.vision.encoder.num_hidden_layers
        return adapter is not None and config.branch_blocks <= index < adapter.depth
    if _BRANCH.fullmatch(name):
        return config.vision.btadapter is not None and not config.frames_coupled
    siglip = config.family == "siglip" and _SIGLIP.fullmatch(name) is not None
    return siglip or _ANY.fullmatch(name) is not None

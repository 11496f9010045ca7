"""What `clip_weight` names: a folder, a known model, or nothing but the tensors' shapes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppllava_engines.errors import DataError
from ppllava_export.checkpoint import load_config
from ppllava_export.config_files import text_token_ids
from ppllava_export.modules.config import ModelConfig
from refusals import refuses
from tiny_checkpoint import Family, Tensors, edit_json, save_tensors, write_checkpoint

TEXT_TOWER = "multi_modal_projector.clip_text_model."


def edited(folder: Path, **changes: str) -> ModelConfig:
    edit_json(folder / "config.json", **changes)
    return load_config(folder)


def test_clip_is_found_by_absolute_and_relative_folder(clip: Path) -> None:
    relative = load_config(clip)
    assert edited(clip, clip_weight=str((clip / "../clip").resolve())) == relative
    (clip.parent / "clip" / "config.json").unlink()
    refuses(load_config, clip, DataError, 65, "/clip: has no config.json")


PRESETS = {
    "clip": "openai/clip-vit-large-patch14-336",
    "siglip": "google/siglip-so400m-patch14-384",
}


def test_a_known_clip_needs_no_folder(clip: Path) -> None:
    known = edited(clip, clip_weight=PRESETS["clip"])
    assert (known.text.vocab_size, known.text.positions, known.projection_dim) == (49408, 248, 768)
    shutil.copytree(clip.parent / "clip", clip / PRESETS["clip"])
    assert load_config(clip) != known  # its own config.json comes first
    (clip / PRESETS["clip"] / "config.json").unlink()  # a folder of tokenizer files alone
    assert load_config(clip) == known


def test_a_known_siglip_fits_its_own_tower_only(siglip: Path) -> None:
    edit_json(siglip / "config.json", clip_weight=PRESETS["siglip"])
    refuses(load_config, siglip, DataError, 65, "projection_size is 1152", "expected 32")
    edit_json(siglip / "config.json", clip_weight=PRESETS["clip"])
    refuses(
        load_config, siglip, DataError, 65, "number of heads"
    )  # of the other family: not known here


@pytest.mark.parametrize(("family", "positions"), [("clip", (248, 77)), ("siglip", (196, 64))])
def test_an_unknown_clip_is_told_from_the_tensors(
    tmp_path: Path, family: Family, positions: tuple[int, int]
) -> None:
    for extended in (True, False):
        folder = write_checkpoint(
            tmp_path / str(extended), family=family, extend_clip=extended, clip_weight="some/clip"
        )
        place = f"put {family}'s config.json into {folder / 'some/clip'}"
        refuses(
            load_config, folder, DataError, 65, "number of heads", place
        )  # 24 channels are no heads of 64
        resized(folder, 128)
        text = load_config(folder).text
        assert text.encoder.num_attention_heads == 2
        assert text.encoder.num_hidden_layers == 2
        assert text.encoder.intermediate_size == 48
        assert text.vocab_size == {"clip": 514, "siglip": 48}[family]
        assert text.positions == positions[0 if extended else 1]
        assert text_token_ids(text) == {"clip": (512, 513), "siglip": (None, 1)}[family]


def test_the_largest_siglip_has_wider_heads(siglip: Path) -> None:
    edit_json(siglip / "config.json", clip_weight="some/siglip")
    resized(siglip, 1152)
    assert load_config(siglip).text.encoder.num_attention_heads == 16


def test_a_checkpoint_without_a_text_tower_tells_nothing(clip: Path) -> None:
    edit_json(clip / "config.json", clip_weight=None)
    save_tensors(clip, {"other": np.zeros(1, np.float32)})
    refuses(load_config, clip, DataError, 65, "no clip text tower", "name it by clip_weight")


def resized(folder: Path, width: int) -> None:
    """Makes the text tower so wide, of which only the shapes are looked at."""
    tensors: Tensors = load_file(folder / "model.safetensors")
    output = ("clip_text_projection.weight", "clip_text_model.head.weight")
    for name, tensor in tensors.items():
        if name.startswith(TEXT_TOWER) or name.endswith(output):
            shape = [width if size == 24 else size for size in tensor.shape]
            tensors[name] = np.zeros(shape, np.float32)
    save_tensors(folder, tensors)

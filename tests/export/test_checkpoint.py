"""What is wrong with a checkpoint is said in one sentence, of the right class, naming all of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ppllava_engines.errors import DataError, IncompatibleError, NotFoundError, PPLLaVAError
from ppllava_export.checkpoint import load_checkpoint, load_config
from tiny_checkpoint import Tensors, edit_json, save_tensors, write_checkpoint, write_json

LN = "multi_modal_projector.clip_visual_ln.weight"
LINEAR = "multi_modal_projector.linear_1.weight"
NORM = "language_model.model.norm.weight"


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return tmp_path / "copy" / checkpoint.name


def edit_tensors(checkpoint: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    edit(tensors)
    save_tensors(checkpoint, tensors)


def fails(folder: Path, kind: type[PPLLaVAError], exit_code: int, *names: str) -> None:
    with pytest.raises(kind) as caught:
        load_checkpoint(folder)
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    sentence = str(caught.value)
    assert "\n" not in sentence
    for name in names:
        assert name in sentence


def test_every_wrong_tensor_is_named_at_once(broken: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[LN], tensors[NORM]
        tensors["multi_modal_projector.clip_visual_head.probe"] = np.zeros((1, 2), np.float32)
        tensors[LINEAR] = tensors[LINEAR].T.copy()

    edit_tensors(broken, edit)
    named = ["2 missing", LN, NORM, "1 unexpected", "clip_visual_head.probe (1, 2)"]
    named += ["1 misshapen", f"{LINEAR} (32, 64) instead of (64, 32)"]
    fails(broken, DataError, 65, *named)


def test_declared_tensors_may_be_there_or_not(broken: Path) -> None:
    def edit(tensors: Tensors) -> None:
        unused = [n for n in tensors if "vision_model.encoder.layers.3" in n or "post_lay" in n]
        assert len(unused) == 18
        for name in [*unused, "image_newline"]:
            del tensors[name]
        tensors["vision_tower.vision_model.head.probe"] = np.zeros(1, np.float32)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17)[None]
        tensors["multi_modal_projector.clip_text_model.embeddings.position_ids"] = np.arange(3)

    edit_tensors(broken, edit)
    load_checkpoint(broken).model()


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.encoder.layers.4.mlp.fc1.bias",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc3.bias",
        "vision_tower.vision_model.btadapter_layers.0.weight",
        "image_newline.extra",
    ],
)
def test_what_is_not_declared_is_unexpected(broken: Path, name: str) -> None:
    edit_tensors(broken, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    fails(broken, DataError, 65, "1 unexpected", name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(broken: Path, value: float) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[LINEAR][3, 5] = value
        tensors[NORM][0] = value

    edit_tensors(broken, edit)
    fails(broken, DataError, 65, LINEAR, NORM)


def test_values_that_fp16_cannot_hold_are_refused(broken: Path) -> None:
    edit_tensors(broken, lambda tensors: tensors[LINEAR].__setitem__((0, 0), -7e4))
    load_checkpoint(broken)
    with pytest.raises(DataError, match=f"above 65504.*{re.escape(LINEAR)}"):
        load_checkpoint(broken, limit=torch.finfo(torch.float16).max)


def test_unused_tensors_are_not_read(broken: Path) -> None:
    name = "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
    edit_tensors(broken, lambda tensors: tensors[name].fill(np.nan))
    load_checkpoint(broken)


def test_integers_are_not_weights(broken: Path) -> None:
    edit_tensors(broken, lambda t: t.update({LINEAR: t[LINEAR].astype(np.int8)}))
    fails(broken, IncompatibleError, 78, f"{LINEAR} (I8)")


def test_shards_read_as_one_file(broken: Path) -> None:
    whole = load_checkpoint(broken)
    shard(broken)
    sharded = load_checkpoint(broken)
    assert [path.name[:11] for path in sharded.weights.files] == ["model-00000", "model-00001"]
    for name, tensor in whole.model().state_dict().items():
        assert torch.equal(tensor, sharded.model().state_dict()[name]), name


def shard(folder: Path) -> dict[str, str]:
    """Replaces the one file by two with an index; returns the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": files})
    return files


def test_a_missing_shard_is_named(broken: Path) -> None:
    shard(broken)
    (broken / "model-00001-of-00002.safetensors").unlink()
    fails(broken, NotFoundError, 66, "model-00001-of-00002.safetensors")


def test_an_index_that_lies_is_named(broken: Path) -> None:
    files = shard(broken)
    files[LN] = next(file for file in files.values() if file != files[LN])
    write_json(broken / "model.safetensors.index.json", {"weight_map": files})
    fails(broken, DataError, 65, LN)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "", "..", 3])
def test_an_index_stays_in_its_folder(broken: Path, file: object) -> None:
    files: dict[str, object] = dict(shard(broken))
    files[LN] = file
    write_json(broken / "model.safetensors.index.json", {"weight_map": files})
    fails(broken, DataError, 65, LN)


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_an_index_without_tensors_is_refused(broken: Path, weight_map: object) -> None:
    shard(broken)
    write_json(broken / "model.safetensors.index.json", {"weight_map": weight_map})
    fails(broken, DataError, 65, "weight_map")


@pytest.mark.parametrize("size", [0, 4, 8, 200, -100])
def test_truncated_weights_are_refused(broken: Path, size: int) -> None:
    path = broken / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    fails(broken, DataError, 65, "model.safetensors")


def test_missing_parts_are_named(broken: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", NotFoundError, 66, "nowhere")
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    fails(broken, NotFoundError, 66, "model.safetensors", "pickled")
    (broken / "pytorch_model.bin").unlink()
    fails(broken, NotFoundError, 66, "model.safetensors")
    (broken / "config.json").unlink()
    fails(broken, NotFoundError, 66, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "\xff"])
def test_malformed_config_is_refused(broken: Path, text: str) -> None:
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    fails(broken, DataError, 65, "config.json")


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "btadapter": {"btadapter": True},
    "qwen": {"qwen": True},
    "valuew_plus": {"valuew_plus": True},
    "pooling": {"pooling": "avp"},
    "model_type": {"model_type": "llava_onevision"},
    "vision_config.model_type": {"vision_config": {"model_type": "siglip_vision_model"}},
    "text_config.model_type": {"text_config": {"model_type": "qwen2"}},
    "projector_hidden_act": {"projector_hidden_act": "relu"},
    "vision_feature_select_strategy": {"vision_feature_select_strategy": "full"},
    "vision_feature_layer": {"vision_feature_layer": [-2, -5]},
    "hidden_act": {"vision_config": {"hidden_act": "mish"}},
    "auto_map": {"auto_map": {"AutoModel": "evil.Model"}},
    "text_config.auto_map": {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
    "quantization_config": {"quantization_config": {"quant_method": "awq"}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_variants_are_refused_by_name(broken: Path, name: str) -> None:
    edit_json(broken / "config.json", **UNSUPPORTED[name])
    fails(broken, IncompatibleError, 78, name)


def test_every_reason_to_refuse_is_named_at_once(broken: Path) -> None:
    edit_json(broken / "config.json", btadapter=True, qwen=True, pooling=None)
    fails(broken, IncompatibleError, 78, "btadapter is True", "qwen is True", "pooling is None")


WRONG: dict[str, dict[str, Any]] = {
    "pooling_kernel": {"pooling_kernel": [2, 3]},
    "at most [64, 4, 4]": {"pooling_kernel": [2, 3, 5]},
    "pooling_stride": {"pooling_stride": [2, 3, 0]},
    "image_pooling_kernel": {"image_pooling_kernel": [1, 2.5, 3]},
    "pooling_temp": {"pooling_temp": 0},
    "max_T": {"max_T": True},
    "frame_shape": {"frame_shape": [4, 5]},
    "image_token_index": {"image_token_index": 384},
    "vision_feature_layer": {"vision_feature_layer": -6},
    "hidden_size": {"vision_config": {"hidden_size": "wide"}},
    "patch_size": {"vision_config": {"patch_size": 64}},
    "vision_config": {"vision_config": 7},
    "Llama config": {"text_config": {"num_hidden_layers": "two"}},
    "clip_weight": {"clip_weight": 7},
    "extend_clip": {"extend_clip": "yes"},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(broken: Path, name: str) -> None:
    config = broken / "config.json"
    values = json.loads(config.read_text())
    for key, value in WRONG[name].items():
        nested = isinstance(value, dict) and isinstance(values[key], dict)
        values[key] = values[key] | value if nested else value
    write_json(config, values)
    fails(broken, DataError, 65, name, "config.json")


def test_wrong_neighbours_are_named(broken: Path) -> None:
    edit_json(broken / "generation_config.json", eos_token_id=[2, 999])
    fails(broken, DataError, 65, "generation_config.json", "eos_token_id")
    edit_json(broken / "generation_config.json", eos_token_id=[2, 0])
    edit_json(broken / "preprocessor_config.json", image_std=[1, 1, 0])
    fails(broken, DataError, 65, "preprocessor_config.json", "image_std")
    edit_json(broken / "preprocessor_config.json", image_std=[1, 1, 2])
    assert load_config(broken).eos_token_ids == (2, 0)
    assert load_config(broken).image_std == (1.0, 1.0, 2.0)


def test_clip_is_found_by_absolute_and_relative_folder(broken: Path) -> None:
    relative = load_config(broken)
    edit_json(broken / "config.json", clip_weight=str((broken / "../clip").resolve()))
    assert load_config(broken) == relative
    (broken.parent / "clip" / "config.json").unlink()
    fails(broken, NotFoundError, 66, "clip/config.json")


def test_a_known_clip_needs_no_folder(broken: Path) -> None:
    edit_json(broken / "config.json", clip_weight="openai/clip-vit-large-patch14-336")
    text = load_config(broken).text
    assert (text.encoder.hidden_size, text.encoder.num_attention_heads) == (768, 12)
    assert (text.vocab_size, text.positions) == (49408, 248)
    assert load_config(broken).projection_dim == 768


def test_a_known_clip_with_only_tokenizer_files_in_its_folder_is_still_known(broken: Path) -> None:
    name = "openai/clip-vit-large-patch14-336"
    edit_json(broken / "config.json", clip_weight=name)
    known = load_config(broken)
    shutil.copytree(broken.parent / "clip", broken / name)
    assert load_config(broken) != known  # its own config.json comes first
    (broken / name / "config.json").unlink()
    assert load_config(broken) == known


def test_an_unknown_clip_is_told_from_the_tensors(broken: Path) -> None:
    edit_json(broken / "config.json", clip_weight="someone/clip")
    place = f"put CLIP's config.json into {broken / 'someone/clip'}"
    fails(broken, NotFoundError, 66, "number of heads", place)  # 24 channels are no heads of 64

    def widen(tensors: Tensors) -> None:
        prefix = "multi_modal_projector.clip_text_model."
        for name in [name for name in tensors if name.startswith(prefix)]:
            shape = [128 if size == 24 else size for size in tensors[name].shape]
            tensors[name] = np.zeros(shape, np.float32)
        tensors["multi_modal_projector.clip_text_projection.weight"] = np.zeros((16, 128), "f4")

    edit_tensors(broken, widen)
    config = load_checkpoint(broken).config
    assert config.text.encoder.num_attention_heads == 2
    assert (config.text.vocab_size, config.text.positions) == (514, 248)
    assert config.projection_dim == 16


def test_a_pooling_shape_alone_gives_the_window(broken: Path) -> None:
    edit_json(
        broken / "config.json",
        pooling_kernel=None,
        pooling_stride=None,
        pllava_pooling_shape=[5, 2, 3],
    )
    config = load_config(broken)
    assert (config.kernel, config.stride) == ((8, 2, 2), (6, 2, 1))
    edit_json(broken / "config.json", pllava_pooling_shape=[5, 2, 5])
    fails(broken, DataError, 65, "pllava_pooling_shape")


def test_sparse_published_configs_mean_their_defaults(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    edit_json(checkpoint / "config.json", text_config={"hidden_size": None})
    assert load_config(checkpoint).decoder_width == 4096
    edit_json(checkpoint / "config.json", extend_clip=None)
    assert load_config(checkpoint).text.positions == 77


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    model = load_checkpoint(
        write_checkpoint(tmp_path, text_config={"tie_word_embeddings": True})
    ).model()
    decoder = model.language_model
    assert torch.equal(decoder.lm_head.weight, decoder.model.embed_tokens.weight)

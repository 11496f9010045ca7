"""What is wrong with a checkpoint's tensors is said in one sentence that names all of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ppllava_engines.errors import DataError, NotFoundError, PPLLaVAError
from ppllava_export.checkpoint import load_checkpoint
from refusals import refuses
from tiny_checkpoint import (
    Family,
    Tensors,
    edit_json,
    save_tensors,
    write_checkpoint,
    write_json,
)

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
    refuses(load_checkpoint, folder, kind, exit_code, *names)


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
    fails(broken, DataError, 65, f"{LINEAR} (torch.int8)")


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
    fails(broken, DataError, 65, "model-00001-of-00002.safetensors")


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
    (broken / "model.safetensors").unlink()
    fails(broken, DataError, 65, "model.safetensors")
    (broken / "config.json").unlink()
    fails(broken, NotFoundError, 66, "config.json")


SIGLIP_EXTRA = ["clip_visual_head.probe", "clip_visual_head.attention.out_proj.bias", "logit_bias"]


def test_what_siglip_never_reads_may_be_there_or_not(tmp_path: Path) -> None:
    siglip = write_checkpoint(tmp_path, family="siglip")
    found = load_file(siglip / "model.safetensors")
    unused = [name for name in found if name.endswith(tuple(SIGLIP_EXTRA))]
    unused += [name for name in found if "vision_model.head." in name or "post_lay" in name]
    assert len(unused) == len(SIGLIP_EXTRA) + 11 + 2
    edit_tensors(siglip, lambda tensors: tensors.update({n: tensors[n] * np.nan for n in unused}))
    load_checkpoint(siglip)
    edit_tensors(siglip, lambda tensors: [tensors.pop(name) for name in unused])
    load_checkpoint(siglip).model()


@pytest.mark.parametrize("name", SIGLIP_EXTRA)
def test_what_siglip_never_reads_is_unexpected_elsewhere(broken: Path, name: str) -> None:
    name = f"multi_modal_projector.{name}"
    edit_tensors(broken, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    fails(broken, DataError, 65, "1 unexpected", name)


def test_a_branch_is_read_as_deep_as_the_features(tmp_path: Path) -> None:
    tower = "vision_tower.vision_model.btadapter_"
    folder = write_checkpoint(tmp_path, btadapter=True)  # 3 blocks beside 4; features are of -2

    def blocks() -> set[str]:
        """T and S blocks by number, e.g. T0."""
        found = load_checkpoint(folder).model().state_dict()
        layers = (re.match(rf"{re.escape(tower)}([TS])_layers\.(\d+)", name) for name in found)
        return {layer[1] + layer[2] for layer in layers if layer}

    assert blocks() == {"T0", "S0", "T1", "S1"}
    edit_json(folder / "config.json", vision_feature_layer=-1)
    assert blocks() == {"T0", "S0", "T1", "S1", "T2", "S2"}
    edit_json(folder / "config.json", vision_feature_layer=1)  # where the branch begins
    assert blocks() == set()
    edit_json(folder / "config.json", btadapter_depth=2)
    fails(folder, DataError, 65, "28 unexpected", f"{tower}T_layers.2.temporal_fc.weight")
    edit_json(folder / "config.json", btadapter=False)
    fails(folder, DataError, 65, f"{tower}cls_token (1, 1, 32)")


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_logit_scale_has_either_shape(
    tmp_path: Path, family: Family, shape: tuple[int, ...]
) -> None:
    folder = write_checkpoint(tmp_path, family=family)
    name = "multi_modal_projector.logit_scale"
    edit_tensors(folder, lambda t: t.update({name: np.full(shape, 2.5, np.float32)}))
    assert load_checkpoint(folder).model().get_parameter(name).item() == 2.5
    edit_tensors(folder, lambda t: t.update({name: np.full((1, 1), 2.5, np.float32)}))
    fails(folder, DataError, 65, "1 misshapen", name)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("extended", [True, False])
def test_text_towers_have_one_table_or_two(tmp_path: Path, family: Family, extended: bool) -> None:
    folder = write_checkpoint(tmp_path, family=family, extend_clip=extended)
    load_checkpoint(folder).model()
    edit_json(folder / "config.json", extend_clip=not extended)
    fails(folder, DataError, 65, "embeddings.position_embedding", "missing", "unexpected")


@pytest.mark.parametrize("value", [88.8, 1e30, -88.0, 85.0])
def test_a_logit_scale_beyond_float32_is_refused(broken: Path, value: float) -> None:
    name = "multi_modal_projector.logit_scale"
    edit_tensors(broken, lambda t: t.update({name: np.full((), value, np.float32)}))
    fails(broken, DataError, 65, name, "pooling_temp 0.01", "float32's normal range")
    edit_tensors(broken, lambda t: t.update({name: np.full((), 80.0, np.float32)}))
    load_checkpoint(broken)


def test_sizes_that_torch_cannot_count_are_refused(broken: Path) -> None:
    sizes = {"hidden_size": 2**31 - 2, "intermediate_size": 2**31 - 1}
    edit_json(broken / "config.json", vision_config=sizes)
    fails(broken, DataError, 65, "sizes beyond any tensor's in config.json")


def test_a_path_that_is_not_utf8_is_refused(broken: Path) -> None:
    named = broken.rename(os.fsdecode(os.fsencode(broken.parent) + b"/caf\xe9"))
    fails(named, DataError, 65, "its path is not UTF-8, rename it")


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    model = load_checkpoint(
        write_checkpoint(tmp_path, text_config={"tie_word_embeddings": True})
    ).model()
    decoder = model.language_model
    assert torch.equal(decoder.lm_head.weight, decoder.model.embed_tokens.weight)

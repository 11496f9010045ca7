"""What config.json and its neighbours mean, for every family, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ppllava_engines.errors import DataError, IncompatibleError, PPLLaVAError
from ppllava_export.checkpoint import load_config
from ppllava_export.config_defaults import FAMILIES, KINDS
from ppllava_export.config_files import text_token_ids
from ppllava_export.modules.config import BTAdapterConfig, ModelConfig
from refusals import refuses
from tiny_checkpoint import Family, edit_json, write_json


def edited(folder: Path, **changes: Any) -> ModelConfig:
    edit_json(folder / "config.json", **changes)
    return load_config(folder)


def fails(folder: Path, kind: type[PPLLaVAError], exit_code: int, *names: str) -> None:
    refuses(load_config, folder, kind, exit_code, *names)


# What is left out


def written_out(config: Any, names: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_what_a_family_leaves_out_is_its_own_classes_default(family: Family) -> None:
    prefix = {"clip": "CLIP", "siglip": "Siglip"}[family]
    defaults = FAMILIES[family]
    for tower in ("vision", "text"):
        config = getattr(transformers, f"{prefix}{tower.title()}Config")()
        sizes = getattr(defaults, tower) | defaults.encoder
        assert written_out(config, sizes) == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_leaves_out_is_its_own_classs_default(kind: str) -> None:
    name = {"llava_next": "LlavaNextConfig", "llava_onevision": "LlavaOnevisionConfig"}[kind]
    config, defaults = getattr(transformers, name)(), KINDS[kind]
    assert written_out(config.vision_config, defaults.vision) == defaults.vision
    assert config.text_config.model_type == defaults.decoder
    assert config.vision_feature_layer == defaults.feature_layer
    assert config.image_token_index == defaults.image_token_index
    assert config.vision_feature_select_strategy == FAMILIES[defaults.family].strategy
    side = config.vision_config.image_size
    tiles = sorted((side * rows, side * columns) for rows, columns in defaults.tiles)
    assert sorted(map(tuple, config.image_grid_pinpoints)) == tiles


PUBLISHED: dict[str, dict[str, Any]] = {
    "vicuna": {
        "model_type": "llava_next",
        "btadapter": True,
        "btadapter_depth": 4,
        "max_T": 64,
        "clip_weight": "openai/clip-vit-large-patch14-336",
        "frame_shape": [24, 24],
        "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
    "qwen": {
        "model_type": "llava_onevision",
        "qwen": True,
        "clip_weight": "google/siglip-so400m-patch14-384",
        "frame_shape": [27, 27],
        "text_config": {
            "model_type": "qwen2",
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "vocab_size": 152000,
        },
    },
}
COMMON = {
    "pooling": "ppllava",
    "extend_clip": True,
    "pooling_kernel": [2, 3, 3],
    "pooling_stride": [2, 3, 3],
    "image_pooling_kernel": [1, 3, 3],
    "image_pooling_stride": [1, 3, 3],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sparse_published_configs_mean_their_defaults(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "config.json", COMMON | PUBLISHED[name])
    config = load_config(tmp_path)
    vision, text = config.vision.encoder, config.text.encoder
    assert config.text.extended
    if name == "vicuna":
        assert (config.family, config.grid, config.trunk_blocks) == ("clip", (24, 24), 23)
        assert config.vision.btadapter == BTAdapterConfig(depth=4, max_frames=64)
        assert (config.branch_blocks, config.frames_coupled, config.max_frames) == (3, True, 64)
        assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-5)
        assert (text.hidden_size, text.num_attention_heads, config.projection_dim) == (768, 12, 768)
        assert (config.text.positions, config.text.pad_token_id) == (248, None)
        assert text_token_ids(config.text) == (49406, 49407)
        assert (config.decoder_width, config.image_token_index) == (4096, 32000)
        assert config.decoder["num_hidden_layers"] == 32
        assert config.eos_token_ids == (2,)
        assert (672, 672) in config.image_grid_pinpoints
    else:
        assert (config.family, config.grid, config.trunk_blocks) == ("siglip", (27, 27), 26)
        assert (vision.hidden_act, vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
        assert (text.hidden_size, text.num_attention_heads, config.projection_dim) == (
            *(1152, 16),
            1152,
        )
        assert (config.text.positions, config.text.pad_token_id) == (196, 1)
        assert text_token_ids(config.text) == (None, 1)
        assert (config.decoder_width, config.image_token_index) == (3584, 151646)
        assert config.decoder["rope_parameters"]["rope_theta"] == 1e6
        assert config.decoder["rms_norm_eps"] == 1e-6
        assert config.eos_token_ids == (151645,)
        assert config.image_mean == config.image_std == (0.5, 0.5, 0.5)
        assert len(config.image_grid_pinpoints) == 36
        assert not config.frames_coupled


def test_ends_of_an_answer_may_be_stated_nowhere(siglip: Path) -> None:
    assert load_config(siglip).eos_token_ids == (2,)
    (siglip / "generation_config.json").unlink()
    assert load_config(siglip).eos_token_ids == (2,)
    assert edited(siglip, text_config={"eos_token_id": None}).eos_token_ids == ()


# The temporal branch


def test_the_branch_is_stated_for_the_whole_model_or_its_tower(clip: Path) -> None:
    tower = {"depth": 2, "max_T": 9}
    config = edited(clip, btadapter=True, vision_config=tower)
    assert config.vision.btadapter == BTAdapterConfig(depth=3, max_frames=64)
    config = edited(clip, btadapter_depth=None, max_T=None)
    assert config.vision.btadapter == BTAdapterConfig(depth=2, max_frames=9)
    assert config.max_frames == 9
    config = edited(clip, vision_config={"depth": None, "max_T": None})
    assert config.vision.btadapter == BTAdapterConfig(depth=4, max_frames=128)
    edit_json(clip / "config.json", btadapter_depth=5)
    fails(clip, DataError, 65, "btadapter_depth is 5", "at most 4")


@pytest.mark.parametrize(
    ("layer", "trunk", "branch"), [(-1, 4, 3), (-2, 3, 2), (2, 2, 1), (1, 1, 0), (-5, 0, 0)]
)
def test_frames_are_coupled_where_the_branch_has_begun(
    clip: Path, layer: int, trunk: int, branch: int
) -> None:
    config = edited(clip, btadapter=True, vision_feature_layer=layer)
    assert (config.trunk_blocks, config.branch_blocks) == (trunk, branch)
    assert config.frames_coupled == (branch > 0)
    assert not edited(clip, btadapter=False).frames_coupled


# The pooling window


def test_any_of_output_kernel_and_stride_follows_from_the_others(clip: Path) -> None:
    output = [5, 2, 3]
    config = edited(clip, pooling_kernel=None, pooling_stride=None, pllava_pooling_shape=output)
    assert (config.kernel, config.stride) == ((8, 2, 2), (6, 2, 1))  # of 32 frames
    assert config.window(8) == ((4, 2, 2), (1, 2, 1))
    config = edited(clip, pooling_kernel=[3, 3, 2])
    assert config.window(11) == ((3, 3, 2), (2, 1, 1))
    config = edited(clip, pooling_kernel=None, pooling_stride=[1, 2, 1])
    assert config.window(8) == ((4, 2, 2), (1, 2, 1))
    with pytest.raises(ValueError, match="5 windows"):
        config.window(4)
    edit_json(clip / "config.json", pooling_kernel=[3, 3, 2])
    fails(clip, DataError, 65, "pllava_pooling_shape is [5, 2, 3]", "both given")
    edit_json(clip / "config.json", pooling_kernel=None, pllava_pooling_shape=[5, 2, 5])
    fails(clip, DataError, 65, "pllava_pooling_shape", "axis w")


def test_windows_may_overlap_or_skip(clip: Path) -> None:
    config = edited(clip, pooling_kernel=[3, 2, 4], pooling_stride=[1, 3, 2])
    assert config.window(5) == (config.kernel, config.stride) == ((3, 2, 4), (1, 3, 2))


def test_images_are_pooled_as_videos_unless_told_otherwise(clip: Path) -> None:
    config = edited(clip, image_pooling_kernel=None)
    assert (config.image_kernel, config.image_stride) == ((2, 2, 2), (1, 2, 2))
    config = edited(clip, image_pooling_kernel=[1, 4, 3], image_pooling_stride=None)
    assert (config.image_kernel, config.image_stride) == ((1, 4, 3), (2, 2, 2))


def test_pinpoints_cut_into_whole_tiles(clip: Path) -> None:
    config = edited(clip, image_grid_pinpoints=[[32, 96], [64, 32]])
    assert config.image_grid_pinpoints == ((32, 96), (64, 32))
    assert edited(clip, image_grid_pinpoints=[]).image_grid_pinpoints == ()
    assert edited(clip, image_grid_pinpoints=None).image_grid_pinpoints == ()  # those are of 336
    assert edited(clip, image_grid_pinpoints=[[256, 256]]).image_grid_pinpoints == ((256, 256),)
    beyond = ([[32, 65 * 32]], [[9 * 32, 8 * 32]], [[32, 32]] * 513)
    for wrong in ([[32, 50]], [[32]], [[0, 32]], [32, 64], 7, [[32, "64"]], *beyond):
        edit_json(clip / "config.json", image_grid_pinpoints=wrong)
        fails(clip, DataError, 65, "image_grid_pinpoints", "multiples of 32")


# What is refused


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "valuew_plus": {"valuew_plus": True},
    "pooling": {"pooling": "avp"},
    "model_type": {"model_type": "llava"},
    "vision_config.model_type": {"vision_config": {"model_type": "siglip_vision_model"}},
    "text_config.model_type": {"text_config": {"model_type": "mistral"}},
    "text_config.use_sliding_window": {"text_config": {"use_sliding_window": True}},
    "projector_hidden_act": {"projector_hidden_act": "relu"},
    "multimodal_projector_bias": {"multimodal_projector_bias": False},
    "vision_feature_select_strategy": {"vision_feature_select_strategy": "full"},
    "vision_feature_layer": {"vision_feature_layer": [-2, -5]},
    "hidden_act": {"vision_config": {"hidden_act": "mish"}},
    "text_config: hidden_act is 'swigloo'": {"text_config": {"hidden_act": "swigloo"}},
    "partial_rotary_factor is 0.5": {"text_config": {"partial_rotary_factor": 0.5}},
    "rope_scaling: partial_rotary_factor": {
        "text_config": {"rope_scaling": {"partial_rotary_factor": 0.25}}
    },
    "rope_scaling: 'attn_logit_softcapping'": {
        "text_config": {"rope_scaling": {"attn_logit_softcapping": 30.0}}
    },
    "quantization_config": {"quantization_config": {"quant_method": "awq"}},
    "text_config.quantization_config": {"text_config": {"quantization_config": {}}},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_variants_are_refused_by_name(clip: Path, name: str) -> None:
    edit_json(clip / "config.json", **UNSUPPORTED[name])
    fails(clip, IncompatibleError, 78, name)


def test_every_reason_to_refuse_is_named_at_once(siglip: Path) -> None:
    edit_json(siglip / "config.json", btadapter=True, valuew_plus=True, pooling=None)
    fails(
        siglip,
        IncompatibleError,
        78,
        *("btadapter is True", "valuew_plus is True", "pooling is absent"),
    )


def test_a_family_is_all_of_one_kind(clip: Path) -> None:
    edit_json(clip / "config.json", qwen=True)
    named = ["vision_config.model_type is 'clip_vision_model' and only 'siglip_vision_model'"]
    fails(clip, IncompatibleError, 78, *named, "vision_feature_select_strategy is 'default'")
    edit_json(clip / "config.json", qwen=False)
    edit_json(clip.parent / "clip" / "config.json", model_type="siglip")
    fails(clip, DataError, 65, "clip/config.json", "model_type is 'siglip'", "'clip'")


@pytest.mark.parametrize("prefix", ["", "vision_config", "text_config"])
def test_code_is_never_run(clip: Path, prefix: str) -> None:
    code = {"auto_map": {"AutoModel": "evil.Model"}}
    edit_json(clip / "config.json", **({prefix: code} if prefix else code))
    fails(clip, DataError, 65, "auto_map", "config.json")
    if not prefix:
        edit_json(clip / "config.json", auto_map=None)
        edit_json(clip.parent / "clip" / "config.json", **code)
        fails(clip, DataError, 65, "auto_map", "clip/config.json")


WRONG: dict[str, dict[str, Any]] = {
    "pooling_kernel": {"pooling_kernel": [2, 3]},
    "at most [64, 4, 4]": {"pooling_kernel": [2, 3, 5]},
    "image_pooling_kernel is [1, 5, 3]": {"image_pooling_kernel": [1, 5, 3]},
    "pooling_stride": {"pooling_stride": [2, 3, 0]},
    "image_pooling_kernel": {"image_pooling_kernel": [1, 2.5, 3]},
    "pooling_temp": {"pooling_temp": 0},
    "max_T": {"max_T": True},
    "frame_shape": {"frame_shape": [4, 5]},
    "image_token_index": {"image_token_index": 384},
    "vision_feature_layer": {"vision_feature_layer": -6},
    "hidden_size": {"vision_config": {"hidden_size": "wide"}},
    "patch_size": {"vision_config": {"patch_size": 64}},
    "vision_config: num_hidden_layers": {"vision_config": {"num_hidden_layers": 10**9}},
    "vision_config": {"vision_config": 7},
    "Llama config": {"text_config": {"num_hidden_layers": "two"}},
    "text_config: num_hidden_layers": {"text_config": {"num_hidden_layers": 10**9}},
    "text_config: hidden_size": {"text_config": {"hidden_size": 0}},
    "text_config: head_dim is 0": {"text_config": {"head_dim": 0}},
    "at most 1048576, as the graph holds": {"text_config": {"max_position_embeddings": 2**20 + 1}},
    "model_type is 5": {"model_type": 5},
    "hidden_act is ['gelu']": {"vision_config": {"hidden_act": ["gelu"]}},
    "num_key_value_heads": {"text_config": {"num_key_value_heads": 3}},
    "spiral": {"text_config": {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}},
    "clip_weight": {"clip_weight": 7},
    "extend_clip": {"extend_clip": "yes"},
    "qwen": {"qwen": 1},
    "btadapter": {"btadapter": "yes"},
    f"max_T is '{'x' * 56}..., expected": {"max_T": "x" * 999},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(clip: Path, name: str) -> None:
    config = clip / "config.json"
    values = json.loads(config.read_text())
    for key, value in WRONG[name].items():
        nested = isinstance(value, dict) and isinstance(values[key], dict)
        values[key] = values[key] | value if nested else value
    write_json(config, values)
    fails(clip, DataError, 65, name, "config.json")


def test_wrong_neighbours_are_named(clip: Path) -> None:
    edit_json(clip / "generation_config.json", eos_token_id=[2, 999])
    fails(clip, DataError, 65, "generation_config.json", "eos_token_id")
    edit_json(clip / "generation_config.json", eos_token_id=[2, 0])
    edit_json(clip / "preprocessor_config.json", image_std=[1, 1, 0])
    fails(clip, DataError, 65, "preprocessor_config.json", "image_std")
    edit_json(clip / "preprocessor_config.json", image_mean=[0, -1, 2], image_std=[1, 1, 2])
    assert load_config(clip).eos_token_ids == (2, 0)
    assert load_config(clip).image_mean == (0.0, -1.0, 2.0)
    assert load_config(clip).image_std == (1.0, 1.0, 2.0)
    (clip / "generation_config.json").unlink()
    edit_json(clip / "config.json", text_config={"eos_token_id": 384})
    fails(clip, DataError, 65, "/config.json: text_config: eos_token_id is 384")


UNDECLARED = {
    "return_dict": False, "output_attentions": True, "torchscript": True, "use_cache": False,
    "hidden_activation": "relu", "attn_logit_softcapping": 30.0, "final_logit_softcapping": 5.0,
    "num_local_experts": 4, "seq_length": 16, "original_max_position_embeddings": 8,
    "partial_rotary_factor": 1.0, "pad_token_id": 151643,
}  # fmt: skip


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_other_models_fields_and_padding_are_left_out_of_the_decoder(
    request: pytest.FixtureRequest, family: Family
) -> None:
    folder: Path = request.getfixturevalue(family)
    before = load_config(folder).decoder
    assert before["rope_parameters"]["rope_theta"] == 10000.0
    assert edited(folder, text_config=UNDECLARED).decoder == before
    scaling = {"type": "linear", "factor": 2.0}
    after = edited(folder, text_config={"rope_theta": 5e5, "rope_scaling": scaling}).decoder
    rotation = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert rotation.items() <= after["rope_parameters"].items()


def test_one_layer_in_a_list_is_that_layer(clip: Path) -> None:
    assert edited(clip, vision_feature_layer=[-2]) == edited(clip, vision_feature_layer=-2)


def test_a_causal_text_tower_has_as_many_positions_as_are_traced(clip: Path) -> None:
    towers = clip.parent / "clip" / "config.json"
    edit_json(towers, text_config={"max_position_embeddings": 4})
    assert edited(clip, extend_clip=False).text.positions == 4
    edit_json(towers, text_config={"max_position_embeddings": 3})
    fails(clip, DataError, 65, "max_position_embeddings is 3", "at least 4")

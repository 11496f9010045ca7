"""config.json, its neighbours and the tokenizers, broken."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from broken_checkpoint import WEIGHTS, Named, edit_json


def configs() -> Named:
    wrong: dict[str, tuple[Any, ...]] = {
        "max_T": (0, -1, 1.5, "32", True, [], 1e400),
        "pooling_kernel": ([2, 2], [0, 2, 2], [2, 2, 2.5], "2", [2, 2, 999], [[2], 2, 2], {}),
        "pooling_stride": ([2, 2], [-2, 2, 2], 2, [True, 2, 2], ["2", "2", "2"], [10**400] * 3),
        "image_pooling_kernel": ([1], [1, 2, -2], [1, 99, 99]),
        "pooling_temp": (0, -0.01, "0.01", [], True, 1e400, 10**400, 1e-39, 1e39),
        "frame_shape": ([4], [4, 5], "4", {}),
        "image_token_index": (-1, 384, 10**30, 3.0, "3", [3]),
        "vision_feature_layer": (-6, 5, 1.5, "x", True, [], [-6], [1.5], ["x", "y"]),
        "model_type": (5, ["llava_next"], {}),
        "pooling": (5, ["ppllava"]),
        "valuew_plus": (1, "no"),
        "clip_weight": (7, [], {"a": 1}, True, "a\0b", "x" * 999),
        "extend_clip": (1, "yes", [], 0),
        "qwen": (1, "no", []),
        "vision_config": (7, [], "x"),
        "vision_config.hidden_size": (0, -32, 33, 32.0, "32", 10**30, 2**31 - 2),
        "vision_config.hidden_act": (5, ["gelu"]),
        "vision_config.image_size": (0, 4, "32", 2**40),
        "vision_config.patch_size": (0, 64, -8, 8.0),
        "vision_config.num_hidden_layers": (0, 10**9, 7, "4"),
        "vision_config.num_attention_heads": (0, 5, -2, None.__class__.__name__),
        "vision_config.layer_norm_eps": (0, -1e-5, "1e-5", 10**400),
        "text_config": (7, [], "llama"),
        "text_config.hidden_size": (0, 65, "64", 10**30, -64, 64.5),
        "text_config.num_hidden_layers": (10**9, -1, "2", 3),
        "text_config.num_key_value_heads": (0, 3, "2"),
        "text_config.vocab_size": (0, 383, "384", -1),
        "text_config.rms_norm_eps": ("x", [], -1, 10**400),
        "text_config.head_dim": (0, -16, 15, "16"),
        "text_config.hidden_act": (5, ["silu"]),
        "text_config.max_position_embeddings": (0, 2**20 + 1, 2**31 - 1, "512"),
        "text_config.model_type": (5, ["llama"]),
        "text_config.rope_theta": (0, -1, "x", 10**400),
        "text_config.partial_rotary_factor": (0, "1"),
        "text_config.eos_token_id": ("</s>", {}),
        "text_config.rope_scaling": (
            "x", {"rope_type": "nonsense"}, [1], {"rope_type": "linear", "factor": 0},
        ),
        "image_grid_pinpoints": (
            "x", [[1]], [[33, 32]], [[-32, 32]], {"a": 1}, [[32 * 10**9, 32]], [[32 * 9, 32 * 8]],
        ),
        "pllava_pooling_shape": ([2, 2], [99, 2, 2], "x"),
    }  # fmt: skip
    for path, values in wrong.items():
        for value in values:
            yield f"{path} is {value!r}", partial(_edit_config, path=path, value=value)
    map_ = {"AutoModel": "modeling_evil.Evil"}
    for path in ("auto_map", "text_config.auto_map", "vision_config.auto_map",
                 "text_config.rope_scaling.auto_map", "other.deep.auto_map"):  # fmt: skip
        yield path, partial(_edit_config, path=path, value=map_)
        yield f"{path} as text", partial(_edit_config, path=path, value="repo--file.Class")
    yield "auto_map in a list", partial(_edit_config, path="other", value=[{"auto_map": map_}])


def texts() -> Named:
    contents = {
        "empty": b"", "white": b" \n", "cut": b'{"model_type": "llava_ne', "a list": b"[]",
        "a word": b'"llava_next"', "nothing": b"null", "not UTF-8": b'{"a": "\xff\xfe"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"), "with a mark": b'\xef\xbb\xbf{"a": 1}',
        "nested deep": b'{"a":' * 100000 + b"1" + b"}" * 100000, "lists": b"[" * 100000,
        "duplicates": b'{"max_T": 8, "max_T": 9}', "inner duplicates": b'{"a": {"b": 1, "b": 2}}',
        "NaN": b'{"max_T": NaN}', "Infinity": b'{"max_T": Infinity}',
        "a huge number": b'{"max_T": 1' + b"0" * 10000 + b"}", "two values": b"{} {}",
        "a comment": b'{"a": 1} // note', "zeros": bytes(100), "a control": b'{"a": "\x00"}',
    }  # fmt: skip
    for name, content in contents.items():
        yield name, partial(_write, name="config.json", content=content)
    for neighbour in ("generation_config.json", "preprocessor_config.json", "../clip/config.json"):
        for name in ("empty", "a list", "not UTF-8", "nested deep", "duplicates", "NaN"):
            breaking = partial(_write, name=neighbour, content=contents[name])
            yield f"{neighbour} {name}", breaking


def neighbours() -> Named:
    wrong: dict[str, dict[str, tuple[Any, ...]]] = {
        "generation_config.json": {"eos_token_id": (-1, 384, "2", [], [2, 999], 2.0, {}, True)},
        "preprocessor_config.json": {
            "image_mean": ([0.5], "x", [0.5, 0.5, "0.5"], [10**400, 0, 0], [0, 0, 1e39], 0.5),
            "image_std": ([0, 0, 0], [0.5, 0.5, 0], {}, [0.5] * 4, [10**400] * 3, [1, 1, -1]),
            "num_frames": (0, -8, "8", 8.5, []),
        },
        "../clip/config.json": {
            "text_config": (7, []),
            "projection_dim": (0, "16", 17, -16),
            "model_type": ("bert", 7),
            "auto_map": ({"AutoModel": "x.Y"},),
        },
    }
    for name, fields in wrong.items():
        for field, values in fields.items():
            for value in values:
                breaking = partial(edit_json, name=name, path=field, value=value)
                yield f"{name} {field} is {value!r}", breaking


def tokenizers() -> Named:
    def vocabulary(checkpoint: Path, name: str, edit: Callable[[dict[str, int]], Any]) -> None:
        tokenizer = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        edit(tokenizer["model"]["vocab"])
        (checkpoint / name).write_text(json.dumps(tokenizer), encoding="utf-8")

    def beyond(words: dict[str, int]) -> None:
        words["beyond"] = 10**6

    def cut(checkpoint: Path, name: str) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    def panic(checkpoint: Path, name: str) -> None:
        tokenizer = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAECAw=="}
        (checkpoint / name).write_text(json.dumps(tokenizer), encoding="utf-8")

    def missing(checkpoint: Path, name: str) -> None:
        (checkpoint / name).unlink()

    for name in ("tokenizer.json", "../clip/tokenizer.json"):
        yield f"{name} cut", partial(cut, name=name)
        yield f"{name} that makes its reader panic", partial(panic, name=name)
        yield f"{name} missing", partial(missing, name=name)
        yield f"{name} beyond the table", partial(vocabulary, name=name, edit=beyond)
        for kind, content in {
            "empty": b"", "an object": b"{}", "a list": b"[]", "not UTF-8": b"\xff\xfe{",
            "nested deep": b'{"a":' * 5000 + b"1" + b"}" * 5000, "zeros": bytes(100),
            "another model": b'{"version": "1.0", "model": {"type": "Nonsense"}}',
        }.items():  # fmt: skip
            yield f"{name} {kind}", partial(_write, name=name, content=content)


def not_files() -> Named:
    def replace(checkpoint: Path, name: str, kind: str) -> None:
        path = checkpoint / name
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "of 3 GB":
            path.touch()
            os.truncate(path, 3 << 30)
        elif kind == "a socket":
            with socket.socket(socket.AF_UNIX) as bound:
                here = Path.cwd()
                os.chdir(path.parent)  # a socket's path must be short
                try:
                    bound.bind(path.name)
                finally:
                    os.chdir(here)
        else:
            path.symlink_to("/dev/zero" if kind == "a device" else "nowhere")

    for name in ("config.json", "generation_config.json", "preprocessor_config.json",
                 "tokenizer.json", WEIGHTS, "../clip/config.json",
                 "../clip/tokenizer.json"):  # fmt: skip
        for kind in ("a folder", "a pipe", "a socket", "a device", "a link to nothing", "of 3 GB"):
            yield f"{name} is {kind}", partial(replace, name=name, kind=kind)


def _edit_config(checkpoint: Path, path: str, value: Any) -> None:
    edit_json(checkpoint, "config.json", path, value)


def _write(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)

"""More than two hundred ways to break a checkpoint, each a function that breaks a copy of one."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import pickle
import random
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Breaking = Callable[[Path], None]
Named = Iterator[tuple[str, Breaking]]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CANARY = "canary"  # beside the checkpoint: what code in a pickle would make
_TOWER = "vision_tower.vision_model."
_FC1 = f"{_TOWER}encoder.layers.0.mlp.fc1.weight"
_KEYS = "multi_modal_projector.clip_visual_projection.weight"
_WORDS = "multi_modal_projector.clip_text_model.embeddings.token_embedding.weight"
_TABLE = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"
_SCALE = "multi_modal_projector.logit_scale"
_NEWLINE = "image_newline"
_NORM = "language_model.model.norm.weight"
_PARTS = (_FC1, _KEYS, _WORDS, _TABLE, _HEAD, _SCALE, _NEWLINE, _NORM)


def mutations() -> dict[str, Breaking]:
    """Each by its name; each is given a checkpoint's folder, which it may change as it likes."""
    found: dict[str, Breaking] = {}
    kinds = (_headers, _offsets, _values, _tensors, _shards, _indices, _pickles, _archives,
             _configs, _texts, _neighbours, _tokenizers, _not_files)  # fmt: skip
    for kind in kinds:
        for name, breaking in kind():
            full = f"{kind.__name__[1:]}: {name}"
            assert full not in found, full
            found[full] = breaking
    return found


# The safetensors file as bytes.


def _headers() -> Named:
    def cut(checkpoint: Path, share: float, less: int) -> None:
        content = (checkpoint / WEIGHTS).read_bytes()
        (checkpoint / WEIGHTS).write_bytes(content[: int(len(content) * share) + less])

    def lie(checkpoint: Path, length: int, relative: bool) -> None:
        content = (checkpoint / WEIGHTS).read_bytes()
        length += int.from_bytes(content[:8], "little") if relative else 0
        (checkpoint / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])

    def replace(checkpoint: Path, header: bytes) -> None:
        _write_raw(checkpoint / WEIGHTS, header, _read_raw(checkpoint / WEIGHTS)[1])

    def be(checkpoint: Path, content: bytes) -> None:
        (checkpoint / WEIGHTS).write_bytes(content)

    for size in (0, 1, 7, 8, 9, 100, 4000):
        yield f"cut to {size} bytes", partial(cut, share=0, less=size)
    rng = random.Random(0)
    for number in range(6):
        yield f"cut somewhere {number}", partial(cut, share=rng.uniform(0.05, 0.95), less=0)
    yield "last byte lost", partial(cut, share=1, less=-1)
    for length in (-1, 1, -100, 100):
        yield f"length {length:+} off", partial(lie, length=length, relative=True)
    for length in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"length {length}", partial(lie, length=length, relative=False)
    for name, header in {
        "empty": b"", "no JSON": b"{", "a list": b"[]", "a number": b"7",
        "not UTF-8": b'{"\xff": 0}',
        "no tensors": b"{}", "nested deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "NaN": b'{"a":NaN}', "zeros": bytes(64),
    }.items():  # fmt: skip
        yield f"header {name}", partial(replace, header=header)
    for name, content in {
        "a page": b"<!doctype html><title>404</title>",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
        "an archive": b"PK\x03\x04" + bytes(100),
        "a pickle": pickle.dumps({"a": 1}),
        "zeros": bytes(4096),
    }.items():
        yield f"file is {name}", partial(be, content=content)


def _offsets() -> Named:
    def change(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
        header, data = _read_raw(checkpoint / WEIGHTS)
        edit(header)
        _write_raw(checkpoint / WEIGHTS, json.dumps(header).encode(), data)

    def put(header: dict[str, Any], field: str, value: Any) -> None:
        header[_FC1][field] = value

    def moved(header: dict[str, Any], first: int, last: int) -> None:
        begin, end = header[_FC1]["data_offsets"]
        header[_FC1]["data_offsets"] = [begin + first, end + last]

    def same_place(header: dict[str, Any]) -> None:
        other = f"{_TOWER}encoder.layers.1.mlp.fc1.weight"
        header[other]["data_offsets"] = header[_FC1]["data_offsets"]

    def lose(header: dict[str, Any], field: str) -> None:
        del header[_FC1][field]

    for first, last in ((-4, -4), (4, 4), (-4, 0), (0, 4), (1, 1), (1 << 30, 1 << 30)):
        yield (
            f"moved by {first}, {last}",
            partial(change, edit=partial(moved, first=first, last=last)),
        )
    yield "overlapping", partial(change, edit=same_place)
    for value in (
        [8, 4],
        [-8, 0],
        [0, 2**63],
        [0, 10**30],
        [0.5, 1.5],
        [0],
        [],
        "0",
        None,
        [[0], 4],
    ):
        edit = partial(put, field="data_offsets", value=value)
        yield f"offsets {value}", partial(change, edit=edit)
    for value in ("F31", "f32", "I32", "U32", "F16", "BF16", "F64", "BOOL", "", None, 7, ["F32"]):
        yield f"dtype {value}", partial(change, edit=partial(put, field="dtype", value=value))
    for value in ([], [1], [64, 33], [32, 64], [-64, -32], [2**40, 2**40], [2048.0], "x", None):
        yield f"shape {value}", partial(change, edit=partial(put, field="shape", value=value))
    for field in ("dtype", "shape", "data_offsets"):
        yield f"without {field}", partial(change, edit=partial(lose, field=field))

    def longer(checkpoint: Path) -> None:
        with (checkpoint / WEIGHTS).open("ab") as stream:
            stream.write(bytes(8))

    yield "bytes after the last", longer


# The tensors.


def _values() -> Named:
    def put(checkpoint: Path, name: str, value: float) -> None:
        def edit(tensors: dict[str, NDArray[Any]]) -> None:
            flat = tensors[name].reshape(-1).copy()
            flat[len(flat) // 2] = value
            tensors[name] = flat.reshape(tensors[name].shape)

        _edit_tensors(checkpoint, edit)

    for name in _PARTS:
        for value in (np.nan, np.inf, -np.inf):
            yield f"{value} in {name}", partial(put, name=name, value=value)


def _tensors() -> Named:
    def editing(edit: Callable[[dict[str, NDArray[Any]]], Any]) -> Breaking:
        return partial(_edit_tensors, edit=edit)

    def cast(tensors: dict[str, NDArray[Any]], name: str, dtype: str) -> None:
        tensors[name] = tensors[name].astype(dtype)

    def shape(
        tensors: dict[str, NDArray[Any]], name: str, change: Callable[[NDArray[Any]], Any]
    ) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors[name]))

    def swap(tensors: dict[str, NDArray[Any]], first: str, second: str) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    def rename(tensors: dict[str, NDArray[Any]], old: str, new: str) -> None:
        tensors[new] = tensors.pop(old)

    def drop(tensors: dict[str, NDArray[Any]], prefix: str) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    def add(tensors: dict[str, NDArray[Any]], name: str) -> None:
        tensors[name] = np.zeros(3, np.float32)

    for name in (part for part in _PARTS if part != _NEWLINE):
        yield f"without {name}", editing(partial(drop, prefix=name))
    for prefix in ("", _TOWER, "multi_modal_projector.", "language_model.model.layers.1."):
        yield f"without any {prefix}", editing(partial(drop, prefix=prefix))
    for name in ("x", "", f"{_TOWER}encoder.layers.9.mlp.fc1.weight", "language_model.extra",
                 "__class__", "model.diffusion"):  # fmt: skip
        yield f"extra {name}", editing(partial(add, name=name))
    for dtype in ("int8", "uint8", "int32", "int64", "bool"):
        yield f"{dtype} matrix", editing(partial(cast, name=_FC1, dtype=dtype))
        yield f"{dtype} table", editing(partial(cast, name=_TABLE, dtype=dtype))
    changes: dict[str, Callable[[NDArray[Any]], Any]] = {
        "transposed": np.transpose, "flat": np.ravel, "empty": lambda a: a[:0],
        "a row less": lambda a: a[1:], "an axis more": lambda a: a[None],
        "a scalar": lambda a: a[0, 0],
    }  # fmt: skip
    for change, function in changes.items():
        for name in (_FC1, _KEYS, _TABLE):
            yield f"{change} {name}", editing(partial(shape, name=name, change=function))
    yield "newline of another width", editing(partial(shape, name=_NEWLINE, change=lambda a: a[1:]))
    yield "two scales", editing(partial(shape, name=_SCALE, change=lambda a: np.full(2, a)))
    yield "swapped", editing(partial(swap, first=_FC1, second=_TABLE))
    yield "renamed", editing(partial(rename, old=_FC1, new=f"{_FC1}s"))
    yield "prefixed", editing(partial(rename, old=_FC1, new=f"model.{_FC1}"))


# Shards, and the index that says which tensor is in which.


def _shards() -> Named:
    def first(checkpoint: Path) -> Path:
        split(checkpoint)
        return checkpoint / "model-00001-of-00003.safetensors"

    def missing(checkpoint: Path) -> None:
        first(checkpoint).unlink()

    def cut(checkpoint: Path) -> None:
        path = first(checkpoint)
        path.write_bytes(path.read_bytes()[:-100])

    def of_another(checkpoint: Path) -> None:
        path = first(checkpoint)
        path.write_bytes((checkpoint / "model-00002-of-00003.safetensors").read_bytes())

    def folder(checkpoint: Path) -> None:
        path = first(checkpoint)
        path.unlink()
        path.mkdir()

    def fifo(checkpoint: Path) -> None:
        path = first(checkpoint)
        path.unlink()
        os.mkfifo(path)

    def link(checkpoint: Path, target: str) -> None:
        path = first(checkpoint)
        path.unlink()
        path.symlink_to(target)

    def hard_link(checkpoint: Path) -> None:
        path = first(checkpoint)
        os.link(path, checkpoint.parent / "elsewhere")

    def single_hard_link(checkpoint: Path) -> None:
        os.link(checkpoint / WEIGHTS, checkpoint.parent / "elsewhere")

    yield from {"missing": missing, "cut": cut, "of another": of_another, "a folder": folder,
                "a pipe": fifo, "hard link": hard_link,
                "hard link of all": single_hard_link}.items()  # fmt: skip
    itself = "model-00001-of-00003.safetensors"
    for target in ("/dev/zero", "/etc/passwd", "/etc", "nowhere", "config.json", itself, "."):
        yield f"a link to {target}", partial(link, target=target)


def _indices() -> Named:
    def point(checkpoint: Path, shard: Any, every: bool) -> None:
        split(checkpoint)
        index = json.loads((checkpoint / INDEX).read_text())
        names = list(index["weight_map"]) if every else [_FC1]
        index["weight_map"] |= dict.fromkeys(names, shard)
        (checkpoint / INDEX).write_text(json.dumps(index))

    def be(checkpoint: Path, content: bytes) -> None:
        split(checkpoint)
        (checkpoint / INDEX).write_bytes(content)

    def outside(checkpoint: Path, absolute: bool) -> None:
        tensors = load_file(checkpoint / WEIGHTS)
        (checkpoint / WEIGHTS).unlink()
        elsewhere = checkpoint.parent / "elsewhere.safetensors"
        save_file(tensors, elsewhere)
        name = str(elsewhere) if absolute else "../elsewhere.safetensors"
        (checkpoint / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))

    def unlisted(checkpoint: Path) -> None:
        split(checkpoint)
        index = json.loads((checkpoint / INDEX).read_text())
        del index["weight_map"][_FC1]
        (checkpoint / INDEX).write_text(json.dumps(index))

    def another_shard(checkpoint: Path) -> None:
        split(checkpoint)
        index = json.loads((checkpoint / INDEX).read_text())
        shards = set(index["weight_map"].values()) - {index["weight_map"][_FC1]}
        index["weight_map"][_FC1] = min(shards)
        (checkpoint / INDEX).write_text(json.dumps(index))

    yield "another shard", another_shard
    yield "whole outside", partial(outside, absolute=False)
    yield "whole outside, absolute", partial(outside, absolute=True)
    yield "a tensor unlisted", unlisted
    for shard in ("../model.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "", ".",
                  "..", INDEX, "config.json", "model\0.safetensors", "./model.safetensors",
                  "..\\model.safetensors", 7, None, True, [],
                  {}, ["model.safetensors"], "x" * 5000 + ".safetensors"):  # fmt: skip
        yield f"points to {str(shard)[:40]!r}", partial(point, shard=shard, every=False)
    for shard in ("../x.safetensors", INDEX, "gone.safetensors"):
        yield f"all point to {shard!r}", partial(point, shard=shard, every=True)
    for name, content in {
        "empty": b"", "a list": b"[]", "no map": b"{}", "empty map": b'{"weight_map": {}}',
        "a list as map": b'{"weight_map": []}', "not UTF-8": b'{"weight_map": "\xff"}',
        "nested deep": b'{"weight_map":' * 5000 + b"{}" + b"}" * 5000, "cut": b'{"weight_map": {',
        "duplicates": b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}',
        "with a mark": b'\xef\xbb\xbf{"weight_map": {}}',
    }.items():  # fmt: skip
        yield name, partial(be, content=content)


# Pickles.


class _Runs:
    """Asks whoever unpickles it to call `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def _payloads(canary: Path) -> dict[str, Any]:
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    posix = importlib.import_module("posix")
    subprocess = importlib.import_module("subprocess")
    payload = _Runs(os.system, touch)
    return {
        "os.system": payload,
        "posix.system": _Runs(posix.system, touch),
        "builtins.eval": _Runs(builtins.eval, code),
        "builtins.exec": _Runs(builtins.exec, code),
        "subprocess": _Runs(subprocess.check_call, ["touch", str(canary)]),
        "runpy": _Runs(importlib.import_module("runpy").run_path, str(canary.with_suffix(".py"))),
        "nested": OrderedDict(a=[{"b": (torch.zeros(1), payload)}]),
        "among tensors": {_FC1: torch.zeros(2, 2), "x": payload},
        "as a key": {_Key(canary): torch.zeros(1)},
        "getattr": _Runs(getattr, _Runs(importlib.import_module, "os"), "system"),
        "open": _Runs(builtins.open, str(canary), "w"),
        "torch.load": _Runs(torch.load, str(canary)),
    }


class _Key(str):
    """A name whose unpickling runs code."""

    def __new__(cls, canary: Path) -> _Key:
        key = super().__new__(cls, "x")
        key.__dict__["canary"] = canary
        return key

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.__dict__['canary']}",)


def _pickles() -> Named:
    def archive(checkpoint: Path, payload: str, protocol: int, shard: bool) -> None:
        value = _payloads(checkpoint.parent / CANARY)[payload]
        (checkpoint / WEIGHTS).unlink()
        name = "pytorch_model-00001-of-00001.bin" if shard else PICKLE
        torch.save(value, checkpoint / name, pickle_protocol=protocol)
        if shard:
            (checkpoint / PICKLE_INDEX).write_text(json.dumps({"weight_map": {_FC1: name}}))

    def bare(checkpoint: Path, payload: str, protocol: int) -> None:
        value = _payloads(checkpoint.parent / CANARY)[payload]
        (checkpoint / WEIGHTS).unlink()
        (checkpoint / PICKLE).write_bytes(pickle.dumps(value, protocol))

    def legacy(checkpoint: Path) -> None:
        value = _payloads(checkpoint.parent / CANARY)["os.system"]
        (checkpoint / WEIGHTS).unlink()
        torch.save(value, checkpoint / PICKLE, _use_new_zipfile_serialization=False)

    def as_safetensors(checkpoint: Path) -> None:
        torch.save(_payloads(checkpoint.parent / CANARY)["os.system"], checkpoint / WEIGHTS)

    for payload in _payloads(Path(CANARY)):
        for protocol in range(6):
            name = f"{payload}, protocol {protocol}"
            yield name, partial(archive, payload=payload, protocol=protocol, shard=False)
        yield f"{payload} in a shard", partial(archive, payload=payload, protocol=2, shard=True)
    for protocol in range(6):
        yield f"bare, {protocol}", partial(bare, payload="os.system", protocol=protocol)
        yield f"bare eval, {protocol}", partial(bare, payload="builtins.eval", protocol=protocol)
    yield "of an old release", legacy
    yield "called safetensors", as_safetensors


def _archives() -> Named:
    def holds(checkpoint: Path, make: Callable[[], Any]) -> None:
        (checkpoint / WEIGHTS).unlink()
        torch.save(make(), checkpoint / PICKLE)

    def edited(
        checkpoint: Path,
        edit: Callable[[dict[str, bytes]], Any],
        compression: int = zipfile.ZIP_STORED,
    ) -> None:
        tensors = {name: torch.from_numpy(a) for name, a in load_file(checkpoint / WEIGHTS).items()}
        (checkpoint / WEIGHTS).unlink()
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        with zipfile.ZipFile(buffer) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        edit(entries)
        with zipfile.ZipFile(checkpoint / PICKLE, "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    def cut(checkpoint: Path, share: float) -> None:
        holds(checkpoint, lambda: {"a": torch.zeros(1000)})
        content = (checkpoint / PICKLE).read_bytes()
        (checkpoint / PICKLE).write_bytes(content[: int(len(content) * share)])

    def entry(entries: dict[str, bytes], end: str) -> str:
        return next(name for name in entries if name.endswith(end))

    def drop(entries: dict[str, bytes], end: str) -> None:
        del entries[entry(entries, end)]

    def shorten(entries: dict[str, bytes], share: float) -> None:
        name = entry(entries, "data/0")
        entries[name] = entries[name][: int(len(entries[name]) * share)]

    def overwrite(entries: dict[str, bytes], content: bytes) -> None:
        entries[entry(entries, "data.pkl")] = content

    def rename(entries: dict[str, bytes], name: str) -> None:
        entries[name] = entries.pop(entry(entries, "data.pkl"))

    yield "without its pickle", partial(edited, edit=partial(drop, end="data.pkl"))
    yield "without a storage", partial(edited, edit=partial(drop, end="data/0"))
    yield "with an empty storage", partial(edited, edit=partial(shorten, share=0))
    yield "with a short storage", partial(edited, edit=partial(shorten, share=0.5))
    yield "compressed", partial(edited, edit=len, compression=zipfile.ZIP_DEFLATED)
    for name in ("../data.pkl", "/data.pkl", "other/data.pkl", "data.pkl/x"):
        yield f"pickle at {name}", partial(edited, edit=partial(rename, name=name))
    for name, content in {
        "empty": b"", "cut": b"\x80\x02}", "noise": random.Random(1).randbytes(500),
        "endless": b"\x80\x02" + b"(" * 100000, "a stop": b".",
        "a far memo": b"\x80\x02h\xff.", "nested deep": b"\x80\x02" + b"]" * 50000 + b".",
    }.items():  # fmt: skip
        yield f"pickle {name}", partial(edited, edit=partial(overwrite, content=content))
    for share in (0.2, 0.5, 0.9):
        yield f"cut to {share}", partial(cut, share=share)
    values: dict[str, Callable[[], Any]] = {
        "a list": lambda: [torch.zeros(1)], "nothing": lambda: None, "numbers": lambda: {"a": 1},
        "a tensor": lambda: torch.zeros(3), "numbered": lambda: {1: torch.zeros(1)},
        "sparse": lambda: {"a": torch.zeros(3, 3).to_sparse()},
        "dicts": lambda: {"a": {"b": torch.zeros(1)}}, "no tensors": dict,
        "no values": lambda: {"a": torch.zeros(3, device="meta")},
    }  # fmt: skip
    for name, make in values.items():
        yield f"holds {name}", partial(holds, make=make)


# config.json.


def _configs() -> Named:
    wrong: dict[str, tuple[Any, ...]] = {
        "max_T": (0, -1, 1.5, "32", True, [], 1e400),
        "pooling_kernel": ([2, 2], [0, 2, 2], [2, 2, 2.5], "2", [2, 2, 999], [[2], 2, 2], {}),
        "pooling_stride": ([2, 2], [-2, 2, 2], 2, [True, 2, 2], ["2", "2", "2"]),
        "image_pooling_kernel": ([1], [1, 2, -2], [1, 99, 99]),
        "pooling_temp": (0, -0.01, "0.01", [], True, 1e400),
        "frame_shape": ([4], [4, 5], "4", {}),
        "image_token_index": (-1, 384, 10**30, 3.0, "3", [3]),
        "vision_feature_layer": (-6, 5, 1.5, "x", True),
        "clip_weight": (7, [], {"a": 1}, True, "a\0b"),
        "extend_clip": (1, "yes", [], 0),
        "qwen": (1, "no", []),
        "vision_config": (7, [], "x"),
        "vision_config.hidden_size": (0, -32, 33, 32.0, "32", 10**30),
        "vision_config.image_size": (0, 4, "32", 2**40),
        "vision_config.patch_size": (0, 64, -8, 8.0),
        "vision_config.num_hidden_layers": (0, 10**9, 7, "4"),
        "vision_config.num_attention_heads": (0, 5, -2, None.__class__.__name__),
        "vision_config.layer_norm_eps": (0, -1e-5, "1e-5"),
        "text_config": (7, [], "llama"),
        "text_config.hidden_size": (0, 65, "64", 10**30, -64, 64.5),
        "text_config.num_hidden_layers": (10**9, -1, "2", 3),
        "text_config.num_key_value_heads": (0, 3, "2"),
        "text_config.vocab_size": (0, 383, "384", -1),
        "text_config.rms_norm_eps": ("x", []),
        "text_config.eos_token_id": ("</s>", {}),
        "text_config.rope_scaling": ("x", {"rope_type": "nonsense"}, [1]),
        "image_grid_pinpoints": ("x", [[1]], [[33, 32]], [[-32, 32]], {"a": 1}),
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


def _texts() -> Named:
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


def _neighbours() -> Named:
    wrong: dict[str, dict[str, tuple[Any, ...]]] = {
        "generation_config.json": {"eos_token_id": (-1, 384, "2", [], [2, 999], 2.0, {}, True)},
        "preprocessor_config.json": {
            "image_mean": ([0.5], "x", [0.5, 0.5, "0.5"], [-1, 0.5, 0.5], 0.5),
            "image_std": ([0, 0, 0], [0.5, 0.5, 0], {}, [0.5] * 4),
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
                breaking = partial(_edit_json, name=name, path=field, value=value)
                yield f"{name} {field} is {value!r}", breaking


def _tokenizers() -> Named:
    def vocabulary(checkpoint: Path, name: str, edit: Callable[[dict[str, int]], Any]) -> None:
        tokenizer = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        edit(tokenizer["model"]["vocab"])
        (checkpoint / name).write_text(json.dumps(tokenizer), encoding="utf-8")

    def beyond(words: dict[str, int]) -> None:
        words["beyond"] = 10**6

    def cut(checkpoint: Path, name: str) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    for name in ("tokenizer.json", "../clip/tokenizer.json"):
        yield f"{name} cut", partial(cut, name=name)
        yield f"{name} beyond the table", partial(vocabulary, name=name, edit=beyond)
        for kind, content in {
            "empty": b"", "an object": b"{}", "a list": b"[]", "not UTF-8": b"\xff\xfe{",
            "nested deep": b'{"a":' * 5000 + b"1" + b"}" * 5000, "zeros": bytes(100),
            "another model": b'{"version": "1.0", "model": {"type": "Nonsense"}}',
        }.items():  # fmt: skip
            yield f"{name} {kind}", partial(_write, name=name, content=content)


def _not_files() -> Named:
    def replace(checkpoint: Path, name: str, kind: str) -> None:
        path = checkpoint / name
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a socket":
            with socket.socket(socket.AF_UNIX) as bound:
                here = Path.cwd()
                os.chdir(path.parent)  # a socket's path must be short
                try:
                    bound.bind(path.name)
                finally:
                    os.chdir(here)
        else:
            path.symlink_to("/dev/zero")

    for name in ("config.json", "generation_config.json", "preprocessor_config.json",
                 "tokenizer.json", WEIGHTS, "../clip/config.json",
                 "../clip/tokenizer.json"):  # fmt: skip
        for kind in ("a folder", "a pipe", "a socket", "a device"):
            yield f"{name} is {kind}", partial(replace, name=name, kind=kind)


def split(checkpoint: Path) -> None:
    """Turns the weights of a checkpoint into three shards and an index."""
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    weight_map = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        names = sorted(tensors)[number::3]
        save_file({name: tensors[name] for name in names}, checkpoint / shard)
        weight_map |= dict.fromkeys(names, shard)
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:end])
    return header, content[end:]


def _write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def _edit_tensors(checkpoint: Path, edit: Callable[[dict[str, NDArray[Any]]], Any]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    edit(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def _edit_config(checkpoint: Path, path: str, value: Any) -> None:
    _edit_json(checkpoint, "config.json", path, value)


def _edit_json(checkpoint: Path, name: str, path: str, value: Any) -> None:
    config = json.loads((checkpoint / name).read_text(encoding="utf-8"))
    *above, last = path.split(".")
    section = config
    for key in above:
        section = section.setdefault(key, {})
    section[last] = value
    (checkpoint / name).write_text(json.dumps(config), encoding="utf-8")


def _write(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)

"""Weight files and their index, broken: headers, offsets, values, shapes, shards."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from broken_checkpoint import FC1, INDEX, WEIGHTS, Breaking, Named

_TOWER = "vision_tower.vision_model."
_KEYS = "multi_modal_projector.clip_visual_projection.weight"
_WORDS = "multi_modal_projector.clip_text_model.embeddings.token_embedding.weight"
_TABLE = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"
_SCALE = "multi_modal_projector.logit_scale"
_NEWLINE = "image_newline"
_NORM = "language_model.model.norm.weight"
_PARTS = (FC1, _KEYS, _WORDS, _TABLE, _HEAD, _SCALE, _NEWLINE, _NORM)


# The safetensors file as bytes.


def headers() -> Named:
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


def offsets() -> Named:
    def change(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
        header, data = _read_raw(checkpoint / WEIGHTS)
        edit(header)
        _write_raw(checkpoint / WEIGHTS, json.dumps(header).encode(), data)

    def put(header: dict[str, Any], field: str, value: Any) -> None:
        header[FC1][field] = value

    def moved(header: dict[str, Any], first: int, last: int) -> None:
        begin, end = header[FC1]["data_offsets"]
        header[FC1]["data_offsets"] = [begin + first, end + last]

    def same_place(header: dict[str, Any]) -> None:
        other = f"{_TOWER}encoder.layers.1.mlp.fc1.weight"
        header[other]["data_offsets"] = header[FC1]["data_offsets"]

    def lose(header: dict[str, Any], field: str) -> None:
        del header[FC1][field]

    for first, last in ((-4, -4), (4, 4), (-4, 0), (0, 4), (1, 1), (1 << 30, 1 << 30)):
        yield (
            f"moved by {first}, {last}",
            partial(change, edit=partial(moved, first=first, last=last)),
        )
    yield "overlapping", partial(change, edit=same_place)
    places: tuple[Any, ...] = (
        [8, 4], [-8, 0], [0, 2**63], [0, 10**30], [0.5, 1.5], [0], [], "0", None, [[0], 4],
    )  # fmt: skip
    for value in places:
        edit = partial(put, field="data_offsets", value=value)
        yield f"offsets {value}", partial(change, edit=edit)
    dtypes: tuple[Any, ...] = (
        "F31", "f32", "I32", "U32", "F16", "BF16", "F64", "BOOL", "", None, 7, ["F32"],
    )  # fmt: skip
    for value in dtypes:
        yield f"dtype {value}", partial(change, edit=partial(put, field="dtype", value=value))
    sizes: tuple[Any, ...] = (
        [], [1], [64, 33], [32, 64], [-64, -32], [2**40, 2**40], [2048.0], "x", None,
    )  # fmt: skip
    for value in sizes:
        yield f"shape {value}", partial(change, edit=partial(put, field="shape", value=value))
    for field in ("dtype", "shape", "data_offsets"):
        yield f"without {field}", partial(change, edit=partial(lose, field=field))

    def longer(checkpoint: Path) -> None:
        with (checkpoint / WEIGHTS).open("ab") as stream:
            stream.write(bytes(8))

    yield "bytes after the last", longer


# The tensors.


def values() -> Named:
    def put(checkpoint: Path, name: str, value: float) -> None:
        def edit(tensors: dict[str, NDArray[Any]]) -> None:
            flat = tensors[name].reshape(-1).copy()
            flat[len(flat) // 2] = value
            tensors[name] = flat.reshape(tensors[name].shape)

        _edit_tensors(checkpoint, edit)

    for name in _PARTS:
        for value in (np.nan, np.inf, -np.inf):
            yield f"{value} in {name}", partial(put, name=name, value=value)


def tensors() -> Named:
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
        yield f"{dtype} matrix", editing(partial(cast, name=FC1, dtype=dtype))
        yield f"{dtype} table", editing(partial(cast, name=_TABLE, dtype=dtype))
    changes: dict[str, Callable[[NDArray[Any]], Any]] = {
        "transposed": np.transpose, "flat": np.ravel, "empty": lambda a: a[:0],
        "a row less": lambda a: a[1:], "an axis more": lambda a: a[None],
        "a scalar": lambda a: a[0, 0],
    }  # fmt: skip
    for change, function in changes.items():
        for name in (FC1, _KEYS, _TABLE):
            yield f"{change} {name}", editing(partial(shape, name=name, change=function))
    yield "newline of another width", editing(partial(shape, name=_NEWLINE, change=lambda a: a[1:]))
    yield "two scales", editing(partial(shape, name=_SCALE, change=lambda a: np.full(2, a)))
    yield "swapped", editing(partial(swap, first=FC1, second=_TABLE))
    yield "renamed", editing(partial(rename, old=FC1, new=f"{FC1}s"))
    yield "prefixed", editing(partial(rename, old=FC1, new=f"model.{FC1}"))


# Shards, and the index that says which tensor is in which.


def shards() -> Named:
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


def indices() -> Named:
    def point(checkpoint: Path, shard: Any, every: bool) -> None:
        split(checkpoint)
        index = json.loads((checkpoint / INDEX).read_text())
        names = list(index["weight_map"]) if every else [FC1]
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
        del index["weight_map"][FC1]
        (checkpoint / INDEX).write_text(json.dumps(index))

    def another_shard(checkpoint: Path) -> None:
        split(checkpoint)
        index = json.loads((checkpoint / INDEX).read_text())
        shards = set(index["weight_map"].values()) - {index["weight_map"][FC1]}
        index["weight_map"][FC1] = min(shards)
        (checkpoint / INDEX).write_text(json.dumps(index))

    yield "another shard", another_shard
    yield "whole outside", partial(outside, absolute=False)
    yield "whole outside, absolute", partial(outside, absolute=True)
    yield "a tensor unlisted", unlisted
    shards: tuple[Any, ...] = (
                  "../model.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "", ".",
                  "..", INDEX, "config.json", "model\0.safetensors", "./model.safetensors",
                  "..\\model.safetensors", 7, None, True, [],
                  {}, ["model.safetensors"], "\ud800.safetensors", "x" * 999 + ".safetensors",
    )  # fmt: skip
    for shard in shards:
        yield f"points to {ascii(shard)[:40]}", partial(point, shard=shard, every=False)
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


def split(checkpoint: Path) -> None:
    """Turns the weights of a checkpoint into three shards and an index."""
    tensors = load_file(checkpoint / WEIGHTS)
    (checkpoint / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
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

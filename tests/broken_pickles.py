"""Pickled weights that ask to run code, or whose archives are broken."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from broken_checkpoint import CANARY, FC1, WEIGHTS, Named

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


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
        "among tensors": {FC1: torch.zeros(2, 2), "x": payload},
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


def pickles() -> Named:
    def archive(checkpoint: Path, payload: str, protocol: int, shard: bool) -> None:
        value = _payloads(checkpoint.parent / CANARY)[payload]
        (checkpoint / WEIGHTS).unlink()
        name = "pytorch_model-00001-of-00001.bin" if shard else PICKLE
        torch.save(value, checkpoint / name, pickle_protocol=protocol)
        if shard:
            (checkpoint / PICKLE_INDEX).write_text(json.dumps({"weight_map": {FC1: name}}))

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


def archives() -> Named:
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

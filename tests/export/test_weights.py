"""Weights as files: pickles that only torch's safe loader sees, pages that are given back."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ppllava_export.weights
from ppllava_engines.errors import DataError
from ppllava_export.checkpoint import load_checkpoint
from ppllava_export.mapped import streamed_fp32
from ppllava_export.modules.model import PPLLaVA
from ppllava_export.weights import Weights, check_values
from refusals import refuses
from tiny_checkpoint import Family, write_checkpoint, write_json

WHOLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def pickled(checkpoint: Path, *, shards: int = 0) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, after its safetensors became pickles."""
    safetensors = checkpoint / "model.safetensors"
    tensors = load_file(safetensors)
    safetensors.unlink()
    if not shards:
        torch.save(tensors, checkpoint / WHOLE)
        return tensors
    names = [f"pytorch_model-{at:05}-of-{shards:05}.bin" for at in range(shards)]
    where = {name: names[at % shards] for at, name in enumerate(tensors)}
    for shard in names:
        part = {name: tensors[name] for name in tensors if where[name] == shard}
        torch.save(part, checkpoint / shard)
    write_json(checkpoint / INDEX, {"weight_map": where})
    return tensors


@pytest.mark.parametrize("shards", [0, 3])
def test_pickled_weights_read_as_safetensors_do(tmp_path: Path, shards: int) -> None:
    checkpoint = write_checkpoint(tmp_path, dtype="float16")
    expected = pickled(checkpoint, shards=shards)
    loaded = load_checkpoint(checkpoint)
    assert len(loaded.weights.files) == max(1, shards)
    assert set(loaded.weights) == set(expected)
    for name, tensor in loaded.weights.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == torch.float16
    loaded.model()
    assert len(loaded.weights.sha256()) == 64


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def replace_program(path: Path, program: bytes) -> None:
    """Writes an archive of torch.save's whose pickle is `program`."""
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)


def cut(path: Path) -> None:
    torch.save({"a": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:-400])


def legacy(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda path: torch.save({"a": Hostile(path.parent / "mark")}, path), "posix.mkdir"),
    "a module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "torch.nn"),
    "a program": (lambda path: replace_program(path, b"cos\nsystem\n(S'true'\ntR."), "os.system"),
    "bare code": (lambda path: path.write_bytes(pickle.dumps(Hostile(path))), "older pickles"),
    "legacy": (legacy, "older pickles are refused"),
    "garbage": (lambda path: replace_program(path, b"garbage"), "safe loader refuses it"),
    "nothing": (lambda path: path.write_bytes(b""), "older pickles are refused"),
    "cut short": (cut, "not a whole archive"),
    "a list": (lambda path: torch.save([torch.ones(3)], path), "holds a list"),
    "numbers": (lambda path: torch.save({"a": 1}, path), "not plain tensors by name: a"),
    "nested": (lambda path: torch.save({"a": {"b": torch.ones(1)}}, path), "by name: a"),
    "meta": (lambda path: torch.save({"a": torch.ones(1, device="meta")}, path), "by name: a"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_are_no_plain_tensors_are_refused(tmp_path: Path, name: str) -> None:
    make, said = PICKLES[name]
    make(tmp_path / WHOLE)
    refuses(Weights, tmp_path, DataError, 65, WHOLE, said)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]  # nothing ran


def test_archives_that_grow_are_refused_before_anything_of_them_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch would inflate may be a thousand times as large as the file."""
    torch.save({"a": torch.ones(300)}, tmp_path / WHOLE)
    with zipfile.ZipFile(tmp_path / WHOLE) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    for compressed in ("data.pkl", "version", "data/0"):
        with zipfile.ZipFile(tmp_path / WHOLE, "w") as archive:
            for name, content in parts.items():
                packed = zipfile.ZIP_DEFLATED if name.endswith(compressed) else zipfile.ZIP_STORED
                archive.writestr(name, content, packed)
        refuses(Weights, tmp_path, DataError, 65, WHOLE, f"{compressed}' is compressed")
    torch.save({"a": torch.ones(300)}, tmp_path / WHOLE)
    monkeypatch.setattr(ppllava_export.weights, "_PROGRAM_BYTES", 100)
    refuses(Weights, tmp_path, DataError, 65, WHOLE, "data.pkl' has ", "at most 100 beside")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_lists_all_that_its_shards_hold(tmp_path: Path, suffix: str) -> None:
    name = f"model-00001-of-00001.{suffix}"
    tensors = {"a": torch.ones(2), "image_newline": torch.ones(3), "b": torch.ones(4)}
    if suffix == "bin":
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    index = INDEX if suffix == "bin" else "model.safetensors.index.json"
    write_json(tmp_path / index, {"weight_map": dict.fromkeys(tensors, name)})
    assert set(Weights(tmp_path)) == set(tensors)
    write_json(tmp_path / index, {"weight_map": {"a": name}})
    refuses(Weights, tmp_path, DataError, 65, index, "does not list b, image_newline, which")


def test_an_index_of_pickles_names_pickles_that_are_there(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    pickled(checkpoint, shards=2)
    (checkpoint / "pytorch_model-00001-of-00002.bin").unlink()
    refuses(load_checkpoint, checkpoint, DataError, 65, "pytorch_model-00001-of-00002.bin")
    write_json(checkpoint / INDEX, {"weight_map": {"a": "tokenizer.json"}})
    refuses(load_checkpoint, checkpoint, DataError, 65, INDEX, "a .bin file")


@pytest.mark.parametrize("shards", [None, 0, 2])
def test_hard_links_are_refused_and_symbolic_ones_are_not(
    tmp_path: Path, shards: int | None
) -> None:
    checkpoint = write_checkpoint(tmp_path)
    if shards is not None:
        pickled(checkpoint, shards=shards)
    file = Weights(checkpoint).files[-1]
    other = tmp_path / "other"
    os.link(file, other)
    refuses(load_checkpoint, checkpoint, DataError, 65, file.name, "hard links")
    file.unlink()
    file.symlink_to(other)
    load_checkpoint(checkpoint)


def test_what_is_not_finite_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppllava_export.weights, "_BLOCK_BYTES", 64)
    released: list[int] = []
    tensors = {name: torch.zeros(9, 5) for name in ("good", "nan", "inf", "large")}
    tensors["nan"][8, 4] = np.nan
    tensors["inf"][0, 0] = -np.inf
    tensors["large"][4, 2] = -7e4
    with pytest.raises(DataError, match=re.escape("nan (nan), inf (inf), large (70000.0)")) as e:
        check_values(tensors, "here", 65504.0, lambda: released.append(1))
    assert "good" not in str(e.value)
    assert len(released) > len(tensors)  # as it goes, not at the end


def resident(file: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file).replace("\n", "\\012"))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="lists no mappings")
@pytest.mark.parametrize("name", ["model.safetensors", WHOLE])
def test_pages_are_read_when_touched_and_given_back(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "an odd\nname"
    folder.mkdir()
    tensors = {f"t{at}": torch.full((1 << 20,), float(at)) for at in range(4)}
    size = 4 << 22
    if name == WHOLE:
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    weights = Weights(folder)
    assert resident(folder / name) < size / 8
    assert [float(weights[f"t{at}"].amax()) for at in range(4)] == [0, 1, 2, 3]
    assert resident(folder / name) > size / 2
    heap = torch.full((1 << 20,), 5.0)
    weights.release()
    assert resident(folder / name) == 0
    assert [float(weights[f"t{at}"].amin()) for at in range(4)] == [0, 1, 2, 3]
    assert float(heap.amin()) == 5


def outputs(model: PPLLaVA) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    config = model.config
    side, text = config.vision.image_size, config.text
    length = text.positions if text.pad_token_id is not None else 7
    ids = torch.randint(0, text.vocab_size, (1, length), generator=rng)
    embeds = torch.randn(1, 5, config.decoder_width, generator=rng)
    pixels = torch.randn(3, 3, side, side, generator=rng)
    with torch.no_grad():
        return [
            *model.encode(pixels),
            model.multi_modal_projector.text_embed(ids),
            model.language_model(inputs_embeds=embeds).logits,
        ]


VARIANTS: dict[str, tuple[Family, dict[str, Any]]] = {
    "clip": ("clip", {}),
    "btadapter": ("clip", {"btadapter": True}),
    "siglip": ("siglip", {}),
    "unextended": ("clip", {"extend_clip": False}),
}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_any_floats_computes_in_fp32_what_an_fp32_one_does(
    tmp_path: Path, variant: str, dtype: str
) -> None:
    family, overrides = VARIANTS[variant]
    loaded = load_checkpoint(write_checkpoint(tmp_path, family=family, dtype=dtype, **overrides))
    model, released = loaded.model(), []
    with streamed_fp32(model, lambda: released.append(1)):
        streamed = outputs(model)
    assert {tensor.dtype for tensor in streamed} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    name = "multi_modal_projector.linear_1.weight"
    mapped = model.get_parameter(name).data_ptr()
    assert mapped == loaded.tensor(name).data_ptr()  # no copy
    for got, expected in zip(streamed, outputs(loaded.model().float()), strict=True):
        assert torch.equal(got, expected)

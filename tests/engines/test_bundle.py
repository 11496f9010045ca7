from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppllava_engines import bundle as bundle_module
from ppllava_engines.bundle import MANIFEST, SCHEMA_VERSION, Bundle, FileSpec, Manifest, hash_files
from ppllava_engines.errors import DataError, IncompatibleError, NotFoundError
from ppllava_engines.sealed_json import hash_of
from tiny_bundle import tiny_manifest, write_bundle

SEAL = "manifest_sha256"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return shutil.copytree(original, tmp_path / "bundle")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    (folder / MANIFEST).write_text(json.dumps(value))


def test_manifest_survives_json(original: Path) -> None:
    manifest = tiny_manifest(original)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Bundle.open(original).manifest == manifest


def test_files_are_listed_with_size_and_hash(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(b"abc")
    (tmp_path / MANIFEST).write_text("{}")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_files(tmp_path) == {"a/b": FileSpec(3, sha256)}


MANIFEST_EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(extra=1), "has unknown 'extra'"),
    (lambda m: m.pop("precision"), "misses 'precision'"),
    (lambda m: m["model"].update(colour="red"), "json.model has unknown 'colour'"),
    (lambda m: m["decoder"].pop("width"), "json.decoder misses 'width'"),
    (lambda m: m["model"].pop("family"), "json.model misses 'family'"),
    (lambda m: m["model"].update(image_size="8"), 'model.image_size is "8", expected int'),
    (lambda m: m["model"]["pooling"].pop("kernel"), "model.pooling misses 'kernel'"),
    (lambda m: m["model"]["pooling"].update(stride=2), "pooling.stride is 2, expected a list"),
    (lambda m: m["model"].update(text_pad_token_id="1"), 'id is "1", expected int or null'),
    (lambda m: m["precision"].update(dtype="fp8"), "expected 'fp32' or 'fp16' or 'bf16'"),
    (lambda m: m["model"].update(image_size=True), "model.image_size is true, expected int"),
    (lambda m: m["model"].update(image_size=8.0), "model.image_size is 8.0, expected int"),
    (lambda m: m["model"].update(frames_coupled=0), "frames_coupled is 0, expected bool"),
    (lambda m: m["model"].update(temperature=10**400), "temperature is too large a number"),
    (lambda m: m["model"].update(name=None), "model.name is null, expected str"),
    (lambda m: m["model"].update(grid=[2, 2, 2]), "model.grid has 3 items, expected 2"),
    (lambda m: m["model"].update(grid=4), "model.grid is 4, expected a list"),
    (lambda m: m["model"]["kernel"].__setitem__(1, "x"), 'model.kernel[1] is "x", expected int'),
    (lambda m: m["model"].update(image_grid_pinpoints=[[8, 12]]), "[8, 12], expected multiples of"),
    (lambda m: m["model"].update(image_grid_pinpoints=[[0, 8]]), "[0, 8], expected multiples of"),
    (lambda m: m["model"].update(image_grid_pinpoints=[[-8, 8]]), "[-8, 8], expected multiples"),
    (lambda m: m["model"].update(image_size=0), "multiples of its image_size 0"),
    (lambda m: m.update(graphs=[]), "graphs is [], expected an object"),
    (
        lambda m: m["graphs"]["scale"]["inputs"][0]["shape"].__setitem__(0, 1.5),
        "graphs.scale.inputs[0].shape[0] is 1.5, expected int or str",
    ),
    (
        lambda m: m["graphs"]["scale"]["inputs"][0].update(dtype="float31"),
        "dtype of x is 'float31', expected one of float32, ",
    ),
    (lambda m: m["decoder"].update(path="decoder/other.onnx"), "'decoder/other.onnx'"),
    (lambda m: m["tokenizers"].update(text="text.json"), "files does not list 'text.json'"),
    (lambda m: m.update(schema_version="1"), 'schema_version is "1", expected int'),
]


@pytest.mark.parametrize(("change", "said"), MANIFEST_EDITS)
def test_a_manifest_that_does_not_fit_is_refused(
    tiny: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(tiny, change)
    with pytest.raises(DataError) as caught:
        Bundle.open(tiny)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[1]", "is [1], expected an object"),
        ('{"schema_version": NaN}', "NaN is not a number"),
        ('{"a": 1, "a": 2}', "key 'a' is given more than once"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 10_000, "not valid JSON"),
    ],
)
def test_a_manifest_that_is_no_object_is_refused(tiny: Path, text: str, said: str) -> None:
    (tiny / MANIFEST).write_text(text)
    with pytest.raises(DataError) as caught:
        Bundle.open(tiny)
    assert said in str(caught.value)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """What is in a manifest, as the export would have written it."""
    value = {key: item for key, item in value.items() if key != SEAL}
    return {SEAL: hash_of(value), **value}


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "special id": lambda m: m["model"].update(text_eos_token_id=2),
    "image token": lambda m: m["model"].update(image_token_index=4),
    "template": lambda m: m["model"].update(chat_template="<image>\n{question}"),
    "end of answers": lambda m: m["decoder"].update(eos_token_ids=[3]),
    "no end of answers": lambda m: m["decoder"]["eos_token_ids"].clear(),
    "hash of a file": lambda m: m["files"]["samples.npz"].update(sha256="0" * 64),
    "seal": lambda m: m.update({SEAL: "0" * 64}),
    "no seal": lambda m: m.pop(SEAL),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_was_changed_is_refused(tiny: Path, name: str) -> None:
    edit(tiny, CHANGES[name])
    with pytest.raises(DataError, match="was changed since the export"):
        Bundle.open(tiny)


def test_a_manifest_may_be_laid_out_anew(tiny: Path) -> None:
    expected = Bundle.open(tiny).manifest
    value = json.loads((tiny / MANIFEST).read_text())
    (tiny / MANIFEST).write_text(json.dumps(dict(reversed(value.items())), indent=7))
    assert Bundle.open(tiny).manifest == expected


def test_an_int_passes_for_a_float(tiny: Path) -> None:
    manifest = tiny_manifest(tiny)
    changed = replace(manifest, model=replace(manifest.model, temperature=1))
    (tiny / MANIFEST).write_text(changed.to_json())
    temperature = Bundle.open(tiny).manifest.model.temperature
    assert (temperature, type(temperature)) == (1.0, float)


def test_another_schema_version_is_told_before_anything_else(tiny: Path) -> None:
    version = SCHEMA_VERSION + 1
    (tiny / MANIFEST).write_text(json.dumps({"schema_version": version, "new": {}}))
    with pytest.raises(IncompatibleError, match=f"schema_version is {version}, this release reads"):
        Bundle.open(tiny)


def test_an_unknown_family_is_incompatible(tiny: Path) -> None:
    edit(tiny, lambda m: m["model"].update(family="radio"))
    with pytest.raises(IncompatibleError, match="family is 'radio', expected clip"):
        Bundle.open(tiny)


def json_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, item in inner for place in json_places(item, (*path, key)))]


@given(data=st.data())
def test_no_manifest_fails_in_any_other_way(original: Path, data: st.DataObject) -> None:
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
    value = json.loads((original / MANIFEST).read_text())
    *parents, last = data.draw(st.sampled_from(json_places(value)[1:]))
    holder = value
    for key in parents:
        holder = holder[key]
    holder[last] = data.draw(anything)
    try:
        text = json.dumps(sealed(value), allow_nan=False)
    except ValueError:  # an infinity, which JSON has not
        return
    try:
        manifest = Manifest.from_json(text)
    except (DataError, IncompatibleError):
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "", ".", "..", "a/", "a\\b", "a\0b"],
)
def test_no_path_leaves_the_bundle(tiny: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not a plain path inside the bundle"):
        Bundle.open(tiny).file(name)
    edit(tiny, lambda m: m["files"].update({name: {"size": 0, "sha256": ""}}))
    with pytest.raises(DataError, match="is not a plain path inside the bundle"):
        Bundle.open(tiny)


def test_no_link_leaves_the_bundle(tiny: Path) -> None:
    target = tiny / "decoder/embedding.npy"
    target.rename(tiny.parent / "embedding.npy")
    target.symlink_to(tiny.parent / "embedding.npy")
    with pytest.raises(DataError, match="is a link that leads out of the bundle"):
        Bundle.open(tiny)


def test_a_bundle_may_be_reached_by_a_link(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny)
    assert Bundle.open(tmp_path / "link").file("graphs/scale.onnx").is_file()


def test_only_listed_files_are_given(tiny: Path) -> None:
    (tiny / "stranger").write_text("")
    opened = Bundle.open(str(tiny))
    assert opened.file("decoder/embedding.npy") == tiny / "decoder/embedding.npy"
    with pytest.raises(NotFoundError, match="no file 'stranger'"):
        opened.file("stranger")
    with pytest.raises(NotFoundError, match="no graph 'vision', there are scale"):
        opened.engine("vision")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verify", ["quick", "full"])
@pytest.mark.parametrize("name", ["graphs/scale.onnx", "tokenizers/decoder.json"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage, "is damaged, its sha256 is"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected"),
        (Path.unlink, "is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    ],
)
def test_a_spoilt_file_is_named(
    tiny: Path, verify: Any, name: str, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(tiny / name)
    with pytest.raises(DataError) as caught:
        Bundle.open(tiny, verify=verify)
    assert name in str(caught.value)
    assert said in str(caught.value)


def test_large_files_are_hashed_only_when_asked(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "_QUICK_HASH_BYTES", 0)
    damage(tiny / "graphs/scale.onnx")
    Bundle.open(tiny)
    with pytest.raises(DataError, match="is damaged"):
        Bundle.open(tiny, verify="full")


def test_what_is_no_bundle_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        Bundle.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(DataError, match=r"is not a bundle: it has no manifest\.json"):
            Bundle.open(path)
    (tmp_path / MANIFEST).write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        Bundle.open(tmp_path)


def test_a_manifest_that_is_no_file_is_not_waited_for(tiny: Path) -> None:
    (tiny / MANIFEST).unlink()
    os.mkfifo(tiny / MANIFEST)
    with pytest.raises(DataError, match=r"manifest\.json: not a file"):
        Bundle.open(tiny)
    (tiny / MANIFEST).unlink()
    (tiny / MANIFEST).mkdir()
    with pytest.raises(DataError, match=r"manifest\.json: not a file"):
        Bundle.open(tiny)


def test_a_manifest_that_is_too_large_is_not_read(tiny: Path) -> None:
    os.truncate(tiny / MANIFEST, 3 << 30)  # it takes no room
    with pytest.raises(DataError, match="3221225472 bytes, expected at most 67108864 of JSON"):
        Bundle.open(tiny)


def test_values_that_nest_too_deep_to_be_shown_are_refused(tiny: Path) -> None:
    before = (tiny / MANIFEST).read_text()
    assert before.count('"shape": [') > 0
    for depth in range(900, 1000):  # some of these are read, but take more to be written
        nested = "[" * depth + "]" * depth
        (tiny / MANIFEST).write_text(before.replace('"shape": [', f'"shape": [{nested}, ', 1))
        with pytest.raises(DataError, match=r"manifest\.json"):
            Bundle.open(tiny)

"""Devices and what fits on them. No GPU is here: the driver is a library of the same symbols."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ppllava_engines import devices, plan
from ppllava_engines.bundle import MANIFEST, FileSpec, GraphSpec, Manifest, Precision, TensorSpec
from ppllava_engines.devices import RECIPES, Gpu, find_gpu, recipe, recipe_for, recipes
from ppllava_engines.errors import DataError, IncompatibleError, UsageError, run_command
from ppllava_engines.memory_layout import MEMORY_GRAPHS
from ppllava_engines.plan import LATENCY, Device, estimate
from tiny_bundle import tiny_manifest, write_bundle
from tiny_driver import ORIN_NANO, compile_driver

GB = 10**9


@pytest.mark.parametrize(
    ("init", "count", "gpu"), [(0, 1, ORIN_NANO), (0, 2, ORIN_NANO), (0, 0, None), (100, 1, None)]
)
def test_the_driver_is_asked_for_the_gpu(
    tmp_path: Path, init: int, count: int, gpu: Gpu | None
) -> None:
    library = compile_driver(tmp_path / "libcuda.so", init=init, count=count)
    assert find_gpu(str(library)) == gpu


def test_without_a_driver_there_is_no_gpu(tmp_path: Path) -> None:
    assert find_gpu(str(tmp_path / "libcuda.so.1")) is None
    (tmp_path / "libcuda.so.1").write_text("not a library")
    assert find_gpu(str(tmp_path / "libcuda.so.1")) is None


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("orin-nano-8gb", ORIN_NANO),
        ("orin-nx-16gb", replace(ORIN_NANO, memory_bytes=16_200_000_000)),
        ("agx-orin-64gb", replace(ORIN_NANO, memory_bytes=65_900_000_000)),
        ("rtx-4090", Gpu("NVIDIA GeForce RTX 4090", (8, 9), False, 25_250_000_000)),
        ("h100-80gb", Gpu("NVIDIA H100 80GB HBM3", (9, 0), False, 84_900_000_000)),
        (None, Gpu("NVIDIA GeForce RTX 4090", (8, 6), False, 25_250_000_000)),
        (None, replace(ORIN_NANO, memory_bytes=4_000_000_000)),
        (None, Gpu("Tesla T4", (7, 5), False, 16 * GB)),
    ],
)
def test_a_gpu_is_known_by_name_capability_and_memory(name: str | None, gpu: Gpu) -> None:
    assert recipe_for(gpu) == (recipes()[name] if name else None)


def test_recipes_agree_with_themselves() -> None:
    for name, item in recipes().items():
        gpu = Gpu(item.gpu, item.compute_capability, item.integrated, item.memory_bytes)
        assert recipe_for(gpu) == item, name
        assert bool(item.jetpack) == bool(item.tensorrt) == bool(item.cuda) == item.integrated
        assert item.workspace_mb <= item.tactic_mb < item.memory_bytes / 1e6 / 2, name


def test_a_device_that_is_not_the_one_here_is_refused() -> None:
    with pytest.raises(IncompatibleError) as caught:
        devices.check_device(recipe("orin-nx-16gb"), ORIN_NANO)
    assert str(caught.value) == (
        "device Jetson Orin NX 16 GB: expected Orin (sm87, 16 GB), this is Orin (sm87, 8.0 GB): "
        "build with --device auto"
    )
    with pytest.raises(UsageError, match=r"no device 'tx2', expected auto or one of orin-nano-8gb"):
        recipe("tx2")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frames = 16", "frames = 16\ncolour = 1", "orin-nano-8gb has unknown 'colour'"),
        ("frames = 16\n", "", "orin-nano-8gb misses 'frames'"),
        ("frames = 16", 'frames = "16"', 'orin-nano-8gb.frames is "16", expected int'),
        ("frames = 16", "frames = 16.0", "orin-nano-8gb.frames is 16.0, expected int"),
        ("frames = 16", "frames = 16\nframes = 16", "not valid TOML"),
        ("[orin-nano-8gb]", "[orin-nano-8gb", "not valid TOML"),
        ('"int4"', '"int3"', "expected 'float' or 'int8' or 'int4'"),
        ("[8, 7]", "[8]", "compute_capability has 1 items, expected 2"),
    ],
)
def test_recipes_are_read_strictly(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(RECIPES.read_text().replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        recipes(path)
    assert message in str(caught.value)


def model_of_7b(folder: Path, precision: Precision, decoder_gb: float) -> Manifest:
    """A manifest with the sizes of CLIP ViT-L/14-336 and Vicuna-7B."""
    small = tiny_manifest(folder)
    vision = "graphs/vision.onnx"
    files = small.files | {
        vision: FileSpec(3 * 10**6, "0" * 64),
        f"{vision}.data": FileSpec(610 * 10**6, "0" * 64),
        "decoder/model.onnx.data": FileSpec(round(decoder_gb * GB), "0" * 64),
        "decoder/embedding.npy": FileSpec(262 * 10**6, "0" * 64),
    }
    return replace(
        small,
        model=replace(small.model, grid=(24, 24), vision_width=1024, key_width=768,
            decoder_width=4096, max_frames=64, default_frames=32, kernel=(2, 3, 3),
            stride=(2, 3, 3)),
        decoder=replace(small.decoder, width=4096, num_layers=32, num_kv_heads=32, head_dim=128,
            vocab_size=32000, max_positions=4096, dtype="float16"),
        graphs=small.graphs | {"vision": GraphSpec(vision, (), ())},
        precision=precision,
        files=files,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def test_memory_follows_from_files_and_shapes(folder: Path) -> None:
    manifest = model_of_7b(folder, Precision("fp16"), 13.5)
    found = estimate(manifest, Device("card", 24 * GB, integrated=False), frames=32, tokens=2048)
    sizes = {part.name: part for part in found.parts}
    assert sizes["weights of vision"].num_bytes == 613 * 10**6
    assert sizes["weights of vision"].basis == "file"
    assert sizes["KV cache of 2048 tokens"].num_bytes == 2 * 32 * 32 * 128 * 2048 * 2
    assert sizes["keys and hidden of 32 frames"].num_bytes == 32 * 576 * (768 + 4096) * 2
    assert {part.basis for part in found.parts} == {"file", "shape", "estimate", "assumed"}
    # Their file is mapped, and goes where memory is needed.
    assert not any("embeddings" in name for name in sizes)
    # Frames are looked at a few at a time, unless they see each other.
    more = estimate(manifest, Device("card", 24 * GB, integrated=False), frames=64, tokens=2048)
    assert sizes["activations of vision"] in more.parts


def test_each_kind_of_memory_has_its_price(folder: Path) -> None:
    manifest = model_of_7b(folder, Precision(), 13.5)
    keys, hidden, tokens = (
        TensorSpec(name, "float32", ("T", 576, width))
        for name, width in (("keys", 768), ("hidden", 4096), ("tokens", 1024))
    )
    norms = TensorSpec("norms", "float32", ("T", 576))
    outputs = {"vision": (keys, hidden), "vision_tokens": (tokens, norms)}
    names = ("vision", "pool", *MEMORY_GRAPHS)
    manifest = replace(
        manifest,
        graphs=manifest.graphs
        | {name: GraphSpec("graphs/vision.onnx", (), outputs.get(name, ())) for name in names},
    )
    device = Device("card", 24 * GB, integrated=False)
    found = estimate(manifest, device, frames=32, tokens=2048)
    rows = 32 * 576
    assert {kept.memory: kept.num_bytes for kept in found.memories} == {
        "hidden": rows * (768 + 4096) * 2,
        "hidden-fp32": rows * (768 + 4096) * 4,
        "hidden-int8": rows * (768 * 2 + 4096 + 4),
        "tokens": rows * (1024 * 2 + 4),
    }
    assert ["linear_1" in kept.rerun for kept in found.memories] == [False, False, False, True]
    # No GPU runs the graphs of a CPU's memories.
    weights = [part.name for part in found.parts if part.name.startswith("weights of ")]
    assert not any(name.removeprefix("weights of ") in MEMORY_GRAPHS for name in weights)
    half = replace(manifest, precision=Precision("fp16"))
    kinds = [kept.memory for kept in estimate(half, device, frames=32, tokens=2048).memories]
    assert kinds == ["hidden", "hidden-int8", "tokens"]
    out = StringIO()
    Console(file=out, width=120).print(plan.memory_table(found))
    assert "0.179" in out.getvalue()


@pytest.mark.parametrize("option", ["frames", "tokens"])
def test_a_remedy_in_frames_or_tokens_is_the_largest_that_fits(folder: Path, option: str) -> None:
    manifest = model_of_7b(folder, Precision("fp16", decoder="int4"), 0.6)
    whole = estimate(manifest, Device("board", 10**15, integrated=True), frames=64, tokens=4096)
    assert whole.fits
    assert whole.remedies == ()
    device = Device("board", max(whole.run_bytes, whole.build_bytes) - 10**7, integrated=True)
    tight = estimate(manifest, device, frames=64, tokens=4096)
    assert not tight.fits
    name = "--frames" if option == "frames" else "--max-tokens"
    (remedy,) = [text for text in tight.remedies if text.startswith(f"ask for {name} ")]
    number, asked = int(remedy.split()[-1]), {"frames": 64, "tokens": 4096}
    assert estimate(manifest, device, **asked | {option: number}).fits
    assert not estimate(manifest, device, **asked | {option: number + 1}).fits


def test_a_7b_model_in_half_precision_is_told_to_quantize_its_decoder(folder: Path) -> None:
    manifest = model_of_7b(folder, Precision("fp16"), 13.5)
    found = estimate(manifest, Device("board", 20 * GB, integrated=True), frames=16, tokens=2048)
    assert found.remedies == (
        "export with --decoder int4",
        "add 32 GB of swap while the plans are built",
    )


def sparse_bundle(folder: Path, out: Path) -> Path:
    """A bundle of a decoder of 30 GB, none of which is on the disk."""
    shutil.copytree(folder, out)
    with (out / "decoder/model.onnx.data").open("wb") as stream:
        stream.truncate(30 * GB)
    files = tiny_manifest(folder).files | {"decoder/model.onnx.data": FileSpec(30 * GB, "0" * 64)}
    (out / MANIFEST).write_text(tiny_manifest(folder, files=files).to_json())
    return out


def test_the_command_says_what_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(plan.main, [str(folder), "--device", "orin-nano-8gb", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["run_bytes"] == sum(part["num_bytes"] for part in said["parts"])
    assert (said["frames"], said["tokens"], said["latency"]) == (16, 32, LATENCY)
    assert run_command(plan.main, [str(folder), "--device", "rtx-4090"]) == 0
    out = capsys.readouterr().out
    assert "GeForce RTX 4090: 16 frames, 32 tokens" in out
    assert LATENCY in out


def test_the_command_ends_with_78_when_it_does_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = sparse_bundle(folder, tmp_path / "large")
    assert run_command(plan.main, [str(bundle), "--device", "orin-nano-8gb"]) == 78
    said = capsys.readouterr()
    assert "does not fit" in said.out
    assert said.err.startswith(f"error: {bundle} takes ")
    assert said.err.endswith("expected at most 8.0 GB: export with --fp16\n")


def test_the_command_refuses_what_it_does_not_know(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code in [
        ([str(folder), "--device", "tx2"], 2),
        ([str(folder), "--device", "rtx-4090", "--frames", "17"], 2),
        ([str(folder), "--device", "rtx-4090", "--frames", "0"], 2),
        ([str(tmp_path / "none"), "--device", "rtx-4090"], 66),
    ]:
        assert run_command(plan.main, arguments) == code
        assert capsys.readouterr().err.count("\n") == 1
    if find_gpu() is None:
        assert run_command(plan.main, [str(folder)]) == 69
        assert "name --device, one of orin-nano-8gb" in capsys.readouterr().err

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppllava_engines.bundle import Bundle, FileSpec, GraphSpec, TensorSpec
from ppllava_engines.errors import (
    DataError,
    IncompatibleError,
    NotFoundError,
    UsageError,
)
from ppllava_engines.tensorrt.plans import (
    FOLDER,
    RECORD,
    Hardware,
    Machine,
    Options,
    Plans,
    PlanSpec,
    Record,
    new_plans,
)
from ppllava_engines.tensorrt.profiles import Profile, graph_profiles
from tiny_bundle import tiny_manifest, write_bundle

PLUGIN = "a" * 64
ORIN = Machine(
    gpu="Orin",
    compute_capability=(8, 7),
    library="tensorrt",
    version="10.3.0",
    integrated=True,
    memory_bytes=7_990_000_000,
)
CARD = replace(
    ORIN, gpu="RTX 4090", compute_capability=(8, 9), integrated=False, memory_bytes=24 * 10**9
)
RTX = replace(CARD, library="tensorrt_rtx", version="1.7.1.116")
SPEC = GraphSpec(
    "pool.onnx",
    (TensorSpec("hidden", "float16", ("T", 4, 3)), TensorSpec("kernel", "int64", (3,))),
    (TensorSpec("pooled", "float16", ("N", 3)),),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(original, tmp_path / "bundle"))


def write_plans(
    bundle: Bundle,
    machine: Machine = ORIN,
    options: Options | None = None,
    plugin: str | None = None,
    content: bytes = b"machine code",
    **changes: Any,
) -> Path:
    """The folder of plans of one graph, pool."""
    profile = Profile("frames", {"hidden": ((1, 4, 3), (8, 4, 3), (16, 4, 3))}, {})
    fields = {"bundle_sha256": bundle.manifest.seal, "graphs": {}} | changes
    record = Record(machine=machine, options=options or Options(), **fields)
    with new_plans(bundle, record.name) as staging:
        (staging / "pool.plan").write_bytes(content)
        plan = PlanSpec(
            path="pool.plan",
            file=FileSpec.of(staging / "pool.plan"),
            spec=SPEC,
            profiles=(profile,),
            kernel=(2, 1, 1),
            stride=None,
            plugin=plugin,
            seconds=1.5,
            peak_bytes=10,
        )
        record = replace(record, graphs={"pool": plan})
        (staging / RECORD).write_text(record.to_json())
    return bundle.path / FOLDER / record.name


def test_plans_of_other_options_or_memory_have_a_folder_of_their_own(bundle: Bundle) -> None:
    larger = replace(ORIN, memory_bytes=2 * ORIN.memory_bytes)
    folders = [
        write_plans(bundle),
        write_plans(bundle, options=Options(hardware="ampere+")),
        write_plans(bundle, options=Options(version_compatible=True)),
        write_plans(bundle, machine=larger),
    ]
    assert len(set(folders)) == len(folders)
    assert Plans.find(bundle, larger).path == folders[-1]


def test_plans_are_found_where_they_were_built(bundle: Bundle) -> None:
    folder = write_plans(bundle, plugin=PLUGIN)
    assert folder.name == "orin-8gb-sm87-tensorrt10.3.0"
    plans = Plans.find(bundle, ORIN, PLUGIN)
    assert plans.path == folder
    assert plans.file("pool").read_bytes() == b"machine code"
    assert plans.plan("pool").kernel == (2, 1, 1)
    assert Record.from_json(plans.record.to_json(), "") == plans.record
    Bundle.open(bundle.path, verify="full")  # plans are no part of what was exported


def test_a_bundle_without_plans_says_what_builds_them(bundle: Bundle) -> None:
    with pytest.raises(NotFoundError) as caught:
        Plans.find(bundle, ORIN)
    assert str(caught.value) == (
        f"bundle {bundle.path}: no plans are built: run ppllava-build {bundle.path}"
    )
    write_plans(bundle)
    with pytest.raises(NotFoundError, match=r"none of graph 'vision', there are pool: run"):
        Plans.find(bundle, ORIN).file("vision")


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (replace(ORIN, library="tensorrt_rtx"), "for tensorrt, not tensorrt_rtx"),
        (replace(ORIN, version="10.3.0.26"), "for tensorrt 10.3.0, not 10.3.0.26"),
        (replace(ORIN, version="10.16.1.11"), "for tensorrt 10.3.0, not 10.16.1.11"),
        (replace(ORIN, host="linux-aarch64-be"), "for {host}, not linux-aarch64-be"),
        (replace(ORIN, compute_capability=(11, 0)), "for sm87, not sm110"),
        (replace(ORIN, gpu="Orin Max"), "for Orin, not Orin Max"),
        (replace(ORIN, memory_bytes=64 * 10**9), "for Orin with 8 GB, not 64 GB"),
        (ORIN, f"its pool calls the plugin library {PLUGIN[:12]}…, none is built here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_of_another_machine_are_refused(bundle: Bundle, there: Machine, reason: str) -> None:
    folder = write_plans(bundle, plugin=PLUGIN)
    Plans.find(bundle, ORIN, PLUGIN)
    with pytest.raises(IncompatibleError) as caught:
        Plans.find(bundle, there, PLUGIN if there != ORIN else None)
    said = reason.format(host=ORIN.host)
    assert str(caught.value) == (
        f"plans of {bundle.path}: none is for {there}: {folder.name} is {said}: run ppllava-build "
        f"{bundle.path} on this machine"
    )


def test_plans_of_another_plugin_or_export_are_refused(bundle: Bundle) -> None:
    write_plans(bundle, plugin=PLUGIN)
    with pytest.raises(IncompatibleError, match=r"library aaaaaaaaaaaa…, bbbbbbbbbbbb… is here:"):
        Plans.find(bundle, ORIN, "b" * 64)
    write_plans(bundle, bundle_sha256="0" * 64)
    with pytest.raises(IncompatibleError, match=r"is built of another export of the bundle:"):
        Plans.find(bundle, ORIN)


def test_memory_that_a_driver_reports_a_little_differently_is_the_same(bundle: Bundle) -> None:
    write_plans(bundle)
    Plans.find(bundle, replace(ORIN, memory_bytes=7_600_000_000))


@pytest.mark.parametrize(
    ("built", "there", "runs"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.3.1", True),
        ("10.3.0", "10.16.1.11", True),
        ("10.16.1.11", "10.3.0", False),
        ("10.3.0", "11.0.0", False),
    ],
)
def test_version_compatible_plans_run_on_newer_minors(
    bundle: Bundle, built: str, there: str, runs: bool
) -> None:
    write_plans(bundle, replace(ORIN, version=built), Options(version_compatible=True))
    found = Plans.find if runs else refused
    found(bundle, replace(ORIN, version=there))


@pytest.mark.parametrize(
    ("hardware", "code", "runs"),
    [
        ("gpu", (8, 9), False),
        ("compute capability", (8, 9), True),
        ("compute capability", (8, 6), False),
        ("ampere+", (8, 6), True),
        ("ampere+", (12, 0), True),
        ("ampere+", (7, 5), False),
    ],
)
def test_hardware_compatible_plans_run_on_other_gpus(
    bundle: Bundle, hardware: Hardware, code: tuple[int, int], runs: bool
) -> None:
    write_plans(bundle, CARD, Options(hardware=hardware))
    found = Plans.find if runs else refused
    found(bundle, replace(CARD, gpu="L40", compute_capability=code))


def refused(bundle: Bundle, machine: Machine) -> None:
    with pytest.raises(IncompatibleError):
        Plans.find(bundle, machine)


def test_plans_built_ahead_of_time_run_on_each_gpu_they_name(bundle: Bundle) -> None:
    built = replace(RTX, gpu="any", compute_capability=(8, 6), memory_bytes=0)
    folder = write_plans(bundle, built, Options(compute_capabilities=((8, 6), (8, 9))))
    assert folder.name == "any-sm86-sm89-rtx1.7.1.116"
    assert Plans.find(bundle, RTX).path == folder
    with pytest.raises(IncompatibleError, match="is for sm86, sm89, not sm120:"):
        Plans.find(bundle, replace(RTX, compute_capability=(12, 0)))


def test_of_several_the_closest_are_taken_and_damaged_ones_left(bundle: Bundle) -> None:
    options = Options(hardware="ampere+", version_compatible=True)
    write_plans(bundle, replace(CARD, gpu="A100", version="10.1"), options)
    wanted = write_plans(bundle, CARD, options)
    damaged = write_plans(bundle, replace(CARD, gpu="zz"))
    (damaged / RECORD).write_text("{")
    (bundle.path / FOLDER / ".x.partial-00000000").mkdir()
    (bundle.path / FOLDER / ".x.partial-00000000" / RECORD).write_text("half")
    assert Plans.find(bundle, CARD).path == wanted
    shutil.rmtree(wanted)
    assert Plans.find(bundle, CARD).record.machine.gpu == "A100"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / RECORD).read_text())
    change(value)
    (folder / RECORD).write_text(json.dumps(value))


EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda r: r.update(extra=1), "has unknown 'extra'"),
    (lambda r: r.pop("options"), "misses 'options'"),
    (lambda r: r["machine"].update(colour="red"), "json.machine has unknown 'colour'"),
    (lambda r: r["machine"].update(library="cuda"), "expected 'tensorrt' or 'tensorrt_rtx'"),
    (lambda r: r["machine"].update(compute_capability=[8]), "has 1 items, expected 2"),
    (lambda r: r["graphs"]["pool"].update(path="../pool.plan"), "is not a plain path inside"),
    (lambda r: r["graphs"]["pool"].update(profiles=[]), "has no profiles: run ppllava-build"),
    (lambda r: r["graphs"]["pool"].update(kernel=[1, 1, 1]), "was changed since the build"),
    (lambda r: r.pop("plans_sha256"), "was changed since the build"),
]


@pytest.mark.parametrize(("change", "message"), EDITS, ids=[message for _, message in EDITS])
def test_a_record_that_was_edited_is_refused(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(write_plans(bundle), change)
    with pytest.raises(DataError) as caught:
        Plans.find(bundle, ORIN)
    assert message in str(caught.value)


def test_a_record_that_was_cut_short_is_refused_at_any_length(bundle: Bundle) -> None:
    path = write_plans(bundle) / RECORD
    text = path.read_text()
    for length in range(0, len(text.rstrip()), 97):
        path.write_text(text[:length])
        with pytest.raises(DataError, match="not valid JSON"):
            Plans.find(bundle, ORIN)


def test_a_record_of_another_version_is_refused(bundle: Bundle) -> None:
    edit(write_plans(bundle), lambda record: record.update(schema_version=2, new=1))
    with pytest.raises(IncompatibleError, match=r"schema_version is 2, this release reads 1: run"):
        Plans.find(bundle, ORIN)


def test_a_plan_that_is_not_the_one_that_was_built_is_never_given_out(bundle: Bundle) -> None:
    folder = write_plans(bundle)
    plans, path = Plans.find(bundle, ORIN), folder / "pool.plan"
    path.write_bytes(b"machine c0de")
    with pytest.raises(DataError, match=r"pool.plan is damaged, its sha256 is .*: run ppllava-bui"):
        plans.file("pool")
    path.write_bytes(b"machine")
    with pytest.raises(DataError, match=r"pool.plan has 7 bytes, expected 12: run"):
        plans.file("pool")
    path.unlink()
    with pytest.raises(DataError, match=r"file pool.plan is missing: run"):
        plans.file("pool")
    (folder / "other").write_bytes(b"machine code")
    path.symlink_to(folder / "other")
    with pytest.raises(DataError, match=r"file pool.plan is missing: run"):
        plans.file("pool")


def test_a_build_that_fails_leaves_the_plans_of_before(bundle: Bundle) -> None:
    folder = write_plans(bundle)
    whole = pytest.raises(DataError, match="pool was not written whole")
    with whole, new_plans(bundle, folder.name) as staging:
        shutil.copy(folder / RECORD, staging / RECORD)
    assert Plans.find(bundle, ORIN).file("pool").read_bytes() == b"machine code"
    assert [path.name for path in (bundle.path / FOLDER).iterdir()] == [folder.name]


def graph(*shapes: tuple[str, tuple[int | str, ...]]) -> GraphSpec:
    return GraphSpec("x.onnx", tuple(TensorSpec(n, "float32", s) for n, s in shapes), ())


def test_profiles_follow_from_the_model(original: Path) -> None:
    manifest = tiny_manifest(original)
    vision = graph(("pixel_values", ("T", 3, 8, 8)))
    (frames,) = graph_profiles(manifest, "vision", vision)
    assert frames.shapes == {"pixel_values": ((1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8))}
    coupled = replace(manifest, model=replace(manifest.model, frames_coupled=True))
    (frames,) = graph_profiles(coupled, "vision", vision, frames=10)
    assert [shape[0] for shape in frames.shapes["pixel_values"]] == [1, 8, 10]
    assert frames.accepts({"pixel_values": (10, 3, 8, 8)})
    assert not frames.accepts({"pixel_values": (11, 3, 8, 8)})
    assert not frames.accepts({"pixel_values": (3, 8, 8)})
    (fixed,) = graph_profiles(manifest, "text", graph(("input_ids", (1, 64))))
    assert fixed.shapes == {"input_ids": ((1, 64),) * 3}


def test_windows_that_are_inputs_have_ranges_of_values(original: Path) -> None:
    manifest = tiny_manifest(original)
    spec = graph(("keys", ("T", 4, 2)), ("kernel", (3,)), ("stride", (3,)))
    (frames,) = graph_profiles(manifest, "pool", spec)
    assert frames.shapes == {"keys": ((1, 4, 2), (8, 4, 2), (16, 4, 2))}
    assert frames.values["kernel"] == ((1, 1, 1), (2, 1, 1), (16, 2, 2))


def test_the_decoder_has_a_profile_for_the_prompt_and_one_for_a_step(original: Path) -> None:
    manifest = tiny_manifest(original)
    spec = graph(("inputs_embeds", (1, "n", 3)), ("past", (1, 1, "c", 2)))
    prefill, step = graph_profiles(manifest, "decoder", spec, tokens=24)
    assert (prefill.name, step.name) == ("prefill", "step")
    # 8 frames of 2×2, pooled by (2,1,1), and 64 words are more than the 24 tokens.
    assert prefill.shapes["inputs_embeds"] == ((1, 1, 3), (1, 24, 3), (1, 24, 3))
    assert prefill.shapes["past"] == ((1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 24, 2))
    assert step.shapes["inputs_embeds"] == ((1, 1, 3), (1, 1, 3), (1, 2, 3))
    assert step.shapes["past"] == ((1, 1, 1, 2), (1, 1, 24, 2), (1, 1, 24, 2))
    # Longer prompts are taken in parts, most of which see what came before them.
    long = replace(
        manifest,
        model=replace(manifest.model, grid=(16, 16)),
        decoder=replace(manifest.decoder, max_positions=8192),
    )
    prefill, _ = graph_profiles(long, "decoder", spec)
    assert prefill.shapes["inputs_embeds"] == ((1, 1, 3), (1, 512, 3), (1, 512, 3))
    assert prefill.shapes["past"] == ((1, 1, 1, 2), (1, 1, 4096, 2), (1, 1, 4096, 2))


def test_ranges_beyond_the_model_are_refused(original: Path) -> None:
    manifest = tiny_manifest(original)
    with pytest.raises(UsageError, match=r"17 frames, expected 1 to 16"):
        graph_profiles(manifest, "vision", graph(), frames=17)
    with pytest.raises(UsageError, match=r"33 tokens, expected 1 to 32"):
        graph_profiles(manifest, "decoder", graph(), tokens=33)
    with pytest.raises(IncompatibleError, match=r"x.onnx has axis B in x, expected one of T:"):
        graph_profiles(manifest, "vision", graph(("x", ("B",))))

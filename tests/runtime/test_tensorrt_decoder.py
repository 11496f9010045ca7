"""The runtime with device="tensorrt" on doubles of CUDA and TensorRT: its logic only."""

from __future__ import annotations

import gc
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_double import CudaDouble
from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import InternalError, NotFoundError, UsageError
from ppllava_engines.memory_layout import MemoryKind
from ppllava_engines.parity import STAGES
from ppllava_engines.tensorrt.cache import CachedDecoder
from ppllava_engines.tensorrt.device import DeviceArray
from ppllava_engines.tensorrt.graphs import write_graph
from ppllava_engines.tensorrt.profiles import Profile, graph_profiles
from ppllava_runtime import chat, check
from ppllava_runtime.assistant import Assistant
from ppllava_runtime.decoders import Sampling
from ppllava_runtime.decoders.onnxruntime import OnnxRuntimeDecoder
from ppllava_runtime.decoders.tensorrt import TensorRTDecoder
from tensorrt_double import Doubles, install, write_plans
from tiny_videos import numbered_frames, write_video

GREEDY = Sampling()
PROMPT = (1, 300, 17, 260, 42, 5, 333)


@pytest.fixture(scope="module")
def planned(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with the double's plans; a plugin pools by any window."""
    folder = tmp_path_factory.mktemp("planned")
    shutil.copytree(bundle, folder / "bundle")
    opened = Bundle.open(folder / "bundle")
    write_plans(opened, folder / "graphs", pool_node="inputs")
    return opened


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def doubles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Doubles:
    return install(monkeypatch, CudaDouble(integrated=request.param))


def test_says_what_the_cpu_says(planned: Bundle, doubles: Doubles) -> None:
    cpu, gpu = OnnxRuntimeDecoder.open(planned), TensorRTDecoder(planned)
    assert gpu.max_positions == cpu.max_positions
    for seed in range(3):
        prompt = tuple(np.random.default_rng(seed).integers(4, 384, 9 + seed).tolist())
        np.testing.assert_array_equal(gpu.embed(prompt), cpu.embed(prompt))
        ids = list(gpu.generate([gpu.embed(prompt)], 16, GREEDY))
        assert ids == list(cpu.generate([cpu.embed(prompt)], 16, GREEDY))
        assert len(ids) > 3
    # Steps after the first share one graph, over all answers that the cache serves.
    assert doubles.cuda.calls["cudaStreamBeginCapture"] == 1
    assert doubles.cuda.calls["cudaGraphLaunch"] > 20


def test_memory_is_allocated_once(planned: Bundle, doubles: Doubles) -> None:
    decoder = TensorRTDecoder(planned)
    list(decoder.generate([decoder.embed(PROMPT)], 8, GREEDY))
    allocations, used = doubles.cuda.num_allocations, doubles.cuda.used
    for prompt in (PROMPT, PROMPT[:4], PROMPT[::-1]):
        list(decoder.generate([decoder.embed(prompt)], 30, GREEDY))
    assert (doubles.cuda.num_allocations, doubles.cuda.used) == (allocations, used)
    del decoder
    gc.collect()
    assert doubles.cuda.used == 0


@pytest.mark.usefixtures("doubles")
def test_answers_do_not_disturb_each_other(planned: Bundle) -> None:
    decoder = TensorRTDecoder(planned)
    prompts = [decoder.embed(PROMPT), decoder.embed(PROMPT[::-1])]
    expected = [list(decoder.generate([prompt], 20, GREEDY)) for prompt in prompts]
    first = decoder.generate([prompts[0]], 20, GREEDY)
    begun = list(islice(first, 3))
    second = decoder.generate([prompts[1]], 20, GREEDY)
    other = list(islice(second, 2))
    begun += list(islice(first, 2))
    assert other + list(second) == expected[1]
    assert begun + list(first) == expected[0]
    assert list(decoder.generate([prompts[0]], 20, GREEDY)) == expected[0]


@pytest.mark.usefixtures("doubles")
def test_uses_every_position_and_no_more(planned: Bundle) -> None:
    decoder = TensorRTDecoder(planned)
    most = decoder.max_positions
    wild = Sampling(temperature=100.0, seed=3)  # hardly ever ends by itself
    ids = list(decoder.generate([np.resize(decoder.embed(PROMPT), (most - 3, 64))], 50, wild))
    assert len(ids) == 4
    with pytest.raises(UsageError, match=f"the model holds {most} with its answer"):
        decoder.generate([np.resize(decoder.embed(PROMPT), (most, 64))], 1, GREEDY)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_long_prompt_is_taken_in_parts(bundle: Path, tmp_path: Path, at_once: int) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    spec = write_graph(opened, "decoder", tmp_path / "first")
    prefill, step = graph_profiles(opened.manifest, "decoder", spec, tokens=40)
    low, _, (one, _, width) = prefill.shapes["inputs_embeds"]
    most = (one, at_once, width)
    prefill.shapes["inputs_embeds"] = (low, most, most)
    profiles: dict[str, tuple[Profile, ...]] = {"decoder": (prefill, step)}
    write_plans(opened, tmp_path / "graphs", profiles=profiles)
    decoder, cpu = TensorRTDecoder(opened), OnnxRuntimeDecoder.open(opened)
    assert decoder.max_positions == 40  # the plan's, where the model would hold more
    prompt = (*PROMPT, *PROMPT[:4])
    ids = list(decoder.generate([decoder.embed(prompt)], 12, GREEDY))
    assert ids == list(cpu.generate([cpu.embed(prompt)], 12, GREEDY))


def test_rows_go_behind_those_that_are_there(planned: Bundle, doubles: Doubles) -> None:
    """Logits after a rewind are those of a cache that never knew more, to the last bit."""
    decoder = CachedDecoder.open(planned)
    table = np.load(planned.file(planned.manifest.decoder.embedding))
    used, fresh = decoder.cache(64), decoder.cache(64)
    used.run(table[list(PROMPT)], 0)
    used.run(table[[9, 8, 7]], len(PROMPT))
    expected = fresh.run(table[list(PROMPT)], 0)
    expected = fresh.run(table[[11]], len(PROMPT))
    np.testing.assert_array_equal(used.run(table[[11]], len(PROMPT)), expected)
    assert not np.array_equal(used.run(table[[12]], len(PROMPT)), expected)
    with pytest.raises(InternalError, match="decoder: 60 tokens after 7, expected 1 or more and"):
        used.run(np.zeros((60, 64), np.float32), len(PROMPT))
    assert doubles.cuda.calls["cudaMemcpy2DAsync"]


@pytest.mark.usefixtures("doubles")
def test_an_answer_that_overflowed_spoils_no_other(planned: Bundle) -> None:
    decoder = CachedDecoder.open(planned)
    table = np.load(planned.file(planned.manifest.decoder.embedding))
    cache = decoder.cache(64)
    expected = cache.run(table[list(PROMPT)], 0)
    assert np.isnan(cache.run(np.full_like(table[:9], np.nan), 0)).all()
    np.testing.assert_array_equal(cache.run(table[list(PROMPT)], 0), expected)


@pytest.mark.usefixtures("doubles")
def test_no_more_frames_than_plans_were_built_for(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    write_plans(opened, tmp_path / "graphs", pool_node="inputs", frames=3)
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(12))
    assistant = Assistant(opened, device="tensorrt")
    assert assistant.model.default_frames > 3
    video = assistant.watch(clip)
    assert len(video.memory.arrays["keys"]) == 3
    assert video.ask("What happens?", max_new_tokens=2).ids
    with pytest.raises(
        UsageError, match=r"frames is 4, but the plans of .* take at most 3: run pp"
    ):
        assistant.watch(clip, 4)


@pytest.mark.usefixtures("doubles")
def test_answers_about_a_video_as_on_the_cpu(planned: Bundle, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", numbered_frames(12))
    said: dict[str, list[str]] = {}
    maps: dict[str, list[NDArray[np.float32]]] = {}
    for device in ("cpu", "tensorrt"):
        memory: MemoryKind = "hidden" if device == "tensorrt" else "hidden-fp32"
        video = Assistant.open(planned.path, device=device, memory=memory).load().watch(clip, 6)
        assert isinstance(video.memory.arrays["hidden"], DeviceArray) == (device == "tensorrt")
        # As many windows, and fewer: the plan takes any.
        asked = [(words, most) for words in ("What happens?", "A red box?") for most in (None, 4)]
        answers = [video.ask(words, num_tokens=most, max_new_tokens=12) for words, most in asked]
        said[device] = [answer.text for answer in answers]
        maps[device] = [answer.relevance for answer in answers]
    assert said["tensorrt"] == said["cpu"]
    for got, expected in zip(maps["tensorrt"], maps["cpu"], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.usefixtures("doubles")
def test_the_check_replays_on_the_plans(
    planned: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([str(planned.path), "--device", "tensorrt", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "sound"
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)


def test_the_check_tells_what_computes_wrongly(
    planned: Bundle, doubles: Doubles, capsys: pytest.CaptureFixture[str]
) -> None:
    doubles.faults["execute"] = "no kernel for this"
    assert check.main([str(planned.path), "--device", "tensorrt"]) == 70
    assert "unsound: running: vision: TensorRT failed: no kernel for this" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_bundle_without_plans_is_told(bundle: Path, doubles: Doubles) -> None:
    with pytest.raises(NotFoundError, match="no plans are built: run ppllava-build"):
        chat.main([str(bundle), "-", "Hello?", "--device", "tensorrt"])
    with pytest.raises(
        UsageError, match="device is 'npu', expected one of cpu, openvino, tensorrt"
    ):
        Assistant.open(bundle, device="npu")
    assert doubles.cuda.used == 0

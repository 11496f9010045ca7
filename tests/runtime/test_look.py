"""Pictures, several of them, and nothing at all: what goes into the prompt, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ppllava_engines.bundle import Bundle
from ppllava_engines.errors import DataError, IncompatibleError, UsageError
from ppllava_runtime import Assistant, Prompt
from ppllava_runtime.anyres import Tiling
from ppllava_runtime.decoders import FinishReason, Sampling
from ppllava_runtime.preprocess import pixel_values
from tiny_videos import numbered_frames, write_video

QUESTION = "What colour is the circle?"
PINPOINTS = ((32, 64), (64, 32), (64, 64))
SIDE, GRID = 32, (4, 4)

Array = NDArray[Any]


@pytest.fixture
def assistant(bundle: Path) -> Assistant:
    return Assistant.open(bundle, memory="hidden-fp32")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A wide, a tall and a square picture."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{name}.png" for name in ("wide", "tall", "square")]
    for number, (path, size) in enumerate(zip(files, [(96, 48), (40, 90), (70, 70)], strict=True)):
        Image.fromarray(numbered_frames(4, *size)[number + 1]).save(path)
    return files


def changed(assistant: Assistant, manifest: dict[str, Any], **model: Any) -> Assistant:
    """The same bundle, whose manifest says something else."""
    bundle = assistant.bundle
    spec = dataclasses.replace(bundle.manifest.model, **model)
    said = dataclasses.replace(bundle.manifest, **{"model": spec, **manifest})
    return Assistant(Bundle(bundle.path, said), memory="hidden-fp32")


def prompts_given(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Fills with every prompt that the decoder is given from now on."""
    given: list[Array] = []
    generate = assistant.decoder.generate

    def noted(
        parts: Sequence[Array],
        most: int,
        sampling: Sampling,
        *others: Any,
    ) -> Generator[int, None, FinishReason]:
        given.append(np.concatenate(parts))
        return generate(parts, most, sampling, *others)

    monkeypatch.setattr(assistant.decoder, "generate", noted)
    return given


def embedded(assistant: Assistant, turn: str, splices: list[Array]) -> Array:
    """The prompt, made by hand: the template's text with `splices` where it says <image>."""
    bundle = assistant.bundle
    tokenizer = Tokenizer.from_file(str(bundle.file(bundle.manifest.tokenizers["decoder"])))
    ids = tokenizer.encode(turn).ids
    place = assistant.model.image_token_index
    embeds = [assistant.decoder.embed([id_]) for id_ in ids]
    spliced = iter(splices)
    rows = [next(spliced) if id_ == place else row for id_, row in zip(ids, embeds, strict=True)]
    assert next(spliced, None) is None
    return np.concatenate(rows)


def squashed(paths: list[Path]) -> Array:
    """(T,S,S,3): the pictures as the vision tower sees them, whole."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return np.stack(pictures)


def pooled(assistant: Assistant, frames: Array, kernel: tuple[int, int, int]) -> dict[str, Array]:
    """What the graphs say of frames (T,S,S,3), each encoded alone."""
    model = assistant.model
    values = pixel_values(frames, SIDE, model.image_mean, model.image_std)
    parts = [assistant.vision.run({"pixel_values": value[None]}) for value in values]
    seen = {name: np.concatenate([part[name] for part in parts]) for name in ("keys", "hidden")}
    text_ids = assistant.prompts.build(QUESTION).text_ids
    text_embed = assistant.text.run({"input_ids": text_ids})["text_embed"]
    window = {"kernel": np.array(kernel), "stride": np.array(kernel)}
    return assistant.pool.run({**seen, "text_embed": text_embed, **window})


class TestPicture:
    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_is_seen_whole_and_in_tiles(
        self, assistant: Assistant, paths: list[Path], number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = prompts_given(assistant, monkeypatch)
        answer = assistant.watch(paths[number]).ask(QUESTION, max_new_tokens=3)
        with Image.open(paths[number]) as image:
            tiling = Tiling.of((image.height, image.width), PINPOINTS, SIDE)
            views = tiling.views(np.asarray(image))
        found = pooled(assistant, views, (1, 2, 2))
        newline = np.load(assistant.bundle.path / "image_newline.npy")
        tokens = tiling.assembled(found["pooled"].reshape(len(views), 2, 2, -1), newline)
        expected = embedded(assistant, f"USER: <image>\n{QUESTION} ASSISTANT: ", [tokens])

        assert answer.kind == "image"
        assert len(views) == (3, 3, 5)[number]
        np.testing.assert_allclose(given[0], expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(answer.relevance, found["relevance"], atol=1e-6)
        accounting = answer.accounting
        assert accounting.num_frames_sampled == accounting.num_frames_decoded == 1
        assert accounting.num_frames_encoded == len(views)
        assert accounting.num_tokens_before == 16 * len(views)
        assert accounting.num_tokens_after == len(tokens)

    def test_alone_ends_with_a_newline(self, assistant: Assistant, paths: list[Path]) -> None:
        whole = changed(assistant, {}, image_grid_pinpoints=())
        answer = whole.watch(paths[0]).ask(QUESTION, max_new_tokens=3)
        assert answer.relevance.shape == (1, 4, 4)
        assert answer.accounting.num_tokens_after == 4 + 1

    def test_is_one_frame_where_the_model_has_no_newline(
        self, assistant: Assistant, paths: list[Path]
    ) -> None:
        plain = changed(assistant, {"image_newline": None})
        answer = plain.watch(paths[0]).ask(QUESTION, max_new_tokens=3)
        assert answer.relevance.shape == (1, 4, 4)
        assert answer.accounting.num_tokens_after == 4  # by the image kernel, (1,2,2)

    def test_has_no_time_to_pool_over(self, assistant: Assistant, paths: list[Path]) -> None:
        video_like = changed(assistant, {}, image_kernel=(2, 2, 2), image_stride=(2, 2, 2))
        for one in (assistant, video_like):
            answer = one.watch(paths[2]).ask(QUESTION, max_new_tokens=1)
            assert answer.accounting.num_tokens_after == 4 + 4 * (4 + 1)
        with pytest.raises(UsageError, match="kernel 2,2,2 does not fit into the 1,4,4 tokens"):
            assistant.watch(paths[2]).ask(QUESTION, kernel=(2, 2, 2))

    def test_keeps_a_budget_with_all_its_newlines(
        self, assistant: Assistant, paths: list[Path]
    ) -> None:
        picture = assistant.watch(paths[2])
        budgets = (7, 13, 24, 50, 88, 10**6)
        counts = [
            picture.ask(QUESTION, num_tokens=budget, max_new_tokens=1).accounting.num_tokens_after
            for budget in budgets
        ]
        for budget, count in zip(budgets, counts, strict=True):
            assert min(budget, 88) / 2 < count <= budget
        # Five views of h×w tokens and a newline per row of tiles, 5hw + 2h: of 1×1, 2×2 and 4×4.
        assert (counts[0], counts[2], counts[4], counts[5]) == (7, 24, 88, 88)
        with pytest.raises(
            UsageError,
            match="the number of tokens is 6, but this picture in 5 views takes 7 or more",
        ):
            picture.ask(QUESTION, num_tokens=6)

    @pytest.mark.parametrize("asked", ["num_frames", "start", "end"])
    def test_is_no_video_to_choose_frames_of(
        self, assistant: Assistant, paths: list[Path], asked: str
    ) -> None:
        name = asked.removeprefix("num_")
        with pytest.raises(UsageError, match=f"wide.png: {name}: of no meaning for a picture"):
            assistant.watch(paths[0], **{asked: 1})  # type: ignore[arg-type]

    def test_shows_its_relevance_where_it_is(self, assistant: Assistant, paths: list[Path]) -> None:
        memory = assistant.watch(paths[1]).memory
        assert memory.tiling is not None
        assert [thumbnail.shape for thumbnail in memory.thumbnails] == [(90, 40, 3)]
        relevance = np.zeros((3, *GRID), np.float32)
        relevance[2, 3, 1] = 1  # the last row of the lower tile
        (fine,) = memory.maps(relevance)
        # 90×40 becomes 64×29 on 64×32; of its four columns not half a one is padding on each side.
        assert fine.shape == (8, 4)
        assert np.argwhere(fine).tolist() == [[7, 1]]

    def test_of_which_unpadding_leaves_no_tile_is_shown_whole(
        self, assistant: Assistant, tmp_path: Path
    ) -> None:
        Image.new("RGB", (400, 2)).save(tmp_path / "line.png")
        line = assistant.watch(tmp_path / "line.png")
        answer = line.ask(QUESTION, max_new_tokens=1)
        assert answer.accounting.num_tokens_after == 4
        assert [found.shape for found in line.memory.maps(answer.relevance)] == [GRID]
        answer.save_heatmap(tmp_path / "map.png")


class TestPictures:
    def test_are_pooled_together_and_kept_apart(
        self, assistant: Assistant, paths: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = prompts_given(assistant, monkeypatch)
        told: list[tuple[int, int]] = []
        video = assistant.look(paths, lambda done, total: told.append((done, total)))
        answer = video.ask(QUESTION, max_new_tokens=3)
        found = pooled(assistant, squashed(paths), (1, 2, 2))
        turn = "USER: " + "<image>\n" * 3
        expected = embedded(
            assistant, f"{turn}{QUESTION} ASSISTANT: ", np.split(found["pooled"], 3)
        )
        assert answer.kind == "images"
        np.testing.assert_allclose(given[0], expected, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(answer.relevance, found["relevance"], atol=1e-6)
        assert answer.accounting.num_frames_sampled == 3 == video.info.num_frames
        assert told == [(0, 3), (3, 3)]

    def test_that_pooling_joins_share_one_place(
        self, assistant: Assistant, paths: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = prompts_given(assistant, monkeypatch)
        video = assistant.look(paths)
        video.ask(QUESTION, kernel=(3, 2, 2), max_new_tokens=1)
        tokens = pooled(assistant, squashed(paths), (3, 2, 2))["pooled"]
        expected = embedded(assistant, f"USER: <image>\n{QUESTION} ASSISTANT: ", [tokens])
        np.testing.assert_allclose(given[0], expected, atol=1e-5 * np.abs(expected).max())

    def test_are_one_when_there_is_one(self, assistant: Assistant, paths: list[Path]) -> None:
        one, same = assistant.look(paths[:1]), assistant.watch(paths[0])
        np.testing.assert_array_equal(one.memory.arrays["keys"], same.memory.arrays["keys"])
        assert one.memory.kind == same.memory.kind == "image"

    def test_share_a_budget_and_stay_apart(
        self, assistant: Assistant, paths: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = prompts_given(assistant, monkeypatch)
        video = assistant.look(paths)
        answer = video.ask(QUESTION, num_tokens=4, max_new_tokens=1)
        assert answer.accounting.num_tokens_after == 3
        tokens = pooled(assistant, squashed(paths), (1, 4, 4))["pooled"]
        turn = "USER: " + "<image>\n" * 3
        expected = embedded(assistant, f"{turn}{QUESTION} ASSISTANT: ", np.split(tokens, 3))
        np.testing.assert_allclose(given[0], expected, atol=1e-5 * np.abs(expected).max())
        with pytest.raises(UsageError, match="tokens is 2, but these 3 pictures take 3 or more"):
            video.ask(QUESTION, num_tokens=2)

    def test_are_drawn_with_their_own_proportions(
        self, assistant: Assistant, paths: list[Path], tmp_path: Path
    ) -> None:
        video = assistant.look(paths)
        assert [t.shape[:2] for t in video.memory.thumbnails] == [(48, 96), (90, 40), (70, 70)]
        assert video.memory.captions == ["picture 1", "picture 2", "picture 3"]
        for name in ("map.png", "map.mp4"):
            video.ask(QUESTION, max_new_tokens=1).save_heatmap(tmp_path / name)
            assert (tmp_path / name).stat().st_size > 1000

    def test_are_refused(self, assistant: Assistant, paths: list[Path], tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="there is no picture to look at"):
            assistant.look([])
        for alone in (paths[0], str(paths[0])):
            with pytest.raises(UsageError, match=r"look takes a list of paths, got '.*wide\.png'"):
                assistant.look(alone)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="the number of pictures is 65, but checkpoint takes"):
            assistant.look(paths[:1] * 65)
        clip = write_video(tmp_path / "clip.mp4", numbered_frames(3))
        with pytest.raises(DataError, match="not an image, give a video alone"):
            assistant.look([paths[0], clip])


class TestCoupledTower:
    """With the bundle of an uncoupled one: only what goes in together is looked at."""

    @pytest.fixture
    def runs(self, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        counts: list[int] = []
        run = assistant.vision.run

        def counted(feeds: dict[str, Array]) -> dict[str, Array]:
            counts.append(len(feeds["pixel_values"]))
            return run(feeds)

        monkeypatch.setattr(assistant.vision, "run", counted)
        coupled = changed(assistant, {}, frames_coupled=True)
        monkeypatch.setattr(assistant, "model", coupled.model)
        monkeypatch.setattr(assistant, "bundle", coupled.bundle)
        return counts

    def test_sees_frames_and_pictures_together_and_views_alone(
        self, assistant: Assistant, paths: list[Path], tmp_path: Path, runs: list[int]
    ) -> None:
        assistant.watch(write_video(tmp_path / "clip.mp4", numbered_frames(9)), 9)
        assistant.look(paths)
        assistant.watch(paths[2])
        assert runs == [9, 3, 1, 1, 1, 1, 1]


class TestNothing:
    def test_needs_no_place(self, assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
        given = prompts_given(assistant, monkeypatch)
        answer = assistant.ask(QUESTION, max_new_tokens=5)
        assert len(answer.ids) == 5
        expected = embedded(assistant, f"USER: {QUESTION} ASSISTANT: ", [])
        np.testing.assert_array_equal(given[0], expected)
        assert answer.kind is None
        assert answer.relevance.shape == (0, *GRID)
        accounting = answer.accounting
        assert accounting.num_frames_sampled == accounting.num_frames_encoded == 0
        assert accounting.num_tokens_before == accounting.num_tokens_after == 0
        assert accounting.num_prompt_tokens == len(expected)
        milliseconds = accounting.milliseconds
        assert milliseconds.vision == milliseconds.text == milliseconds.pool == 0
        assert milliseconds.generate > 0

    def test_has_no_heatmap(self, assistant: Assistant, tmp_path: Path) -> None:
        answer = assistant.ask(QUESTION, max_new_tokens=1)
        with pytest.raises(UsageError, match="there is no picture to draw it on"):
            answer.save_heatmap(tmp_path / "map.png")


class TestIds:
    @pytest.fixture
    def mute(self, assistant: Assistant) -> Assistant:
        return changed(assistant, {"tokenizers": {}})

    def test_ask_a_bundle_without_tokenizers(
        self, assistant: Assistant, mute: Assistant, paths: list[Path]
    ) -> None:
        prompt = assistant.prompts.build(QUESTION)
        spoken = assistant.watch(paths[0]).ask(QUESTION, max_new_tokens=9)
        answer = mute.watch(paths[0]).ask(prompt, max_new_tokens=9)
        assert answer.ids == spoken.ids
        assert len(answer.ids) == 9 == answer.accounting.num_new_tokens
        assert answer.was_cut
        assert assistant.watch(paths[0]).ask(prompt, max_new_tokens=9).text == spoken.text
        assert mute.ask(Prompt(prompt.text_ids, (5, 6, 7)), max_new_tokens=4).ids
        with pytest.raises(IncompatibleError, match="there are ids and no text"):
            _ = answer.text
        with pytest.raises(IncompatibleError, match="it takes no questions in text"):
            mute.watch(paths[0]).ask(QUESTION)

    def test_are_there_as_far_as_they_were_asked_for(self, assistant: Assistant) -> None:
        answer = assistant.ask(QUESTION, max_new_tokens=60, temperature=2.0, seed=1)
        first = next(iter(answer))
        assert 0 < answer.accounting.num_new_tokens < 60
        assert len(answer.ids) == answer.accounting.num_new_tokens > 10
        assert answer.text.startswith(first)

    def test_must_have_the_places(self, assistant: Assistant, paths: list[Path]) -> None:
        prompt = assistant.prompts.build(QUESTION)
        sentence = r"the prompt has 1 places for visual tokens \(id 3\), expected "
        with pytest.raises(UsageError, match=f"{sentence}0"):
            assistant.ask(prompt)
        with pytest.raises(UsageError, match=f"{sentence}3"):
            assistant.look(paths).ask(prompt)

    @pytest.mark.parametrize(
        ("ids", "got"), [((), "no ids"), ((3, 384), "384 among its ids"), ((-1, 3), "-1 among")]
    )
    def test_must_be_the_decoders(
        self, assistant: Assistant, ids: tuple[int, ...], got: str
    ) -> None:
        text_ids = assistant.prompts.build(QUESTION).text_ids
        with pytest.raises(UsageError, match=rf"the prompt has {got}.*expected some from 0 to 383"):
            assistant.ask(Prompt(text_ids, ids))

    def test_that_the_text_tower_does_not_know_are_refused(
        self, assistant: Assistant, paths: list[Path]
    ) -> None:
        prompt = assistant.prompts.build(QUESTION)
        text_ids = prompt.text_ids.copy()
        text_ids[0, 1] = 10**6
        with pytest.raises(UsageError, match="the prompt's text_ids go up to 1000000 and the text"):
            assistant.watch(paths[0]).ask(Prompt(text_ids, prompt.ids))


def test_a_newline_must_be_that_of_the_graphs(
    assistant: Assistant, bundle: Path, tmp_path: Path, paths: list[Path]
) -> None:
    np.save(tmp_path / "image_newline.npy", np.zeros(3, np.float32))
    files = {name: bundle / name for name in assistant.bundle.manifest.files}
    for name, path in files.items():
        if name != "image_newline.npy":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).symlink_to(path)
    broken = Assistant(Bundle(tmp_path, assistant.bundle.manifest))
    with pytest.raises(DataError, match=r"image_newline.npy: it is float32 \(3,\), expected"):
        broken.watch(paths[0])

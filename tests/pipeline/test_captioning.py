"""What is asked, what of an answer is believed, and what is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimodal.pipeline.captioning.answers import (
    OK,
    checked,
    loops,
    read_answer,
    refuses,
    speaks,
    tidy,
    without_opening,
)
from unimodal.pipeline.captioning.captioner import Answer
from unimodal.pipeline.captioning.describe import answered, describe_stage, with_descriptions
from unimodal.pipeline.captioning.prompt import Prompt, load_prompt
from unimodal.pipeline.captioning.requests import Request, ask_of, requests_of, spans
from unimodal.pipeline.captioning.settings import CaptionSettings
from unimodal.pipeline.captioning.store import Store
from unimodal.pipeline.clips import CLIPS, table
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.frames import Clip, Sample

JPEG = b"\xff\xd8 a picture \xff\xd9"
SETTINGS = CaptionSettings(source="endpoint", model="m", url="http://localhost/v1")
GOOD = "A brown dog runs over a wide lawn, and a tall tree stands behind it in the evening light."


@pytest.fixture
def prompt() -> Prompt:
    return load_prompt("dense", "en")


def _said(prompt: Prompt, kind: str = "image", **texts: Any) -> str:
    return json.dumps({style.name: GOOD for style in prompt.of(kind)} | texts)


def test_prompts_of_the_package_ask_for_the_same_styles_in_both_languages() -> None:
    for kind, names in (
        ("image", ["short", "dense", "style"]),
        ("video", ["short", "dense", "motion", "camera", "style"]),
    ):
        for language in ("en", "zh"):
            found = load_prompt("dense", language)
            assert [style.name for style in found.of(kind)] == names
            assert found.schema(kind)["required"] == names
            assert all(f"- {name}: " in found.before(kind, "json") for name in names)


def test_words_before_the_pictures_are_the_same_for_all_clips(prompt: Prompt) -> None:
    frames = (JPEG,) * 2
    asks = [
        ask_of(
            Request(str(i), 0, "video", None, None, i, frames, (0.0, i / 2)), SETTINGS, prompt, 0
        )
        for i in (2, 7)
    ]
    assert asks[0].before == asks[1].before and asks[0].system == asks[1].system
    assert "2 frames" in asks[0].after and "0.0, 3.5 s" in asks[1].after and "7.0" in asks[1].after


def test_a_prompt_of_ones_own_is_checked_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('version = "a"\n[en]\nsystem = 3\n[en.styles.x]\nonly = "night"\nask = "a"\n')
    with pytest.raises(UsageError) as error:
        load_prompt(str(file), "en")
    for part in ("mine.toml", "version", "en.system", "en.image", "en.styles.x.only"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match="no language fr: there are en, zh"):
        load_prompt("dense", "fr")
    with pytest.raises(UsageError, match="no prompt desne: did you mean dense"):
        load_prompt("desne", "en")
    with pytest.raises(UsageError, match="there is no style shot"):
        load_prompt("dense", "en", ("shot",))
    assert load_prompt("dense", "en").hash != load_prompt("dense", "en", ("dense",)).hash


@given(st.floats(0.1, 5000.0), st.floats(1.0, 60.0))
def test_long_clips_are_cut_evenly_into_pieces_of_half_to_all_of_the_length(
    duration: float, longest: float
) -> None:
    found = spans(duration, longest)
    if duration < longest:
        assert found == []
        return
    lengths = [end - start for start, end in found]
    assert found[0][0] == 0 and found[-1][1] == pytest.approx(duration)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert all(longest / 2 - 1e-6 <= length < longest + 1e-6 for length in lengths)


def test_pieces_see_pictures_of_their_own_span_and_short_clips_their_keyframes() -> None:
    def clip(seconds: float) -> Clip:
        times = [10.0 + i / 2 for i in range(int(seconds * 2))]
        samples = tuple(
            Sample(t, i % 5 == 0, False, 0, JPEG[:-2] + str(t).encode() + JPEG[-2:])
            for i, t in enumerate(times)
        )
        row = {"uid": "u", "kind": "video", "start_s": 10.0, "duration_s": seconds}
        return Clip(row, samples)

    (whole,) = requests_of(clip(19.9), SETTINGS)
    assert (whole.start_s, whole.end_s, len(whole.frames)) == (None, None, 8)
    assert whole.times_s[:2] == (0.0, 2.5)
    pieces = requests_of(clip(50.0), SETTINGS)
    assert [(r.piece, round(r.start_s or 0, 2), round(r.end_s or 0, 2)) for r in pieces] == [
        *((0, 0.0, 16.67), (1, 16.67, 33.33), (2, 33.33, 50.0))
    ]
    for piece in pieces:
        assert len(piece.frames) == 12 and piece.start_s is not None and piece.end_s is not None
        assert all(0 <= t < piece.end_s - piece.start_s for t in piece.times_s)
        for t, frame in zip(piece.times_s, piece.frames, strict=True):
            assert f"{10.0 + piece.start_s + t:.2f}".encode() in frame.replace(
                b".5", b".50"
            ).replace(b".0", b".00")
    few = requests_of(clip(19.9), SETTINGS.model_copy(update={"frames": 3}))[0]
    assert len(few.frames) == 3
    empty = requests_of(Clip(clip(3).row, ()), SETTINGS)[0]
    assert empty.problem and not empty.frames
    torn = Clip(clip(3).row, (Sample(10.0, True, True, 0, JPEG[:-1]),))
    assert "JPEG" in requests_of(torn, SETTINGS)[0].problem


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("This image shows a dog on a lawn.", "A dog on a lawn."),
        ("In this image, we can see that cats sleep.", "Cats sleep."),
        ("The video depicts: two men.", "Two men."),
        ("Here is a detailed description: The video shows rain.", "Rain."),
        ("图中显示了一只狗。", "一只狗。"),
        ("这段视频展示，一座山。", "一座山。"),
        ("The image is blurry.", "The image is blurry."),
        ("This image shows.", "This image shows."),
        ("The imagery shows a dog.", "The imagery shows a dog."),
        ("A dog on a lawn.", "A dog on a lawn."),
    ],
)
def test_openings_that_say_nothing_are_cut_off(text: str, left: str) -> None:
    assert without_opening(text) == left


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("I'm sorry, but I can't help with that request at all.", "refused"),
        ("I’m unable to describe people in pictures, as a rule.", "refused"),
        ("As an AI, I have no eyes with which to look at this.", "refused"),
        ("对不起，我无法描述这张图片中的人物和场景以及其他内容。", "refused"),
        ("the dog runs " * 8, "repeats itself"),
        ("no " * 30, "repeats itself"),
        ("狗在跑" * 12, "repeats itself"),
        ("a" * 60, "repeats itself"),
        ("The dog runs \ufffd\ufffdver the grass", "broken characters"),
        (
            "一只棕色的狗在宽阔的草地上奔跑，后面有一棵大树和一座红色屋顶的房子，天空很蓝而且没有一朵云。",
            "wrong language",
        ),
        ("Коричневая собака бежит по широкой лужайке, а за ней стоит дерево.", "wrong language"),
        ("A dog.", "too short"),
        ("A dog and a cat. " + " ".join(f"word{i}" for i in range(900)), "too long"),
        ("", "empty"),
        ("\u200b\x00\u202e", "empty"),
        (GOOD, OK),
        ("A sign reads 你好 and “I'm sorry” above the door of a very, very, very small bar.", OK),
        (
            "I can't Stop is written on a poster that hangs above the crowd of dancing people.",
            "refused",
        ),
    ],
)
def test_what_is_no_description_is_refused_and_says_why(
    prompt: Prompt, text: str, status: str
) -> None:
    dense = next(style for style in prompt.styles if style.name == "dense")
    found, kept = checked(text, dense, "en")
    assert (found, bool(kept)) == (status, status == OK)


def test_languages_are_told_apart_by_their_script() -> None:
    assert speaks("一只狗在 Starbucks 门口", "zh") and not speaks("A dog at a door", "zh")
    assert speaks("犬が走っている", "ja") and speaks("Собака бежит", "ru")
    assert speaks("Ein Hund läuft", "de") and speaks("A dog", "en-GB")
    assert not speaks("12 34 !!", "en")


@given(st.text(max_size=300))
def test_any_text_is_tidied_and_judged_without_an_error(text: str) -> None:
    clean = tidy(text)
    assert tidy(clean) == clean or clean[:1] in "\"'`"
    assert not any(ord(c) < 32 or 0x202A <= ord(c) <= 0x202E for c in clean)
    without_opening(clean), loops(clean), refuses(clean)
    answer = Answer(text)
    for status, kept in read_answer(answer, load_prompt("dense", "en"), "image", "json").values():
        assert (status == OK) == bool(kept)


def test_plain_english_of_many_sentences_is_no_loop() -> None:
    text = (
        "A man in a red coat walks down a narrow street. The street is lined with old houses, and "
        "the houses have red doors. On the left, a woman in a blue coat waits beside a bicycle; on "
        "the right, a child holds a balloon. The man stops, looks at the child, and looks at the "
        "woman. The light is low and warm, and long shadows lie on the ground."
    )
    assert not loops(text) and not loops("Red, green, red, green, and red again: a traffic light.")


def test_broken_and_cut_off_answers_give_no_captions(prompt: Prompt) -> None:
    good = _said(prompt)
    cases: list[tuple[Answer, str]] = [
        (Answer(good), OK),
        (Answer(f"```json\n{good}\n```"), OK),
        (Answer(f"<think>hm, {{</think>\n{good}"), OK),
        (Answer(good[:-3]), "broken JSON"),
        (Answer(good, "length"), "truncated"),
        (Answer(good.replace('", "', '" "', 1)), "broken JSON"),
        (Answer("[" * 50_000), "broken JSON"),
        (Answer('["a"]'), "broken JSON"),
        (Answer(" \n"), "empty"),
        (Answer("x" * 200_000), "too long"),
        (Answer("I cannot do that."), "refused"),
    ]
    for answer, status in cases:
        found = read_answer(answer, prompt, "image", "json")
        assert {s for s, _ in found.values()} == {status}, answer.text[:40]
    partly = read_answer(Answer(_said(prompt, dense=7, style=None)), prompt, "image", "json")
    assert [status for status, _ in partly.values()] == [OK, "broken JSON", "broken JSON"]


class _Scripted:
    """A captioner that gives prepared answers by clip, and also ones that nobody asked for."""

    in_flight = 3

    def __init__(self, script: dict[str, list[Answer]]) -> None:
        self.script, self.held, self.asks = script, [], []

    def submit(self, ask: Any) -> None:
        self.asks.append(ask)
        self.held.append(ask)

    def collect(self) -> list[tuple[str, Answer]]:
        ask = self.held.pop()
        uid = ask.key.split("/")[0]
        stray = Answer(json.dumps({"short": "wrong", "dense": "wrong", "style": "wrong"}))
        return [("nobody/0/0", stray), (ask.key, self.script[uid].pop(0)), (ask.key, stray)]

    def close(self) -> None:
        pass


def _request(uid: str) -> Request:
    return Request(uid, 0, "image", None, None, 0.0, (JPEG,), (0.0,))


def test_a_bad_answer_is_asked_for_again_with_another_seed_and_good_parts_are_kept(
    prompt: Prompt,
) -> None:
    bad = Answer("no json", output_tokens=3)
    half = Answer(_said(prompt, dense="the dog " * 50), output_tokens=5)
    other = Answer(_said(prompt, short="the cat " * 50, dense=f"{GOOD} Again."), output_tokens=7)
    script = {
        "a": [bad, Answer(_said(prompt))],
        "b": [half, other],
        "c": [bad] * 3,
        "d": [half] * 3,
    }
    captioner = _Scripted(script)
    rows = {
        row["uid"]: row
        for row in answered(map(_request, script), captioner, SETTINGS, prompt)  # type: ignore[arg-type]
    }
    assert {uid: (row["status"], row["tries"]) for uid, row in rows.items()} == {
        "a": (OK, 2),
        "b": (OK, 2),
        "c": ("broken JSON", 3),
        "d": ("repeats itself", 3),
    }
    assert [c["text"] for c in rows["b"]["captions"]] == [GOOD, f"{GOOD} Again.", GOOD]
    assert [c["status"] for c in rows["d"]["captions"]] == [OK, "repeats itself", OK]
    assert rows["d"]["captions"][1]["text"] is None and rows["b"]["output_tokens"] == 12
    assert all(c["text"] is None for c in rows["c"]["captions"])
    seeds = [(a.seed, a.temperature) for a in captioner.asks if a.key.startswith("c/")]
    assert seeds == [(0, 0.2), (1, 0.7), (2, 0.7)]
    assert len({ask.key for ask in captioner.asks}) == len(captioner.asks)


def _row(uid: str, status: str, text: str | None, piece: int = 0) -> dict[str, Any]:
    said = {"style": "short", "lang": "en", "text": text, "model": "m", "status": status}
    return {"uid": uid, "piece": piece, "status": status, "captions": [said], "tries": 1}


def test_a_store_keeps_what_was_good_whatever_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimodal.pipeline.captioning.store.FILES", 3)
    store = Store(tmp_path / "describe-x", write=True)
    assert store.state == ""
    for row in (_row("a", OK, "first"), _row("b", "refused", None), _row("c", OK, "c", 1)):
        store.add(row)
    killed = Store(store.folder, write=True)  # nobody called merge
    assert killed.statuses == {("a", 0): OK, ("b", 0): "refused", ("c", 1): OK}
    state = killed.state
    killed.add(_row("a", "refused", None))
    killed.add(_row("b", OK, "second"))
    killed.merge()
    assert killed.state != state
    for _ in range(4):
        killed.add(_row("d", "empty", None))
        killed.merge()
    assert len(killed.files()) <= 3
    again = Store(store.folder)
    assert again.statuses == {("a", 0): OK, ("b", 0): OK, ("c", 1): OK, ("d", 0): "empty"}
    texts = {r["uid"]: r["captions"][0]["text"] for r in again.rows().to_pylist()}
    assert texts == {"a": "first", "b": "second", "c": "c", "d": None}
    assert again.totals()["answered"] == 3 and again.totals()["failed"] == {"empty": 1}


def test_captions_of_a_model_come_first_unless_people_are_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "describe-x", write=True)
    store.add(_row("a", OK, "by a model"))
    store.merge()
    mine = {"style": "sidecar", "text": "by hand", "status": "ok"}
    rows = [{"uid": uid, "uri": uid, "captions": [mine]} for uid in ("a", "b")]
    clips = table(rows, CLIPS)
    for first, order in (
        ("model", ["by a model", "by hand"]),
        ("people", ["by hand", "by a model"]),
    ):
        found = with_descriptions(clips, store, first).column("captions").to_pylist()
        assert [[c["text"] for c in said] for said in found] == [order, ["by hand"]]


def test_the_folder_covers_what_words_depend_on_and_not_where_they_come_from() -> None:
    base = describe_stage(SETTINGS, "k").folder
    same = {"url": "http://other/v1", "in_flight": 2, "retries": 1, "source": "vllm", "tries": 9}
    for name, value in same.items():
        assert describe_stage(SETTINGS.model_copy(update={name: value}), "k").folder == base
    others = {"model": "n", "language": "zh", "seed": 1, "frames": 4, "temperature": 0.0}
    found = {
        describe_stage(SETTINGS.model_copy(update={name: value}), "k").folder
        for name, value in others.items()
    }
    assert len({base, *found, describe_stage(SETTINGS, "l").folder}) == len(others) + 2


def test_a_model_that_is_tuned_in_place_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1000))
    settings = CaptionSettings(source="vllm", model=str(tmp_path))

    def folder(**engine: Any) -> str:
        return describe_stage(settings.model_copy(update={"engine": engine}), "k").folder

    before = folder()
    assert folder(max_num_seqs=3) == before != folder(dtype="float16")
    weights.write_bytes(b"1" + bytes(999))
    assert folder() != before


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to",
            "caption.max_model_len (now 4096)",
        ),
        ("ValueError: No available memory for the cache blocks.", "caption.gpu_memory_utilization"),
        (
            "ValueError: Free memory on device cuda:0 (3/80 GiB) on startup is less than desired",
            "lower caption.gpu_memory_utilization (now 0.9)",
        ),
        ("OSError: x is not a local folder and is not a valid model identifier", "no such model"),
        (
            "ValueError: Total number of heads must be divisible by tensor parallel",
            "tensor_parallel",
        ),
        ("EngineCore encountered an issue. See stack trace", "lower caption.in_flight (now 64)"),
        (
            "ValueError: memory is less than requested memory for kv (9 GiB)",
            "for the KV cache: lower",
        ),
        ("KeyError: 'odd'\nRuntimeError: Engine core initialization failed.", "KeyError: 'odd'"),
    ],
)
def test_an_engine_that_does_not_start_names_what_to_set(said: str, names: str) -> None:
    from unimodal.pipeline.captioning.offline import _trouble

    settings = CaptionSettings(source="vllm", model="a/model", max_model_len=4096)
    told = str(_trouble(RuntimeError("Engine core initialization failed."), said, settings))
    assert names in told and told.startswith("a/model: ") and "\n" not in told


def test_quotes_around_a_text_go_and_those_in_it_stay() -> None:
    assert tidy('"a dog"') == "a dog"
    assert tidy("'a dog's bone'") == "a dog's bone"
    for text in ('"Stop" stands on the sign beside "Go"', "'Stop' beside 'Go'"):
        assert tidy(text) == text


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http://h:abc/v1", "ftp://h/v1", "h/v1"])
def test_an_address_that_is_none_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(ValueError, match="write it as http://host:port/v1"):
        CaptionSettings(source="endpoint", model="m", url=url)

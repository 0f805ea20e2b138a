"""The server as its clients see it: real requests to a real socket, and a sampler that waits."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.model.served import GRIDS, Held, listening, small_sampler
from unimodal.model import media, serve
from unimodal.model.asked import Limits
from unimodal.model.emu3 import Manner
from unimodal.model.queue import Queue
from unimodal.model.sample import Sampler
from unimodal.tokenize.document import block_length

JSON = {"content-type": "application/json"}
IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"
VIDEOS, EXTENSIONS = "/v1/videos/generations", "/v1/videos/extensions"
CHAT = "/v1/chat/completions"
PICTURE = np.random.default_rng(1).integers(0, 256, (32, 40, 3), np.uint8)
CLIP = np.random.default_rng(2).integers(0, 256, (8, 32, 32, 3), np.uint8)
EVERYTHING = {"caption": 9, "chat": 1, "edit": 1}


@pytest.fixture(scope="module")
def made() -> tuple[Sampler, Held]:
    return small_sampler()


@pytest.fixture
def sampler(made: tuple[Sampler, Held]) -> Sampler:
    return made[0]


@pytest.fixture
def held(made: tuple[Sampler, Held]) -> Iterator[Held]:
    """The sampler's backend; `held.free.clear()` makes it wait at the end of the next row."""
    backend = made[1]
    backend.calls.clear()
    yield backend
    backend.free.set()
    backend.reached.clear()
    backend.breaks = False
    backend.most = 1 << 30


Serve = Callable[..., httpx.Client]


@pytest.fixture
def served(sampler: Sampler, held: Held) -> Iterator[Serve]:
    """Function that starts a server and returns a client of it; `client.queue` is its queue."""
    with ExitStack() as stack:

        def start(**given: Any) -> httpx.Client:
            given = {"name": "small", "learned": EVERYTHING} | given
            app = serve.application(sampler, **given)
            url = stack.enter_context(listening(app))
            stack.callback(held.free.set)  # so that nothing waits for it when the server ends
            client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
            client.queue = app.state.queue  # type: ignore[attr-defined]
            return client

        yield start


def queue_of(client: httpx.Client) -> Queue:
    return client.queue  # type: ignore[attr-defined,no-any-return]


def pixels_of(b64: str) -> np.ndarray:
    return media.read(base64.b64decode(b64), media.Take(fps=6.0))[0]


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def data_url(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(media.picture(pixels, 'png')).decode()}"


# --- what OpenAI's own client gets -----------------------------------------------------------


@pytest.fixture
def client(served: Serve) -> openai.OpenAI:
    url = str(served().base_url)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_the_pictures_that_the_sampler_draws(
    client: openai.OpenAI, sampler: Sampler
) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    answer = client.images.generate(
        prompt="a kite", n=2, size="24x32", extra_body={"seed": 5, "guidance": 2.0}
    )
    expected = sampler.images(["a kite"], size=(32, 24), n=2, seed=5, guidance=2.0)[0]
    assert answer.data is not None and len(answer.data) == 2
    for copy, (one, pixels) in enumerate(zip(answer.data, expected, strict=True)):
        data = base64.b64decode(one.b64_json or "")
        with Image.open(io.BytesIO(data)) as image:
            assert (np.asarray(image) == pixels).all()
            told = json.loads(image.text["unimodal"])
        assert told["prompt"] == "a kite" and told["seed"] == 5 and told["copy"] == copy
        assert told["guidance"] == 2 and told["size"] == "32x24" and told["model"] == "small"
    assert answer.size == "24x32" and answer.usage is not None
    assert answer.usage.output_tokens == 2 * 4 * 3


def test_openais_client_sees_a_picture_grow(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a kite", stream=True, partial_images=3, extra_body={"seed": 1}
    )
    *partial, last = list(stream)
    assert last.type == "image_generation.completed"
    assert partial and len(partial) <= 3
    heights = []
    for number, event in enumerate(partial):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == number and event.size == "40x32"
        with Image.open(io.BytesIO(base64.b64decode(event.b64_json))) as image:
            opaque = np.asarray(image)[..., 3]
        assert opaque.shape == (32, 40) and (opaque == opaque[:, :1]).all()
        heights.append(int((opaque[:, 0] == 255).sum()))
    assert heights == sorted(heights) and set(heights) <= {8, 16, 24, 32}
    assert pixels_of(last.b64_json).shape == (32, 40, 3)


def test_openais_client_edits(client: openai.OpenAI, sampler: Sampler) -> None:
    file = ("../../etc/a.png", media.picture(PICTURE, "png"))
    answer = client.images.edit(
        image=file, prompt="blue", extra_body={"seed": 4, "image_guidance": 1.5}
    )
    (expected,) = sampler.edit([PICTURE], ["blue"], seed=4, image_guidance=1.5)[0]
    assert answer.data is not None
    assert (pixels_of(answer.data[0].b64_json or "") == expected).all()
    kinds = [e.type for e in client.images.edit(image=file, prompt="blue", stream=True)]
    assert kinds[-1] == "image_edit.completed"


def test_openais_client_chats_about_pictures(client: openai.OpenAI, sampler: Sampler) -> None:
    picture: Any = {"type": "image_url", "image_url": {"url": data_url(PICTURE)}}
    asked: Any = {"type": "text", "text": "what is it?"}
    answer = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": [picture]}], max_tokens=9
    )
    assert answer.choices[0].message.content == sampler.describe([PICTURE], max_tokens=9)[0]
    assert answer.usage is not None and answer.usage.prompt_tokens > 20
    talk: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture, asked]},
        {"role": "assistant", "content": "a kite"},
        {"role": "user", "content": "which colour?"},
    ]
    turns = ["Be brief.\nwhat is it?", "a kite", "which colour?"]
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    (expected,) = sampler.ask([[PICTURE]], [turns], **settings)
    answer = client.chat.completions.create(model="small", messages=talk, **settings)
    assert answer.choices[0].message.content == expected
    stream = client.chat.completions.create(
        model="small",
        messages=talk,
        stream=True,
        stream_options={"include_usage": True},
        **settings,
    )
    pieces, usage = [], None
    for chunk in stream:
        usage = chunk.usage or usage
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == expected and sum(map(bool, pieces)) > 2
    assert usage == answer.usage


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="multiples of 8: try 96x96") as caught:
        client.images.generate(prompt="a", size="100x100")  # type: ignore[call-overload]
    assert caught.value.param == "size"
    with pytest.raises(openai.NotFoundError, match="it is called 'small'"):
        client.images.generate(prompt="a", model="dall-e-3")


# --- clips -----------------------------------------------------------------------------------


def test_clips_are_drawn_and_continued(served: Serve, sampler: Sampler) -> None:
    client = served()
    asked = {"prompt": "a ball", "seed": 2, "output_format": "webp"}
    answer = client.post(VIDEOS, json=asked).json()
    (expected,) = sampler.videos(["a ball"], seed=2)[0]
    assert (pixels_of(answer["data"][0]["b64_json"]) == expected).all()
    clip = base64.b64decode(answer["data"][0]["b64_json"])
    fields = {"frames": "4", "seed": "3", "output_format": "webp"}
    answer = client.post(EXTENSIONS, files={"video": clip}, data=fields).json()
    (expected,) = sampler.extend([expected], 4, seed=3)[0]
    assert (pixels_of(answer["data"][0]["b64_json"]) == expected).all() and len(expected) == 12
    answer = client.post(VIDEOS, json={"prompt": "x", "frames": 4, "fps": 12}).json()
    assert answer["output_format"] == "mp4" and answer["size"] == "32x32"


def test_all_of_a_long_clip_is_continued_and_a_longer_one_refused(
    served: Serve, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    real = sampler.extend

    def extend(clips: Any, *args: Any, **settings: Any) -> Any:
        given.extend(map(len, clips))
        return real(clips, *args, **settings)

    monkeypatch.setattr(sampler, "extend", extend)
    file = {"video": media.clip(np.tile(CLIP, (6, 1, 1, 1)), 6.0, "webp", {})}
    data = {"frames": "4", "output_format": "webp"}
    answer = served().post(EXTENSIONS, files=file, data=data)
    assert answer.status_code == 200 and given == [48]
    for limits in (Limits(given=44), Limits(volume=44 * 32 * 32)):
        error = served(limits=limits).post(EXTENSIONS, files=file, data=data).json()["error"]
        assert error["param"] == "video" and "more than 44 pictures of 32x32" in error["message"]


def test_clips_of_several_rates_in_a_chat_are_taken_at_one(
    served: Serve, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(media: Any, questions: Any, **settings: Any) -> list[str]:
        asked.append(([len(one) for one in media[0]], settings["fps"]))
        return ["a kite"]

    monkeypatch.setattr(sampler, "ask", ask)
    parts: list[Any] = [{"type": "text", "text": "what differs?"}]
    for fps in (3.0, 24.0):
        clip = base64.b64encode(media.clip(np.tile(CLIP, (4, 1, 1, 1)), fps, "webp", {})).decode()
        parts.append({"type": "video_url", "video_url": {"url": f"data:video/webp;base64,{clip}"}})
    answer = served().post(CHAT, json={"messages": [{"role": "user", "content": parts}]})
    # What the checkpoint looks at: 8 pictures, 6 a second.
    assert answer.status_code == 200 and asked == [([8, 8], 6.0)]


# --- what a chat tells -----------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest_words_whatever_the_recipe_says(
    served: Serve, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    likeliest = sampler.ask([[]], ["hello"], max_tokens=20)[0]
    defaults = sampler.defaults.model_copy(update={"text_temperature": 5.0, "text_top_k": 1000})
    monkeypatch.setattr(sampler, "defaults", defaults)
    client = served()
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "seed": 3}
    said = [
        client.post(CHAT, json=asked | more).json()["choices"][0]["message"]["content"]
        for more in ({"temperature": 0}, {})
    ]
    assert said[0] == likeliest != said[1]


@pytest.mark.parametrize("stream", [False, True])
def test_why_words_end_and_how_many_there_are_is_what_was_chosen(
    served: Serve, sampler: Sampler, held: Held, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    eos = sampler.vocabulary.eos
    client = served()
    # Text alone tells neither: what ends just at the limit, and bytes that are no characters.
    for ids, finish in (([65, 66, eos], "stop"), ([65, 66, 67], "length"), ([255, 254], "length")):

        def generate(drafts: Any, drawing: Any, watch: Any, ids: Any = ids) -> Any:
            for made in range(1, len(ids) + 1):
                watch({0: list(ids[:made])}, 1)
            return [list(ids)]

        monkeypatch.setattr(held, "generate", generate)
        asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        if stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
            *_, last, usage = events_of(iter(client.post(CHAT, json=asked).text.split("\n")))
            told = last["choices"][0]["finish_reason"], usage["usage"]["completion_tokens"]
        else:
            answer = client.post(CHAT, json=asked).json()
            told = answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]
        assert told == (finish, len(ids))


# --- the queue -------------------------------------------------------------------------------


def test_requests_alike_are_drawn_together_and_come_as_they_do_alone(
    served: Serve, sampler: Sampler, held: Held
) -> None:
    client = served()
    held.free.clear()
    prompts = [("a", 5), ("b", 5), ("a", 9)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, IMAGES, json={"prompt": "first"})
        until(held.reached.is_set)
        together = [
            pool.submit(client.post, IMAGES, json={"prompt": p, "seed": s}) for p, s in prompts
        ]
        until(lambda: queue_of(client).waiting == 3)
        other = pool.submit(client.post, IMAGES, json={"prompt": "c", "temperature": 0.5})
        until(lambda: queue_of(client).waiting == 4)
        held.free.set()
        answers = [one.result().json()["data"][0]["b64_json"] for one in together]
        assert first.result().status_code == other.result().status_code == 200
    assert held.calls == [1, 3, 1]
    for (prompt, seed), answer in zip(prompts, answers, strict=True):
        alone = sampler.images([prompt], seed=seed)[0][0]
        assert (pixels_of(answer) == alone).all()


def test_a_request_that_is_at_fault_does_not_spoil_those_it_shares_a_batch_with(
    served: Serve, held: Held
) -> None:
    client = served()
    held.free.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, IMAGES, json={"prompt": "first"})
        until(held.reached.is_set)
        long = pool.submit(client.post, IMAGES, json={"prompt": "x" * 300})
        until(lambda: queue_of(client).waiting == 1)
        good = pool.submit(client.post, IMAGES, json={"prompt": "x"})
        until(lambda: queue_of(client).waiting == 2)
        held.free.set()
        assert first.result().status_code == good.result().status_code == 200
        refused = long.result()
    assert refused.status_code == 400
    assert "over the context" in refused.json()["error"]["message"]


def test_a_batch_that_is_too_large_for_memory_is_drawn_one_by_one(
    served: Serve, held: Held, sampler: Sampler, capfd: pytest.CaptureFixture[str]
) -> None:
    client = served()
    held.free.clear()
    held.most = 1
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, IMAGES, json={"prompt": "first"})
        until(held.reached.is_set)
        large = pool.submit(client.post, IMAGES, json={"prompt": "a", "n": 2, "seed": 1})
        small = pool.submit(client.post, IMAGES, json={"prompt": "b", "n": 1, "seed": 2})
        two = pool.submit(client.post, IMAGES, json={"prompt": "c", "n": 1, "seed": 2})
        until(lambda: queue_of(client).waiting == 3)
        held.free.set()
        assert first.result().status_code == 200 and large.result().status_code == 500
        for prompt, answer in (("b", small.result()), ("c", two.result())):
            assert answer.status_code == 200
            alone = sampler.images([prompt], seed=2)[0][0]
            assert (pixels_of(answer.json()["data"][0]["b64_json"]) == alone).all()
    assert queue_of(client).counts["failed"] == 1 and sorted(held.calls)[-2:] == [2, 2]
    assert "out of memory" in capfd.readouterr().err


def test_who_goes_away_frees_the_queue_at_the_next_row(served: Serve, held: Held) -> None:
    client = served()
    queue = queue_of(client)
    held.free.clear()
    asked = {"prompt": "a", "stream": True, "progress": True}
    with client.stream("POST", IMAGES, json=asked) as stream:
        events = events_of(stream.iter_lines())
        assert next(events) == {"type": "unimodal.queued", "before": 0}
        until(held.reached.is_set)
        with client.stream("POST", IMAGES, json=asked | {"size": "32x32"}) as waiting:
            others = events_of(waiting.iter_lines())
            assert next(others) == {"type": "unimodal.queued", "before": 1}
            assert queue.waiting == 1
        until(lambda: queue.waiting == 0)  # it had not begun, and is gone
    until(lambda: queue.counts["cancelled"] == 2)
    held.free.set()
    assert client.post(IMAGES, json={"prompt": "b"}).status_code == 200
    # Of the first picture's 20 codes one row was drawn, of the third all.
    assert queue.counts["choices"] == 20
    assert held.calls == [1, 1]


def test_a_client_without_a_stream_that_goes_away_is_noticed_too(served: Serve, held: Held) -> None:
    client = served()
    held.free.clear()
    with pytest.raises(httpx.ReadTimeout):
        client.post(IMAGES, json={"prompt": "a"}, timeout=0.3)
    until(lambda: queue_of(client).counts["cancelled"] == 1)
    held.free.set()
    assert client.post(IMAGES, json={"prompt": "b"}).status_code == 200


def test_a_stream_tells_of_place_pace_and_time_left(served: Serve, held: Held) -> None:
    client = served()
    held.free.clear()
    asked = {"prompt": "a", "stream": True, "progress": True}
    with client.stream("POST", IMAGES, json=asked) as first:
        until(held.reached.is_set)
        with client.stream("POST", IMAGES, json=asked | {"size": "64x64"}) as second:
            until(lambda: queue_of(client).waiting == 1)
            held.free.set()
            assert [*events_of(first.iter_lines())][-1]["type"] == "image_generation.completed"
            events = [*events_of(second.iter_lines())]
    assert events[0] == {"type": "unimodal.queued", "before": 1}
    paces = [event for event in events if event["type"] == "unimodal.progress"]
    assert paces and all(pace["total_tokens"] == 64 for pace in paces)
    assert all(pace["tokens_per_second"] > 0 and pace["seconds_left"] >= 0 for pace in paces)


def test_a_full_queue_says_when_to_come_again(served: Serve, held: Held) -> None:
    client = served(limits=Limits(waiting=1))
    held.free.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, IMAGES, json={"prompt": "a"})
        until(held.reached.is_set)
        second = pool.submit(client.post, IMAGES, json={"prompt": "a"})
        until(lambda: queue_of(client).waiting == 1)
        for stream in (False, True):
            refused = client.post(IMAGES, json={"prompt": "a", "stream": stream})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "queue_full"
        held.free.set()
        assert first.result().status_code == second.result().status_code == 200


@pytest.mark.parametrize("abort", [False, True])
def test_at_the_end_what_is_drawn_is_finished_or_left_and_the_rest_sent_away(
    served: Serve, held: Held, abort: bool
) -> None:
    client = served()
    queue = queue_of(client)
    held.free.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, IMAGES, json={"prompt": "a"})
        until(held.reached.is_set)
        second = pool.submit(client.post, IMAGES, json={"prompt": "a"})
        until(lambda: queue.waiting == 1)
        queue.close()
        assert second.result().status_code == 503
        assert client.post(IMAGES, json={"prompt": "a"}).status_code == 503
        assert client.get("/health").status_code == 503
        if abort:
            queue.close(abort=True)
        held.free.set()
        assert first.result().status_code == (503 if abort else 200)
    assert queue.join(20)


def test_a_failure_of_ours_is_a_500_and_not_the_end(
    served: Serve, held: Held, capfd: pytest.CaptureFixture[str]
) -> None:
    client = served()
    held.breaks = True
    failed = client.post(IMAGES, json={"prompt": "a"})
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "screw" not in failed.text and "a screw is loose" in capfd.readouterr().err
    events = events_of(
        iter(client.post(IMAGES, json={"prompt": "a", "stream": True}).text.split("\n"))
    )
    assert next(events)["error"]["type"] == "server_error"
    held.breaks = False
    assert client.post(IMAGES, json={"prompt": "a"}).status_code == 200
    assert "unimodal_failed_total 2" in client.get("/metrics").text


@pytest.mark.parametrize("path", [IMAGES, CHAT])
def test_what_goes_wrong_in_a_stream_is_told_as_an_event(
    served: Serve, path: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr(media, "picture", broken)
    monkeypatch.setattr("unimodal.model.answers._chat_usage", broken)
    asked: Any = {"prompt": "a", "partial_images": 0}
    if path == CHAT:
        asked = {"messages": [USER], "max_tokens": 3, "stream_options": {"include_usage": True}}
    answer = served().post(path, json=asked | {"stream": True})
    *_, last = events_of(iter(answer.text.split("\n")))
    assert answer.status_code == 200 and last["error"]["type"] == "server_error"
    assert "disk" not in answer.text and "the disk is full" in capfd.readouterr().err


# --- what is uploaded ------------------------------------------------------------------------


def test_what_waits_is_as_small_as_the_sampler_sees_it(served: Serve, held: Held) -> None:
    client = served()
    queue = queue_of(client)
    held.free.clear()
    large = np.zeros((800, 1000, 3), np.uint8)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, IMAGES, json={"prompt": "first"})
        until(held.reached.is_set)
        file = {"image": media.picture(large, "png")}
        edit = pool.submit(client.post, EDITS, files=file, data={"prompt": "blue"})
        until(lambda: queue.waiting == 1)
        (job,) = queue._waiting
        assert job.items["images"].shape == (32, 40, 3)
        held.free.set()
        assert first.result().status_code == edit.result().status_code == 200


class Slow:
    """Instead of `media.read`: is in no hurry, and counts those that read."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.reading = self.most = self.stopped = 0
        self.lock = threading.Lock()

    def __call__(self, data: bytes, take: Any, stopped: Any) -> Any:
        with self.lock:
            self.reading += 1
            self.most = max(self.most, self.reading)
        try:
            while not self.free.wait(0.01):
                if stopped():
                    self.stopped += 1
                    raise media.Stopped
            return PICTURE, None
        finally:
            with self.lock:
                self.reading -= 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    reader = Slow()
    monkeypatch.setattr(media, "read", reader)
    yield reader
    reader.free.set()


def test_few_uploads_are_read_at_once_and_only_with_a_place_in_the_queue(
    served: Serve, slow: Slow
) -> None:
    client = served(limits=Limits(waiting=3))
    queue = queue_of(client)
    given = {"files": {"image": b"png"}, "data": {"prompt": "blue"}}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        edits = [pool.submit(client.post, EDITS, **given) for _ in range(3)]
        until(lambda: slow.reading == 2 and queue._kept == 3)
        assert client.post(EDITS, **given).json()["error"]["code"] == "queue_full"  # type: ignore
        assert client.post(CHAT, json={"messages": [USER]}).status_code == 429
        slow.free.set()
        assert [edit.result().status_code for edit in edits] == [200] * 3
    assert slow.most == 2
    until(lambda: queue._kept == 0)


def test_reading_ends_when_the_client_goes(served: Serve, slow: Slow) -> None:
    client = served()
    with pytest.raises(httpx.ReadTimeout):
        client.post(EDITS, files={"image": b"png"}, data={"prompt": "blue"}, timeout=1)
    until(lambda: slow.stopped == 1 and queue_of(client)._kept == 0)
    slow.free.set()
    assert client.post(IMAGES, json={"prompt": "b"}).status_code == 200


def test_an_upload_may_take_only_so_long(served: Serve) -> None:
    file = {"video": media.clip(CLIP, 6.0, "mp4", {})}
    answer = served(limits=Limits(seconds=1e-9)).post(EXTENSIONS, files=file)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "video"
    assert "seconds to decode" in error["message"]


def test_emu3s_own_rule_says_how_large_an_upload_becomes(
    served: Serve, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    manner = Manner(min_pixels=32 * 32, max_pixels=48 * 48)
    monkeypatch.setattr(sampler.canvas, "manner", manner)
    jobs = []
    client = served()
    real = queue_of(client).submit
    monkeypatch.setattr(
        queue_of(client), "submit", lambda job, seat: (jobs.append(job), real(job, seat))
    )
    picture = np.zeros((120, 90, 3), np.uint8)
    answer = client.post(
        EDITS, files={"image": media.picture(picture, "png")}, data={"prompt": "blue"}
    )
    rows, columns = manner.size(120, 90)
    assert answer.json()["size"] == f"{columns}x{rows}" and (rows, columns) != (40, 32)
    (job,) = jobs
    assert job.shape == (1, rows // 8, columns // 8)
    assert job.items["images"].shape == (rows, columns, 3)
    content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}]
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert answer.json()["usage"]["prompt_tokens"] == block_length(
        sampler.vocabulary, rows // 8, columns // 8
    )


# --- what is refused -------------------------------------------------------------------------

USER = {"role": "user", "content": "hello"}
LIMITS = Limits(pixels=4096, frames=16, pictures=3, prompt=100, tokens=50, media=2)


@pytest.mark.parametrize(
    "path, asked, param, words",
    [
        (IMAGES, {}, "prompt", "missing"),
        (IMAGES, {"prompt": 3}, "prompt", "string"),
        (IMAGES, {"prompt": "a" * 101}, "prompt", "limit of 100"),
        (IMAGES, {"prompt": "a", "negative": "a" * 101}, "negative", "limit of 100"),
        (IMAGES, {"prompt": "a", "n": 0}, "n", "greater"),
        (IMAGES, {"prompt": "a", "n": 4}, "n", "limit of 3"),
        (IMAGES, {"prompt": "a", "size": "big"}, "size", "width x height"),
        (IMAGES, {"prompt": "a", "size": "0x8"}, "size", "width x height"),
        (IMAGES, {"prompt": "a", "size": "72x64"}, "size", "limit of 4,096"),
        (IMAGES, {"prompt": "a", "size": "36x64"}, "size", "try 32x64"),
        (IMAGES, {"prompt": "a", "guidance": 0}, "guidance", "greater"),
        (IMAGES, {"prompt": "a", "temperature": -1}, "temperature", "greater"),
        (IMAGES, {"prompt": "a", "top_p": 2}, "top_p", "less"),
        (IMAGES, {"prompt": "a", "seed": -1}, "seed", "greater"),
        (IMAGES, {"prompt": "a", "response_format": "url"}, "response_format", "b64_json"),
        (IMAGES, {"prompt": "a", "background": "transparent"}, "background", "auto"),
        (IMAGES, {"prompt": "a", "steps": 3}, "steps", "no such field"),
        (IMAGES, [1], None, "JSON object"),
        (VIDEOS, {"prompt": "a", "frames": 20}, "frames", "limit of 16"),
        (VIDEOS, {"prompt": "a", "frames": 7}, "frames", "try 8"),
        (VIDEOS, {"prompt": "a", "size": "64x64", "frames": 16}, "frames", "context"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [USER], "max_tokens": 51}, "max_tokens", "limit of 50"),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role", "must be"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "must be"),
        (CHAT, {"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages", "last"),
        (CHAT, {"messages": [{"role": "user", "content": ""}]}, "messages", "ask something"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 101}]}, "messages", "limit of 100"),
        (CHAT, {"messages": [USER], "n": 2}, "n", "1"),
    ],
)
def test_a_bad_value_is_named(
    served: Serve, held: Held, path: str, asked: Any, param: str | None, words: str
) -> None:
    client = served(limits=LIMITS)
    answer = client.post(path, json=asked)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error" and not held.calls


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/a.png", "https://example.com/a.png", "file:///etc/passwd", "/etc"],
)
def test_nothing_is_ever_fetched(served: Serve, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served()
    monkeypatch.setattr(media, "read", lambda *_, **__: pytest.fail("it was read"))
    content = [{"type": "image_url", "image_url": {"url": url}}]
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and "fetches nothing" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "url, words",
    [
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png,abc", "must be in base64"),
        (f"data:image/png;base64,{base64.b64encode(b'hello').decode()}", "neither a picture"),
    ],
)
def test_a_data_url_that_is_none_is_an_error(served: Serve, url: str, words: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    answer = served().post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_uploads_are_bounded_before_they_are_decoded(
    served: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unimodal.pipeline import images

    client = served(limits=Limits(decoded=1000, upload=50_000))
    monkeypatch.setattr(images, "to_rgb", lambda _: pytest.fail("it was decoded"))
    file = {"image": media.picture(PICTURE, "png")}
    answer = client.post(EDITS, files=file, data={"prompt": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "image: 40x32 pixels are over the limit of 1000"
    for content in (b"x" * 60_000, iter([b"x" * 1000] * 60)):  # told beforehand, and in chunks
        answer = client.post(IMAGES, content=content, headers=JSON)
        assert answer.status_code == 413
        assert "50,000 bytes" in answer.json()["error"]["message"]
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "path, files, data, param",
    [
        (EDITS, {"image": b"hello"}, {"prompt": "a"}, "image"),
        (EDITS, {"mask": media.picture(PICTURE, "png")}, {"prompt": "a"}, "mask"),
        (EDITS, {"image": media.picture(PICTURE, "png")}, {}, "prompt"),
        (EDITS, {"image": media.picture(PICTURE, "png")}, {"prompt": "a", "n": "x"}, "n"),
        (EDITS, {"image": media.clip(CLIP, 6, "webp", {})}, {"prompt": "a"}, "image"),
        (
            EDITS,
            {"image": media.picture(PICTURE, "png")},
            {"prompt": "a", "negative": "b"},
            "negative",
        ),
        (EXTENSIONS, {"video": media.picture(PICTURE, "png")}, {}, "video"),
        (EXTENSIONS, {"video": media.clip(CLIP, 6, "mp4", {})}, {"size": "32x32"}, "size"),
    ],
)
def test_a_bad_form_is_named(
    served: Serve, path: str, files: Any, data: Any, param: str | None
) -> None:
    answer = served().post(path, files=files, data=data)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_what_a_checkpoint_never_learned_is_refused(served: Serve) -> None:
    client = served(learned={"caption": 5})
    can = client.get("/v1/models").json()["data"][0]["unimodal"]["can"]
    assert [name for name, able in can.items() if not able] == ["edit", "ask"]
    file = {"image": media.picture(PICTURE, "png")}
    for answer in (
        client.post(EDITS, files=file, data={"prompt": "a"}),
        client.post(CHAT, json={"messages": [USER]}),
    ):
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "not_supported"


def test_unknown_paths_and_methods_are_answered_in_openais_form(served: Serve) -> None:
    client = served()
    for answer, status in ((client.get("/v1/nothing"), 404), (client.get(IMAGES), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    # A form of another site's page may send text, not JSON.
    text = {"content-type": "text/plain"}
    assert client.post(IMAGES, content='{"prompt": "a"}', headers=text).status_code == 400
    assert client.post(EDITS, content="a", headers=text).status_code == 415


# --- who may ask -----------------------------------------------------------------------------


def test_only_known_names_are_answered(served: Serve) -> None:
    client = served(hosts=("localhost", "127.0.0.1", "[::1]"))
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", ""):
        assert client.get("/v1/models", headers={"host": host}).status_code == 403
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    for host in (
        "127.0.0.2:8000",
        "192.168.1.2",
        "[fe80::1]:80",
    ):  # nobody can point them elsewhere
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    anyone = served(hosts=None)
    assert anyone.get("/health", headers={"host": "any.example"}).status_code == 200


def test_pages_of_other_sites_get_nothing_done(served: Serve, held: Held) -> None:
    client = served()
    own = str(client.base_url).rstrip("/")
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": own.replace(":", ":1", 1)},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        answer = client.post(IMAGES, json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 403 and not held.calls
        assert "access-control-allow-origin" not in answer.headers
    headers = {"origin": own, "sec-fetch-site": "same-origin"}
    assert client.post(IMAGES, json={"prompt": "a"}, headers=headers).status_code == 200


def test_a_key_is_asked_for_by_all_but_the_page(served: Serve) -> None:
    client = served(key="geheim é")
    for path in ("/", "/page.js", "/page.css", "/health"):
        assert client.get(path).status_code == 200
    wrong = [{}, {"authorization": "Bearer geheim"}, {"authorization": "Basic geheim é".encode()}]
    for headers in wrong:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    right = {"authorization": "Bearer geheim é".encode()}
    assert client.get("/v1/models", headers=right).status_code == 200


def test_the_page_is_allowed_to_load_nothing_from_elsewhere(served: Serve) -> None:
    client = served()
    for path in ("/", "/page.js", "/page.css"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "innerHTML" not in answer.text
        links = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in links and "https:" not in links
    assert "GET" not in client.options("/").headers.get("access-control-allow-methods", "")


# --- small things ----------------------------------------------------------------------------


def test_an_address_that_is_taken_is_named() -> None:
    from unimodal.pipeline.errors import UsageError

    with serve.listening("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        assert serve.address("127.0.0.1", one) == f"http://127.0.0.1:{port}/"
        assert serve.address("0.0.0.0", one) == f"http://127.0.0.1:{port}/"
        with pytest.raises(UsageError, match=f"{port} cannot be"):
            serve.listening("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"nowhere\.invalid"):
        serve.listening("nowhere.invalid", 0)


@pytest.mark.parametrize(
    "host, local",
    [
        *[("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.8.8.8", True)],
        *[("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.com", False)],
    ],
)
def test_loopback_is_known(host: str, local: bool) -> None:
    assert serve.is_local(host) is local


def test_what_was_learned_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    from unimodal.model.records import learned

    told = {"vocabulary": {"digest": "a"}, "vision_tokenizer": {"digest": "b"}}
    assert learned(tmp_path) is None
    for about, known in (({"grids": GRIDS}, {"caption": 1}), ({"tasks": {"edit": 3}}, {"edit": 3})):
        (tmp_path / "data.json").write_text(json.dumps(told | about))
        assert learned(tmp_path) == known

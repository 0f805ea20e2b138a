"""Preferences are made once: what was drawn is kept, and the same seed gives the same triplets."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from unimodal.cli.app import app
from unimodal.model import canvas
from unimodal.model.dpo import Triplets
from unimodal.model.prefer import (
    TRIPLETS,
    Outcome,
    PreferSettings,
    best_and_worst,
    brightness,
    color,
    prefer,
    read_prompts,
    scorer,
)
from unimodal.model.recipe import TrainSettings
from unimodal.model.sample import Sampler
from unimodal.model.train import train
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.settings import build
from unimodal.tokenize.document import Image, Text, parse
from unimodal.tokenize.shards import Shards

PROMPTS = ["picture 1", "picture 2", "the 3", "a clip", "picture 5"]
SIMPLE = PreferSettings(n=4, size=(16, 16))


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_shards: Shards,
    tiny_settings: Callable[..., TrainSettings],
) -> Path:
    out = tmp_path_factory.mktemp("run") / "ckpt"
    return train([tiny_shards.path], out, tiny_settings("steps=4", "sampling.guidance=1.5"))


@pytest.fixture(scope="module")
def sampler(checkpoint: Path) -> Sampler:
    return Sampler.load(checkpoint, "cpu", batch=8)  # two prompts a part


Make = Callable[..., Outcome]


@pytest.fixture
def make(sampler: Sampler, checkpoint: Path) -> Make:
    """Prefer bright samples, four of each prompt."""

    def make(out: Path, prompts: Sequence[str] = PROMPTS, **values: object) -> Outcome:
        scorers = values.pop("scorers", {"brightness": brightness})
        votes = values.pop("votes", ())
        settings = SIMPLE.model_copy(update=values)
        return prefer(sampler, checkpoint, prompts, out, settings, scorers, votes)  # type: ignore[arg-type]

    return make


def test_triplets_are_the_sampled_ids_of_best_and_worst(
    tmp_path: Path, make: Make, sampler: Sampler
) -> None:
    made = make(tmp_path)
    assert made.counts["triplets"] == 5
    vocabulary = sampler.vocabulary
    table = pq.read_table(made.path)
    assert table.column_names == list(TRIPLETS)
    triplets = Triplets([made.path], vocabulary)
    for pair, row in enumerate(table.to_pylist()):
        prompt, chosen, rejected = triplets.ids(pair)
        shown = []
        for ids in (chosen, rejected):
            text, image = parse(np.concatenate([prompt, ids]), vocabulary)
            assert text == Text(PROMPTS[pair]) and isinstance(image, Image)
            assert list(image.codes.shape) == row["grid"] == [2, 2]
            shown.append(sampler.canvas.pixels([image.codes[None]], True)[0][0])
        score = row["scores"][0]
        # What was kept paints what was scored: nothing was tokenized again.
        kept = pytest.approx([score["chosen"], score["rejected"]], abs=1e-4)
        assert brightness([""] * 2, shown) == kept
        assert score["chosen"] > score["rejected"]
    part = pq.read_table(tmp_path / "candidates" / "000000.parquet").to_pylist()
    own = [one for one in part if one["prompt"] == 0]
    assert [one["sample"] for one in own] == [0, 1, 2, 3]
    scores = [one["brightness"] for one in own]
    assert table.to_pylist()[0]["samples"] == [int(np.argmax(scores)), int(np.argmin(scores))]


def test_what_a_recipe_puts_behind_every_prompt_is_in_the_triplets(
    tmp_path: Path, checkpoint: Path
) -> None:
    sampler = Sampler.load(checkpoint, "cpu", batch=8)
    sampler.defaults = sampler.defaults.model_copy(update={"suffix": ", sharp"})
    scorers = {"brightness": brightness}
    made = prefer(sampler, checkpoint, PROMPTS[:1], tmp_path, SIMPLE, scorers)
    (row,) = pq.read_table(made.path).to_pylist()
    encode = sampler.vocabulary.text.encode
    assert row["prompt"] == PROMPTS[0]
    assert row["prompt_ids"] == [sampler.vocabulary.bos, *encode(PROMPTS[0] + ", sharp")]


def test_a_run_that_was_stopped_goes_on_to_the_same_triplets(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pq.read_table(make(tmp_path / "whole").path)
    calls = []
    draw = Sampler.codes

    def stopped(self: Sampler, prompts: Sequence[str], *args: object, **kw: object) -> object:
        calls.append(list(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, prompts, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "codes", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts")
    assert pq.read_table(make(tmp_path / "parts").path).equals(whole)
    assert calls == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[2:4], PROMPTS[4:]]  # none drawn twice
    # The same again draws nothing; a longer list draws what is new, and what shares its part.
    make(tmp_path / "parts")
    longer = pq.read_table(make(tmp_path / "parts", [*PROMPTS, "six", "seven"]).path)
    assert calls[4:] == [[PROMPTS[4], "six"], ["seven"]]
    assert longer.slice(0, 5).equals(whole)


def test_a_sampler_of_smaller_batches_goes_on(
    tmp_path: Path, make: Make, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pq.read_table(make(tmp_path).path)
    monkeypatch.setattr(sampler, "batch", 4)

    def dark(prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[float]:
        assert len(prompts) == len(pictures)
        return [-one for one in brightness(prompts, pictures)]

    # What is drawn is kept for a scorer that comes later.
    again = pq.read_table(make(tmp_path, scorers={"dark": dark}).path)
    kept = ("prompt", "chosen_ids", "rejected_ids")
    chosen, rejected = (made.column(name).to_pylist() for name in kept[1:])
    assert [again.column(name).to_pylist() for name in kept] == [PROMPTS, rejected, chosen]


def test_prompts_may_have_line_ends(tmp_path: Path, make: Make) -> None:
    odd = ["one\ntwo", "three\u2028four"]
    whole = pq.read_table(make(tmp_path, odd).path)
    assert pq.read_table(make(tmp_path, odd).path).equals(whole)


def test_another_run_is_not_gone_on_with(tmp_path: Path, make: Make) -> None:
    make(tmp_path)
    with pytest.raises(UnimodalError, match=r"seed was 0, now 1\): choose another -o"):
        make(tmp_path, seed=1)
    with pytest.raises(UnimodalError, match="its prompts are others"):
        make(tmp_path, ["another", *PROMPTS])
    (tmp_path / "candidates" / "000000.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UnimodalError, match=r"000000\.parquet cannot be read .*: remove it"):
        make(tmp_path)


def test_people_vote_in_two_steps(tmp_path: Path, make: Make) -> None:
    made = make(tmp_path, scorers={})
    assert made.path == tmp_path / "votes.csv" and made.counts == {"prompts": 5}
    rows = list(csv.DictReader(made.path.open()))
    assert len(rows) == 20 and all((tmp_path / row["picture"]).is_file() for row in rows)
    voters = []
    for voter in range(2):
        voters.append(tmp_path / f"voter-{voter}.csv")
        with voters[-1].open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                prompt, sample = int(row["prompt"]), int(row["sample"])
                # Prompt 0: both like sample 2 best, 1 least. 1: they disagree. 2: too few votes.
                vote = {0: [1, 0, 3, 2], 1: [0, 1, 2, 3], 2: [5, "", "", ""]}.get(prompt, [7] * 4)
                if prompt == 1 and voter:
                    vote = vote[::-1]
                writer.writerow({**row, "vote": vote[sample]})
    done = make(tmp_path, scorers={}, votes=voters)
    assert done.counts == {
        "prompts": 5,
        "triplets": 1,
        "tied": 3,
        "identical": 0,
        "unscored": 1,
    }
    (row,) = pq.read_table(done.path).to_pylist()
    assert row["prompt"] == PROMPTS[0] and row["samples"] == [2, 1]
    assert [one["chosen"] for one in row["scores"]] == [3.0, 3.0]
    assert make(tmp_path, scorers={}).path.read_text() == made.path.read_text()
    voters[0].write_text("prompt,sample,vote\n0,0,good\n")
    with pytest.raises(UsageError, match=r"voter-0\.csv, line 2: .* a number vote"):
        make(tmp_path, scorers={}, votes=voters)


def test_ranks_of_several_scores_are_averaged_and_ties_are_left_out() -> None:
    codes = [[0], [1], [2]]
    assert best_and_worst([[1.0, 3.0, 2.0]], codes) == (1, 0)
    assert best_and_worst([[1.0, 2.0, 3.0], [100.0, 0.0, 200.0]], codes) == (2, 0)
    assert best_and_worst([[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]], codes) == "tied"
    assert best_and_worst([[1.0, 1.0, 1.0]], codes) == "tied"
    assert best_and_worst([[1.0, None, float("nan")]], codes) == "unscored"
    assert best_and_worst([[1.0, None, 0.0]], codes) == (0, 2)
    assert best_and_worst([[1.0, 0.0]], [[5], [5]]) == "identical"


def test_simple_scorers_say_what_they_claim() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert brightness(["", "", ""], [black, white, red]) == pytest.approx([0, 1, 0.2126])
    prompts = ["a Red kite", "a red kite", "red or blue", "a kite", "hundred kites"]
    assert color(prompts, [red, black, red, red, red]) == [1.0, pytest.approx(2 / 3), *[None] * 3]


def test_scores_without_weights_say_what_to_give() -> None:
    with pytest.raises(UsageError, match=r"score clip: no weights: set embed.weights=PATH"):
        scorer("clip", PreferSettings())
    with pytest.raises(UsageError, match="no score beauty: there are brightness, color, clip"):
        scorer("beauty", PreferSettings())
    with pytest.raises(UsageError, match=r"unknown setting wights: did you mean weights"):
        scorer("clip", PreferSettings(embed={"wights": "x"}))


def test_the_format_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text()
    assert [name for name in (*TRIPLETS, "brightness", "color") if f"`{name}`" not in text] == []


def test_a_size_beyond_the_context_is_said_before_anything_is_made(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canvas, "BlockGrammar", None)  # of such a size it takes gigabytes
    with pytest.raises(UnimodalError, match=r"12500\*12500 codes take 1562\d+ tokens, .* context"):
        make(tmp_path / "out", size=(100_000, 100_000))
    assert not (tmp_path / "out").exists()


def test_a_size_is_written_as_sample_writes_it() -> None:
    for text in ("size=24x16", "size=[24, 16]"):
        assert build(PreferSettings, sets=[text]).size == (24, 16)
    assert build(PreferSettings, sets=["size=none"]).size is None
    for text in ("size=24", "size=24x", "size=24x16x8", "size=free"):
        with pytest.raises(UsageError, match="size"):
            build(PreferSettings, sets=[text])


def test_prompts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a kite\n\n  two kites \n")
    assert read_prompts(tmp_path / "p.txt") == ["a kite", "two kites"]
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"e\.txt holds no prompt"):
        read_prompts(tmp_path / "e.txt")
    with pytest.raises(UsageError, match="nowhere cannot be read"):
        read_prompts(tmp_path / "nowhere")


def test_the_commands_go_from_prompts_to_a_decoder_that_prefers(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = ["prefer", str(checkpoint), str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "t")]
    asked += ["-n", "3", "--set", "size=16x16", "--set", "guidance=1", "--json", "-q"]
    app([*asked, "--score", "brightness"], standalone_mode=False)
    made = json.loads(capsys.readouterr().out)
    assert made.pop("path") == str(tmp_path / "t" / "triplets.parquet")
    assert made == {"prompts": 5, "triplets": 5, "tied": 0, "identical": 0, "unscored": 0}
    train = ["train", str(tmp_path / "t"), "--recipe", "dpo", "-o", str(tmp_path / "out"), "-q"]
    train += ["--init", str(checkpoint), "--steps", "2", "--json"]
    for one in ("data.context=128", "accumulate=1", "log.tensorboard=false"):
        train += ["--set", one]
    app(train, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["step"] == 2
    # It has the shape of what it began as, and is drawn from in the same way.
    config = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert config["decoder"]["width"] == 32 and config["sampling"]["guidance"] == 1.5
    with pytest.raises(UsageError, match=r"unknown setting top_q: did you mean top_p"):
        app([*asked, "--set", "top_q=3"], standalone_mode=False)

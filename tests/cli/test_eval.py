"""`unimodal eval`: figures are those of other implementations, pages hold what is measured."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.scorers.conftest import small_clip  # noqa: F401 - a fixture
from unimodal.cli.app import main
from unimodal.model import judge
from unimodal.pipeline.errors import UsageError
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.run import curate
from unimodal.pipeline.scorers import frechet
from unimodal.pipeline.settings import build
from unimodal.tokenize.document import Image as Picture
from unimodal.tokenize.document import Piece, Text
from unimodal.tokenize.fidelity import Fidelity, remade
from unimodal.tokenize.plan import TokenizeSettings
from unimodal.tokenize.shards import Sample, ShardWriter
from unimodal.tokenize.vision.tokenizer import VisionTokenizer
from unimodal.tokenize.vocabulary import Vocabulary

Call = Callable[..., tuple[int, str, str]]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
WORDS = {"colour": {name: name for name in COLOURS}}
BARE = 'skip=["text", "quality", "embed", "nsfw", "dedup", "match"]', "decide.image_min_area=0"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Function that runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unimodal", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def media(
    tmp_path_factory: pytest.TempPathFactory,
    photos: Path,
    write_video: Callable[..., Path],
    moving: Callable[..., list[np.ndarray]],
) -> Path:
    """Two photographs and a film of eight pictures."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("coffee.png", "rocket.jpg"):
        Image.open(photos / name).resize((96, 64)).save(folder / f"{Path(name).stem}.png")
    write_video(folder / "film.mp4", moving(8), fps=8)
    return folder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[np.ndarray, list[str]]]:
    """Twenty-four pictures of a noisy colour, with captions."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(24):
        name = list(COLOURS)[number % 2]
        noise = rng.integers(-25, 26, (24, 32, 3))
        picture = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        found.append((picture, [f"a {name} wall, number {number}"]))
    return found


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, coloured: Any) -> Path:
    """A run of `coloured`."""
    folder = tmp_path_factory.mktemp("coloured")
    for number, (picture, (text,)) in enumerate(coloured):
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    settings = build(CurateSettings, sets=BARE)
    return curate([folder], folder / "run", settings, engine="inline").path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, drawn_shards: Path) -> Path:
    """Shards of a described picture and of a question and its answer, all of the val split."""
    tokenizer = VisionTokenizer.load(drawn_shards / "vision_tokenizer")
    words = Vocabulary.load(drawn_shards / "vocabulary")
    codes = np.arange(12).reshape(1, 3, 4)
    told = {"style": "name", "lang": "en", "text": "<b>a red wall</b>", "tokens": 5}
    pieces = [Piece(Picture(codes[0]), "user"), Piece(Text("colour?"), "user")]
    pieces.append(Piece(Text("red"), "assistant"))
    common: dict[str, Any] = {"split": "val", "source_sha256": "0" * 64}
    samples = [
        Sample("described", "1", "image", codes, captions=[told], **common),
        Sample("described2", "2", "image", codes + 1, captions=[told], **common),
        Sample(
            *("question", "3", "document", None),
            **common,
            task="chat",
            pieces=pieces,
            tokens=[None, 7, 3],
        ),
    ]
    out = tmp_path_factory.mktemp("held") / "shards"
    writer = ShardWriter(out, tokenizer, words, {})
    writer.write(0, "unit", samples)
    writer.finish(1)
    return out


def test_psnr_and_ssim_are_those_of_scikit_image(call: Call, media: Path, tmp_path: Path) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    how = ("--set", "area=6144", "--set", "fps=8", "--quiet", "--json", "--device", "cpu")
    code, out, _ = call("reconstruction", media, "-o", tmp_path / "o", *how)
    found = json.loads(out)
    assert code == 0 and found == {"path": str(tmp_path / "o" / "index.html")} | json.loads(
        (tmp_path / "o" / "eval.json").read_text()
    )
    settings = TokenizeSettings(area=64 * 96, fps=8)
    expected = []
    for one in remade([str(media)], settings, VisionTokenizer.load("small")):
        pairs = list(zip(one.originals, one.painted, strict=True))
        alike = [
            metrics.structural_similarity(
                *pair,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
            )
            for pair in pairs
        ]
        noise = [metrics.peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]
        expected.append((one.row["uri"], np.mean(noise), np.mean(alike)))
    assert [one["uri"] for one in found["each"]] == [uri for uri, _, _ in expected]
    for one, (_, noise, alike) in zip(found["each"], expected, strict=True):
        assert one["psnr"] == pytest.approx(noise, abs=1e-6)
        # float32 in its mean and its filter where ours has float64
        assert one["ssim"] == pytest.approx(alike, abs=1e-4)
    images = [noise for uri, noise, _ in expected if uri.endswith(".png")]
    assert found["image"]["psnr"] == pytest.approx(np.mean(images))
    assert (found["image"]["n"], found["video"]["n"], found["video"]["pictures"]) == (2, 1, 8)
    page = (tmp_path / "o" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 9 and "coffee.png" in page
    code, _, err = call("reconstruction", media, "-o", tmp_path, "--quiet")
    assert code == 1 and "choose another -o" in err


def test_kept_clips_of_a_run_are_measured_by_the_tokenizer_of_a_checkpoint(
    call: Call, run_dir: Path, drawer: Path, tmp_path: Path
) -> None:
    how = ("--tokenizer", drawer, "--limit", 2, "--set", "area=768", "--json", "--device", "cpu")
    code, out, err = call("reconstruction", run_dir, "-o", tmp_path / "o", *how)
    found = json.loads(out)
    assert code == 0 and found["image"]["n"] == 2 and found["codebook"]["size"] == 64
    assert found["digest"] == VisionTokenizer.load(drawer / "vision_tokenizer").digest
    assert "image psnr" in err


def test_fid_is_its_formula() -> None:
    pytest.importorskip("torch_fidelity")
    import scipy.linalg

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 6)), rng.normal(0.5, 2, (50, 6))
    cov = [np.cov(side, rowvar=False) for side in (a, b)]
    root = scipy.linalg.sqrtm(cov[0] @ cov[1]).real
    apart = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov[0] + cov[1] - 2 * root)
    assert frechet.distance(a, b) == pytest.approx(apart)
    assert frechet.distance(a[:1], b) is None


@pytest.mark.slow
def test_rfid_and_lpips_are_those_of_the_given_weights(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    import torch

    from unimodal.tokenize.vision.perceptual import LPIPS

    kind = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # random weights of its layout
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        torch.save(kind("i", ["2048"]).state_dict(), tmp_path / "inception.pth")
    features = frechet.load(str(tmp_path / "inception.pth"))
    tokenizer = VisionTokenizer.load("small")
    things = list(remade([str(media)], TokenizeSettings(area=48 * 48), tokenizer, 2))
    torch.manual_seed(0)
    figures = Fidelity(tokenizer, LPIPS(), features)
    for one in things:
        assert figures.measure(one)["lpips"] > 0
    sides = [
        np.concatenate([features(pictures) for pictures in side])
        for side in zip(*((one.originals, one.painted) for one in things), strict=True)
    ]
    assert figures.totals()["rfid"] == pytest.approx(frechet.distance(*sides))
    assert frechet.distance(sides[0], sides[0]) == pytest.approx(0, abs=1e-6)


def test_a_classifier_counts_the_words_that_drawings_show(coloured: Any) -> None:
    red, blue = coloured[0][0], coloured[1][0]
    prompts = ["a red wall", "a blue wall", "red and blue", "a green wall"]
    drawn = [[red, blue], [blue, blue], [red, red], [red, red]]
    figures, seen = judge.prompted(prompts, drawn, coloured, WORDS, 0)
    colour = figures["colour"]
    assert (colour["right"], colour["n"], colour["words"]) == (3, 4, 2)
    assert colour["left_out"] == 4  # two prompts name no one word
    assert colour["classifier"]["share"] == 1 and colour["classifier"]["n"] == 24 // judge.HELD
    assert [one.get("colour") for one in seen] == ["red", *["blue"] * 3, None, None, None, None]
    with pytest.raises(UsageError, match="colour: 4 labelled pictures"):
        judge.prompted(prompts, drawn, coloured[:4], WORDS, 0)


@pytest.mark.parametrize(
    ("own", "named"), [({"seed": 7}, "seed"), ({"n": 3}, "n"), ({"negative": "x"}, "negative")]
)
def test_what_one_prompt_asks_for_itself_is_refused(
    call: Call, drawer: Path, tmp_path: Path, own: dict[str, Any], named: str
) -> None:
    line = json.dumps({"prompt": "a red wall"} | own)
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    code, _, err = call("generation", drawer, tmp_path / "prompts.jsonl", "-o", tmp_path / "o")
    assert code == 2 and f"draws all prompts alike: leave out {named} (" in err
    assert not (tmp_path / "o").exists()


def test_drawings_are_scored_by_clip_and_by_words(
    call: Call,
    run_dir: Path,
    drawer: Path,
    tmp_path: Path,
    small_clip: Path,  # noqa: F811
) -> None:
    import open_clip
    import torch

    (tmp_path / "prompts.txt").write_text("a red wall\n<script>blue</script>\nneither\n")
    (tmp_path / "words.toml").write_text("colour = ['red', 'blue']")
    how = ["generation", drawer, tmp_path / "prompts.txt", "--limit", 2, "--seed", 3, "--json"]
    how += ["--real", run_dir, "--words", tmp_path / "words.toml", "--device", "cpu", "--quiet"]
    how += ["--clip", small_clip / "small.pt", "--clip-model", small_clip / "small.json"]
    code, out, err = call(*how, "-o", tmp_path / "o")
    assert code == 0, err
    found = json.loads(out)
    assert (found["pictures"], found["real"], found["words"]["colour"]["n"]) == (2, 24, 2)
    assert set(found["each"][0]["seen"]) == {"colour"}
    page = (tmp_path / "o" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;blue" in page
    again = json.loads(call(*how, "-o", tmp_path / "again")[1])
    assert again["each"] == found["each"] and again["words"] == found["words"]
    # open_clip alone, on the pictures of the page
    open_clip.add_model_config(small_clip / "small.json")
    net, _, prepare = open_clip.create_model_and_transforms("small")
    net.load_state_dict(torch.load(small_clip / "small.pt", weights_only=True))
    from unimodal.model.sample import Sampler

    prompts = ["a red wall", "<script>blue</script>"]
    drawn = Sampler.load(drawer, "cpu").images(prompts, seed=3)
    with torch.inference_mode():
        seen = net.eval().encode_image(
            torch.stack([prepare(Image.fromarray(one[0])) for one in drawn])
        )
        said = net.encode_text(open_clip.get_tokenizer("small")(prompts))
    expected = 100 * torch.cosine_similarity(seen, said).clamp_min(0)
    assert [one["clip_score"] for one in found["each"]] == pytest.approx(
        expected.tolist(), abs=1e-3
    )


class Parrot:
    """Says what it was told to."""

    def describe(self, media: Any, max_tokens: int | None, **how: Any) -> list[str]:
        return ["A  red Wall", "a blue wall"]

    def ask(self, media: Any, asked: Any, max_tokens: int | None, **how: Any) -> list[str]:
        return ["Red" if list(turns) == ["colour?"] else "?" for turns in asked]


def test_words_and_whole_answers_are_compared_with_what_people_say() -> None:
    shown = [judge.Shown(str(i), [np.zeros(0)], (f"a red wall{' here' * i}",)) for i in range(2)]
    shown.insert(1, judge.Shown("q", [], ("red",), ("colour?",)))
    figures, said = judge.described(Parrot(), shown, WORDS)  # type: ignore[arg-type]
    assert said == ["A  red Wall", "Red", "a blue wall"]
    told = figures["descriptions"]
    assert (told["exact"]["right"], told["exact"]["n"], told["words"]["colour"]["right"]) == (
        1,
        2,
        1,
    )
    assert 0 < told["rouge_l"] < 100 and figures["answers"]["exact"]["share"] == 1


def test_the_val_split_and_runs_are_described(
    call: Call, drawer: Path, held_out: Path, run_dir: Path, tmp_path: Path
) -> None:
    how = ("--max-tokens", 6, "--device", "cpu", "--json", "--quiet")
    code, out, err = call("understanding", drawer, held_out, "-o", tmp_path / "o", *how)
    assert code == 0, err
    found = json.loads(out)
    assert (found["descriptions"]["n"], found["answers"]["n"]) == (2, 1)
    assert [one["people"] for one in found["each"]] == [["<b>a red wall</b>"]] * 2 + [["red"]]
    assert found["each"][2]["asked"] == ["colour?"]
    page = (tmp_path / "o" / "index.html").read_text()
    assert "<b>a red wall" not in page and page.count("data:image/png") == 3
    where = ("-o", tmp_path / "run", "--limit", 2)
    code, out, err = call("understanding", drawer, run_dir, *where, *how)
    assert code == 0 and json.loads(out)["descriptions"]["n"] == 2, err


def test_mistakes_are_one_line(
    call: Call, drawer: Path, drawn_shards: Path, media: Path, tmp_path: Path
) -> None:
    prompts, other = tmp_path / "p.txt", tmp_path / "other"
    prompts.write_text("a\n")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(print))
    writer = ShardWriter(other, VisionTokenizer.load("small"), Vocabulary.bytes(4096), {})
    sample = Sample("a", "a", "image", np.zeros((1, 2, 2), int), "val", "0" * 64)
    writer.write(0, "unit", [sample])
    writer.finish(1)
    picture = media / "coffee.png"
    cases: list[tuple[list[object], int, str]] = [
        (["reconstruction", "nowhere"], 2, "nowhere"),
        (["reconstruction", picture, "--tokenizer", "no"], 2, "no: no vision tokenizer"),
        (["reconstruction", picture, "--set", "aria=9"], 2, "area"),
        (["reconstruction", picture, "--lpips", "no.pth"], 2, "no.pth: no LPIPS weights"),
        (["reconstruction", picture, "--inception", tmp_path / "evil.pth"], 2, "cannot be read as"),
        (["reconstruction", picture, "--inception", "no.pth"], 2, "no.pth cannot be read"),
        (["generation", "nowhere", prompts], 2, "nowhere"),
        (["generation", drawer, "no.txt"], 2, "no.txt: cannot be read"),
        (["generation", drawer, prompts, "--clip", "no.pt"], 2, "no.pt"),
        (["generation", drawer, prompts, "--words", "w.toml"], 2, "--real RUN"),
        (["understanding", drawer, "nowhere"], 2, "no shards at nowhere"),
        (["understanding", drawer, drawn_shards], 1, "nothing to compare with"),
        (["understanding", drawer, other], 1, "of another vision tokenizer"),
    ]
    for arguments, code, says in cases:
        ended, out, err = call(*arguments, "-o", tmp_path / "o", "--device", "cpu")
        assert (ended, out) == (code, ""), (arguments, err)
        assert says in err and len(err.strip().splitlines()) == 1, err


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UsageError, match=r"pip install 'unimodal\[eval\]'"):
        frechet.load(str(tmp_path / "w.pth"))

"""Near-duplicates: the groups that comparing all with all gives, on real and made-up media."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.pipeline import dedup
from unimodal.pipeline.clips import CLIPS, WATCH, table
from unimodal.pipeline.dedup import GROUPS, DedupSettings, group
from unimodal.pipeline.errors import UnimodalError, UsageError
from unimodal.pipeline.inputs import list_sources
from unimodal.pipeline.presets import CurateSettings
from unimodal.pipeline.settings import build
from unimodal.pipeline.watch import WatchSettings, watch_part

NOT_YET = ("verdict", "reasons", "aliases", "meta")
COLUMNS = pa.schema([*(f for f in CLIPS if f.name not in NOT_YET), WATCH.field("samples")])
EMBEDDING = pa.schema([("uid", pa.string()), ("embedding", pa.list_(pa.float32()))])
HALF = 0x5A5A_3C3C_A5A5_C3C3  # 32 bits set, as in the hash of a picture


def _clip(
    uid: str, hashes: Sequence[int | None], kind: str = "video", **row: Any
) -> dict[str, Any]:
    """A row whose scoring samples have these hashes; None stands for one that is not scored."""
    samples = [
        {"member": f"{uid}.{i}", "keyframe": True, "scoring": h is not None, "hash": h or 0}
        for i, h in enumerate(hashes)
    ]
    base = {"part": "p", "uri": "/x", "source_sha256": "s", "width": 640, "height": 480}
    return {**base, "uid": uid, "kind": kind, "samples": samples, **row}


def _groups(
    rows: Sequence[dict[str, Any]],
    settings: DedupSettings | None = None,
    embeddings: pa.Table | None = None,
) -> dict[str, tuple[str | None, int | None]]:
    found = group(table(rows, COLUMNS), settings or DedupSettings(), embeddings)
    assert found.schema == GROUPS
    assert found.column("uid").to_pylist() == sorted(row["uid"] for row in rows)
    return {row["uid"]: (row["dup_group"], row["dup_rank"]) for row in found.to_pylist()}


def _flip(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


# -- against comparing all with all -------------------------------------------------------------


def _better(row: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of the stated order, written another way."""

    def down(value: float | None) -> tuple[bool, float]:
        return (value is None, -(value or 0))

    pixels = row["width"] * row["height"]
    if row.get("crop_x1") is not None:
        pixels = (row["crop_x1"] - row["crop_x0"]) * (row["crop_y1"] - row["crop_y0"])
    scores = (row.get(name) for name in ("aesthetic", "quality", "duration_s"))
    return (-pixels, *(down(score) for score in scores), row["uid"])


def _hashes(row: dict[str, Any]) -> list[int]:
    found = [s["hash"] for s in row["samples"] if s["scoring"] and s["hash"].bit_count() >= 24]
    if len(found) > 3:
        found = [found[0], found[(len(found) - 1) // 2], found[-1]]
    return found


def _near(a: dict[str, Any], b: dict[str, Any], settings: DedupSettings) -> bool:
    if a["kind"] != b["kind"] or settings.distance is None:
        return False
    for name, factor in (("luma_mean", 1), ("contrast", 1), ("colorfulness", 2)):
        if settings.light is None or a.get(name) is None or b.get(name) is None:
            continue
        if abs(a[name] - b[name]) > factor * settings.light:
            return False
    x, y = _hashes(a), _hashes(b)
    wanted = max(len(x), len(y)) // 2 + 1
    return any(
        all((p ^ q).bit_count() <= settings.distance for p, q in zip(some, other, strict=True))
        for some in combinations(x, wanted)
        for other in combinations(y, wanted)
    )


def _all_with_all(
    rows: Sequence[dict[str, Any]],
    near: Callable[[dict[str, Any], dict[str, Any]], bool],
) -> dict[str, tuple[str | None, int | None]]:
    stars: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=_better):
        for star in stars:
            if near(star[0], row):
                star.append(row)
                break
        else:
            stars.append([row])
    return {
        row["uid"]: (star[0]["uid"], rank) if len(star) > 1 else (None, None)
        for star in stars
        for rank, row in enumerate(star)
    }


@st.composite
def _libraries(draw: st.DrawFn) -> list[dict[str, Any]]:
    rng = random.Random(draw(st.integers(0, 2**32)))
    pool = [sum(1 << bit for bit in rng.sample(range(64), 32)) for _ in range(4)]
    pool.append(rng.choice([0, 1 << 63, 0xFF]))  # flat pictures
    spread = rng.choice([1, 4, 8])

    def sample() -> int | None:
        if rng.random() < 0.1:
            return None
        return _flip(rng.choice(pool), *rng.sample(range(64), rng.randint(0, spread)))

    rows: list[dict[str, Any]] = []
    for uid in rng.sample(range(1000), draw(st.integers(0, 30))):
        image = rng.random() < 0.4
        row = _clip(
            f"{uid:03}",
            [sample() for _ in range(1 if image else rng.randint(0, 5))],
            "image" if image else "video",
            width=rng.choice([320, 640]),
            duration_s=None if image else float(rng.randint(2, 4)),
            aesthetic=rng.choice([None, 5.0, 6.0]),
            quality=rng.choice([None, 0.5, 0.9]),
            luma_mean=rng.choice([None, 100.0, 105.0, 120.0]),
            contrast=rng.choice([None, 40.0, 60.0]),
            colorfulness=rng.choice([None, 20.0, 43.0, 50.0]),
        )
        if rng.random() < 0.3:
            row |= {"crop_x0": 0, "crop_y0": 60, "crop_x1": row["width"], "crop_y1": 420}
        rows.append(row)
    return rows


@given(
    rows=_libraries(),
    distance=st.sampled_from([None, 0, 3, 6, 9]),
    light=st.sampled_from([None, 0.0, 12.0]),
    block=st.sampled_from([2, 8, 4096]),
    way=st.sampled_from([0, 0, 0, 1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_groups_are_those_of_comparing_all_with_all(
    rows: list[dict[str, Any]], distance: int | None, light: float | None, block: int, way: int
) -> None:
    chosen = DedupSettings(distance=distance, light=light, cosine=None)
    with pytest.MonkeyPatch.context() as patch:
        block = max(block, 8) if way else block  # hundreds of keys each time take a while
        patch.setattr(dedup, "BLOCK", block)  # so that the recursion has something to do
        patch.setattr(dedup, "DENSE", 2)
        patch.setattr(dedup, "CHUNK", 3)
        patch.setattr(dedup, "ONE", dedup.ONE[way : way + 1])  # that a million clips would take
        patch.setattr(dedup, "TWO", dedup.TWO[way : way + 1])
        found = _groups(rows, chosen)
        shuffled = random.Random(1).sample(rows, len(rows))
        assert found == _groups(shuffled, chosen)
    assert found == _all_with_all(rows, lambda a, b: _near(a, b, chosen))


@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), block=st.sampled_from([1, 4, 4096]))
@settings(max_examples=50, deadline=None)
def test_groups_by_embedding_are_those_of_comparing_all_with_all(
    seed: int, count: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        _clip(f"{i:03}", [], str(rng.choice(["image", "video"])), width=int(rng.integers(1, 4)))
        for i in range(count)
    ]
    vectors = rng.normal(size=(count, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    known = {row["uid"]: v for row, v in zip(rows, vectors, strict=True) if rng.random() < 0.9}
    held = list(known)
    rng.shuffle(held)
    embeddings = table(({"uid": u, "embedding": known[u]} for u in held), EMBEDDING)
    if held:
        embeddings = pa.concat_tables([embeddings, table([{"uid": "none"}], EMBEDDING)])

    def near(a: dict[str, Any], b: dict[str, Any]) -> bool:
        x, y = known.get(a["uid"]), known.get(b["uid"])
        if x is None or y is None or a["kind"] != b["kind"]:
            return False
        return float(x.astype(np.float64) @ y.astype(np.float64)) > 0.9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "BLOCK", block)
        found = _groups(rows, DedupSettings(cosine=0.9), embeddings)
    assert found == _all_with_all(rows, near)


def test_hashes_within_the_distance_are_equal_under_a_mask_and_masks_grow_with_the_clips() -> None:
    rng = random.Random(0)
    for distance in (0, 3, 6, 12):
        for equal in (1, 2, 3):
            masks = dedup._masks(distance, equal)
            for _ in range(200):
                changed = sum(1 << bit for bit in rng.sample(range(64), distance))
                assert any(not changed & int(mask) for mask in masks)
        ways = [dedup._cheapest(dedup.TWO, distance, 10**n, 10**n) for n in range(3, 12)]
        assert ways == sorted(ways, key=dedup.TWO.index)
        assert ways[0] == (1, 1) and (distance < 6 or ways[-1] == (2, 2))


def test_either_measure_makes_near() -> None:
    rows = [
        _clip("a", [HALF], "image", width=900),
        _clip("b", [_flip(HALF, 1, 2)], "image", width=800),
        _clip("c", [HALF ^ (2**64 - 1)], "image", width=700),
        _clip("d", [HALF ^ 0x00FF_FF00_00FF_FF00], "image", width=600),
    ]
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.99, 0.141], "d": [0.6, 0.8]}
    embeddings = table(({"uid": u, "embedding": v} for u, v in vectors.items()), EMBEDDING)
    found = _groups(rows, None, embeddings)
    assert found == {"a": ("a", 0), "b": ("a", 1), "c": ("a", 2), "d": (None, None)}
    by_hash = _groups(rows, DedupSettings(cosine=None), embeddings)
    assert by_hash["c"] == (None, None) != by_hash["b"]
    by_cosine = _groups(rows, DedupSettings(distance=None), embeddings)
    assert by_cosine["b"] == (None, None) != by_cosine["c"]


def test_embeddings_of_two_models_are_refused() -> None:
    rows = [_clip("a", []), _clip("b", [])]
    mixed = [{"uid": "a", "embedding": [1.0]}, {"uid": "b", "embedding": [1.0, 0.0]}]
    with pytest.raises(UnimodalError, match="dimensions"):
        group(table(rows, COLUMNS), DedupSettings(), table(mixed, EMBEDDING))


def test_many_embeddings_are_compared_within_cells_and_few_pairs_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dedup, "EXACT", 500)
    rng = np.random.default_rng(3)
    topics = rng.normal(size=(40, 32))
    originals = topics[rng.integers(0, 40, 1500)] + 0.7 * rng.normal(size=(1500, 32))
    copies = originals + 0.1 * np.linalg.norm(originals, axis=1, keepdims=True) * (
        rng.normal(size=(1500, 32)) / 32**0.5
    )
    vectors = np.concatenate([originals, copies]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    uids = [f"{i:04}" for i in range(3000)]
    rows = [_clip(uid, [], "image", width=10_000 - i) for i, uid in enumerate(uids)]
    embeddings = pa.table({"uid": uids, "embedding": list(vectors)}, schema=EMBEDDING)
    found = _groups(rows, None, embeddings)
    same = sum(found[uids[1500 + i]][0] == uids[i] for i in range(1500))
    alike = (vectors[:1500] * vectors[1500:]).sum(axis=1) > 0.95
    print(f"\n{same} of {alike.sum()} copies found in cells")
    assert alike.sum() > 1400
    assert same >= 0.98 * alike.sum()
    for uid, (best, _) in found.items():
        if best not in (None, uid):
            assert vectors[int(uid)] @ vectors[int(str(best))] > 0.95 - 1e-6


# -- what is near -------------------------------------------------------------------------------


def test_a_chain_of_near_pairs_is_no_group() -> None:
    pan = [_flip(HALF, *range(4 * i)) for i in range(5)]  # each 4 bits from the next
    rows = [_clip(f"{i}", [h], "image", width=900 - i) for i, h in enumerate(pan)]
    found = _groups(rows)
    assert {uid: best for uid, (best, _) in found.items()} == {
        "0": "0",
        "1": "0",
        "2": "2",
        "3": "2",
        "4": None,
    }


def test_shots_that_share_one_frame_are_different() -> None:
    rng = random.Random(0)
    x, y, z, u, v = (sum(1 << b for b in rng.sample(range(64), 32)) for _ in range(5))
    near = [
        (([x, y, z], [x, y, u]), True),
        (([x, y, z], [u, x, y]), True),  # trimmed: a sample later
        (([x, y, z], [x, u, v]), False),  # a logo, or a return to the scene
        (([x, y, z], [y, x, u]), False),  # another order
        (([x, x, x], [x, u, v]), False),  # a still shot, of which another has one frame
        (([x, x, x], [x, x, u]), True),
        (([x, y], [x, y]), True),
        (([x, y], [x, u]), False),
        (([x], [x, y, z]), False),
        (([x, y], [x, y, z]), True),
        (([None, x, None, y, None], [x, None, y]), True),  # what is not scored is not seen
        (([x], [_flip(x, 0, 9, 18, 27, 36, 45)]), True),
        (([x], [_flip(x, 0, 9, 18, 27, 36, 45, 54)]), False),
    ]
    for (a, b), expected in near:
        found = _groups([_clip("a", a), _clip("b", b)])
        assert (found["a"][0] is not None) == expected, (a, b)
        assert found["a"][0] == found["b"][0]


def test_flat_pictures_are_not_alike() -> None:
    black, gray, stripes = 0, 1 << 63, 0xC4 << 56
    rows = [_clip(f"{i}", [h], "image") for i, h in enumerate((black, black, gray, gray, stripes))]
    rows += [_clip(f"v{i}", [gray, gray, gray]) for i in range(2)]
    assert set(_groups(rows, DedupSettings(distance=12)).values()) == {(None, None)}
    # A fade from black neither adds nor hides likeness: what is left decides.
    other = HALF ^ 0x0F0F_0F0F_0F0F_0F0F
    found = _groups([_clip("a", [black, HALF, other]), _clip("b", [HALF, other, black])])
    assert found == {"a": ("a", 0), "b": ("a", 1)}
    assert _groups([_clip("a", [black, HALF, HALF]), _clip("b", [black, HALF, other])])["a"] == (
        None,
        None,
    )


def test_pictures_of_another_brightness_or_kind_are_different() -> None:
    light = {"luma_mean": 100.0, "contrast": 50.0, "colorfulness": 30.0}
    for other, near in (
        ({}, True),
        ({"luma_mean": 111.0}, True),
        ({"luma_mean": 113.0}, False),
        ({"contrast": 37.0}, False),
        ({"colorfulness": 53.0}, True),
        ({"colorfulness": 55.0}, False),  # the green and the blue book
        ({"luma_mean": None}, True),
    ):
        rows = [_clip("a", [HALF], "image", **light), _clip("b", [HALF], "image", **light | other)]
        assert (_groups(rows)["a"][0] is not None) == near, other
        assert _groups(rows, DedupSettings(light=None))["b"] == ("a", 1)
    mixed = [_clip("a", [HALF], "image"), _clip("b", [HALF], "video")]
    assert set(_groups(mixed).values()) == {(None, None)}


def test_measures_are_switched_off_with_none() -> None:
    off = build(CurateSettings, sets=["dedup.distance=none", "dedup.cosine=none"]).dedup
    rows = [_clip("a", [HALF], "image"), _clip("b", [HALF], "image")]
    assert set(_groups(rows, off).values()) == {(None, None)}
    assert _groups(rows, DedupSettings(distance=0))["b"] == ("a", 1)
    for bad in ("distance=13", "distance=-1", "cosine=1", "cosine=0", "light=-1"):
        with pytest.raises(UsageError, match=r"dedup\."):
            build(CurateSettings, sets=[f"dedup.{bad}"])


def test_copies_are_compared_with_those_that_stand_for_them_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = 0
    expand = dedup._expand

    def counting(start: np.ndarray, end: np.ndarray) -> Any:
        nonlocal compared
        for w, b in expand(start, end):
            compared += len(w)
            yield w, b

    monkeypatch.setattr(dedup, "_expand", counting)
    rng = random.Random(0)
    count = 20_000
    pool = [_flip(HALF, *rng.sample(range(64), 3)) for _ in range(500)]
    flat = [h for _ in range(count) for h in rng.choices(pool, k=3)]
    sample = COLUMNS.field("samples").type.value_type
    yes, none = pa.array([True] * len(flat)), pa.nulls(len(flat))
    values = [
        none.cast(pa.string()),
        none.cast(pa.float64()),
        yes,
        yes,
        pa.array(flat, pa.uint64()),
    ]
    clips = pa.table(
        {
            "uid": [f"{i:05}" for i in range(count)],
            "kind": ["video"] * count,
            "samples": pa.ListArray.from_arrays(
                pa.array(range(0, len(flat) + 1, 3), pa.int32()),
                pa.StructArray.from_arrays(values, fields=list(sample)),
            ),
        }
    )
    found = group(clips, DedupSettings())
    assert set(found.column("dup_group").to_pylist()) == {"00000"}
    assert found.column("dup_rank").to_pylist() == list(range(count))
    assert compared < 0.5 * count**2  # of 9 * 49 * count**2 / 2 that share a bucket


# -- real media ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(
    photos: Path, emoji: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by (original, variant) of photographs and emoji, as they are and changed."""
    import cv2

    folder = tmp_path_factory.mktemp("pictures")
    names = [p for p in sorted(photos.iterdir()) if p.suffix in (".png", ".jpg")]
    for path in [*names, *emoji[::40]]:
        if path.stem in ("chessboard_RGB", "motorcycle_right"):
            continue  # near-duplicates: of chessboard_GRAY, and a stereo camera's other eye
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED if path in emoji else cv2.IMREAD_COLOR)
        if image.shape[2] == 4:
            alpha = image[..., 3:] / 255
            image = (image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        height, width = image.shape[:2]
        dy, dx = round(height * 0.01), round(width * 0.01)
        half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"{path.stem}~original.png"), image)
        cv2.imwrite(str(folder / f"{path.stem}~jpeg.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 40])
        cv2.imwrite(str(folder / f"{path.stem}~half.png"), half)
        cropped = image[dy : height - dy, dx : width - dx]
        cv2.imwrite(str(folder / f"{path.stem}~cropped.png"), cropped)
    watch_part("p", list_sources([folder]), WatchSettings(), folder / "out")
    rows = pq.read_table(folder / "out" / "p.parquet").to_pylist()
    return {tuple(Path(row["uri"]).stem.split("~")): row for row in rows}  # type: ignore[misc]


def _score(
    rows: dict[tuple[str, str], dict[str, Any]], settings: DedupSettings
) -> tuple[float, float, dict[str, float]]:
    """Precision and recall of near pairs, and recall by kind of change."""
    groups = _groups(list(rows.values()), settings)
    best = {key: groups[row["uid"]][0] or row["uid"] for key, row in rows.items()}
    original = {row["uid"]: name for (name, _), row in rows.items()}
    claimed = [(name, original[best[name, v]]) for name, v in rows if best[name, v] in original]
    members = [(a, b) for a, b in claimed if groups[rows[a, "original"]["uid"]][0] or a != b]
    found: dict[str, list[bool]] = {}
    for (name, variant), _ in rows.items():
        if variant != "original":
            same = best[name, variant] == best[name, "original"]
            found.setdefault(variant, []).append(same)
    precision = sum(a == b for a, b in members) / max(1, len(members))
    recall = sum(map(sum, found.values())) / sum(map(len, found.values()))
    return precision, recall, {name: sum(hits) / len(hits) for name, hits in found.items()}


def test_copies_of_real_pictures_are_found_and_others_are_not(
    pictures: dict[tuple[str, str], dict[str, Any]], photos: Path
) -> None:
    scenes = {path.stem for path in photos.iterdir()}
    # Icons of 72 pixels lose more to JPEG; and some differ by the color of hair alone.
    for name, right, least in (("photographs", 1.0, 0.9), ("emoji", 0.98, 0.85)):
        some = {
            k: row for k, row in pictures.items() if (k[0] in scenes) == (name == "photographs")
        }
        for distance in (4, 6, 8, 10):
            precision, recall, by = _score(some, DedupSettings(distance=distance))
            each = ", ".join(f"{change} {share:.2f}" for change, share in sorted(by.items()))
            print(
                f"\n{name} {len(some)}, distance {distance}: {precision=:.3f} {recall=:.3f}", each
            )
            if distance == 6:
                assert precision >= right
                assert recall > least
                assert min(by.values()) > least - 0.05


def test_copies_of_a_real_film_are_found_shot_by_shot(
    bikes: Path, videos: Path, tmp_path: Path, write_video: Callable[..., Path]
) -> None:
    import av
    import cv2

    folder = tmp_path / "videos"
    folder.mkdir()
    with av.open(str(bikes)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    write_video(folder / "original.mp4", frames)
    small = [cv2.resize(f, (480, 204), interpolation=cv2.INTER_AREA) for f in frames]
    write_video(folder / "small.mp4", small)
    write_video(folder / "trimmed.mp4", frames[13:])  # half a second later: on the sample grid
    for name in ("carphone_pristine.mp4", "carphone_distorted.mp4"):
        (folder / name).symlink_to(videos / name)
    watch_part("p", list_sources([folder]), WatchSettings(), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "p.parquet").to_pylist()
    groups = _groups(rows)
    where = {row["uid"]: (Path(row["uri"]).stem, row["start_s"]) for row in rows}
    sizes = {row["uid"]: row["duration_s"] for row in rows}
    found: dict[str, int] = {"small": 0, "trimmed": 0}
    for uid, (best, rank) in groups.items():
        print(where[uid], f"{sizes[uid]:.2f} s", "->", best and where[best], rank)
        if best not in (None, uid):
            (name, start), (of, begins) = where[uid], where[str(best)]
            if name.startswith("carphone"):
                assert of.startswith("carphone")
                continue
            offset = {"original": 0.0, "small": 0.0, "trimmed": 0.52}
            # The same shot of the film: spans that overlap, on the film's own clock.
            assert abs(start + offset[name] - begins - offset[of]) < 0.6
            for other in {name, of} & set(found):
                found[other] += 1
    assert min(found.values()) >= 3  # of the five shots that are long enough to have samples
    pair = {uid for uid, (name, _) in where.items() if name.startswith("carphone")}
    assert len(pair) == 2
    assert len({groups[uid][0] for uid in pair}) == 1

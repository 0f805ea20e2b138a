"""Near-duplicates among a million hashes, 5 % of them in one bucket, in every way that can be.

    .venv/bin/python benchmarks/dedup.py [case ...]

Each case runs in a process of its own; its time is that of `dedup.group` alone, and its peak
memory includes the library and the table of clips. Hashes have 32 of 64 bits set, as real ones
have. The last two cases are of embeddings, and count how many of the near pairs are found.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa

from unimodal.pipeline import dedup
from unimodal.pipeline.clips import SAMPLE

HASHES = 1_000_000
HOT = HASHES // 20

CASES = {
    "spread": "333,334 videos, three hashes each, nothing near",
    "copies": "50,000 videos are copies of one",
    "logo": "50,000 videos have one equal sample, and nothing else in common",
    "alike": "50,000 videos within 3 bits of one, sample by sample",
    "cloud": "50,000 videos within 8 bits of one: thousands of stars",
    "images": "1,000,000 images, 50,000 equal in the 16 bits that a bucket is made of",
    "embeddings": "100,000 embeddings of 512 dimensions, a fifth near another",
    "formless": "50,000 embeddings without topics, the hardest to cut into cells",
}


def hashes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """uint64 of which half the bits are set."""
    bits = np.argsort(rng.random((*shape, 64)), axis=-1) < 32
    return np.packbits(bits, axis=-1).view(">u8")[..., 0].astype(np.uint64)


def flipped(rng: np.random.Generator, values: np.ndarray, bits: int) -> np.ndarray:
    """`values` with up to `bits` bits changed in each."""
    for _ in range(bits):
        values = values ^ (np.uint64(1) << rng.integers(0, 64, values.shape, dtype=np.uint64))
    return values


def made_up(case: str) -> tuple[np.ndarray, str]:
    """Hashes uint64 [clips, samples], and what kind the clips are of."""
    rng = np.random.default_rng(0)
    if case == "images":
        found = hashes(rng, HASHES, 1)
        hot = rng.choice(HASHES, HOT, replace=False)
        bits = np.uint64(sum(1 << i for i in range(64) if i % 8 < 2))  # two bands of eight
        found[hot] = (found[hot] & ~bits) | (found[0] & bits)
        return found, "image"
    found = hashes(rng, -(-HASHES // 3), 3)
    hot = rng.choice(len(found), HOT, replace=False)
    one = np.broadcast_to(found[0], (HOT, 3))
    if case == "copies":
        found[hot] = one
    elif case == "logo":
        found[hot, rng.integers(0, 3, HOT)] = one[:, 0]
    elif case == "alike":
        found[hot] = flipped(rng, one, 3)
    elif case == "cloud":
        found[hot] = flipped(rng, one, 8)
    return found, "video"


def table(found: np.ndarray, kind: str) -> pa.Table:
    """Clips with these hashes as scoring samples."""
    count, each = found.shape
    total = count * each
    yes = pa.array(np.ones(total, bool))
    columns = [pa.nulls(total, pa.string()), pa.nulls(total, pa.float64()), yes, yes]
    samples = pa.StructArray.from_arrays(
        [*columns, pa.array(found.ravel())], fields=[SAMPLE.field(i) for i in range(5)]
    )
    offsets = pa.array(np.arange(0, total + 1, each), pa.int32())
    return pa.table(
        {
            "uid": pa.array(np.char.mod("%032x", np.arange(count))),
            "kind": pa.array([kind]).take(pa.array(np.zeros(count, np.int32))),
            "samples": pa.ListArray.from_arrays(offsets, samples),
            "width": pa.array(np.full(count, 1280, np.int32)),
            "height": pa.array(np.full(count, 720, np.int32)),
        }
    )


def embedded(count: int, topical: bool) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """Clips, their embeddings, and those as float32 [count, 512].

    Two hundred topics in 64 directions around a common mean, as CLIP's lie in a narrow cone: the
    median cosine of two is 0.46. A fifth is another one, 0.95 to 1 like it.
    """
    dimensions = 512
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(64, dimensions)).astype(np.float32) / 8
    topics = 0.7 * topical * rng.normal(size=(200, 64)).astype(np.float32)
    inner = topics[rng.integers(0, 200, count)] + 0.7 * rng.normal(size=(count, 64))
    vectors = inner.astype(np.float32) @ basis + 0.9 * rng.normal(size=dimensions)
    copies = rng.choice(count, count // 5, replace=False)
    of = vectors[rng.integers(0, count, len(copies))]
    noise = rng.normal(size=(len(copies), 64)) @ basis
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    tangent = np.sqrt(rng.uniform(0.95, 1, (len(copies), 1)) ** -2 - 1)
    vectors[copies] = of + noise * tangent * np.linalg.norm(of, axis=1, keepdims=True)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    clips = table(np.zeros((count, 1), np.uint64), "image")
    offsets = pa.array(np.arange(0, vectors.size + 1, dimensions), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
    return clips, pa.table({"uid": clips.column("uid"), "embedding": lists}), vectors


def recall(clips: pa.Table, embeddings: pa.Table, vectors: np.ndarray) -> tuple[int, int]:
    """Near pairs that are compared, and all there are, of 5,000 clips with all better ones."""
    found = dedup._Cosine(clips.column("uid").combine_chunks(), embeddings, 0.95)
    chosen = np.sort(np.random.default_rng(1).choice(len(vectors), 5000, replace=False))
    pairs = hits = 0
    for start in range(0, len(chosen), 500):
        rows = chosen[start : start + 500]
        which, better = np.nonzero(vectors[rows] @ vectors.T > 0.95)
        worse = rows[which]
        worse, better = worse[better < worse], better[better < worse]
        pairs += len(worse)
        hits += int((found._cells[worse] == found._cells[better, :1]).any(axis=1).sum())
    return hits, pairs


def run(case: str) -> None:
    """Print what one case takes."""
    embeddings, said = None, ""
    if case == "embeddings":
        clips, embeddings, vectors = embedded(100_000, topical=True)
    elif case == "formless":
        clips, embeddings, vectors = embedded(50_000, topical=False)
    else:
        clips = table(*made_up(case))
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    groups = dedup.group(clips, dedup.DedupSettings(), embeddings)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    grouped = groups.num_rows - groups.column("dup_group").null_count
    stars = len(groups.column("dup_group").drop_null().unique())
    if embeddings is not None:
        said = "; {:,} of {:,} near pairs found".format(*recall(clips, embeddings, vectors))
    took = f"{wall:6.1f} s {cpu:6.1f} CPU s {after.ru_maxrss / 2**20:5.2f} GiB peak"
    print(f"{CASES[case]}:\n{took}; {grouped:,} clips in {stars:,} groups{said}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2])
    for name in sys.argv[1:] or CASES:
        if name in CASES and "--run" not in sys.argv:
            subprocess.run([sys.executable, __file__, "--run", name], check=True)

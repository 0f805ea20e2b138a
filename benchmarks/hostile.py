"""Shards, checkpoints, captions and settings of strangers, and what they must not do.

Each attempt is a command on a copy of something good with one thing in it changed. It survives
where the command ends in time and memory, well or with one line that says what is wrong; where
nothing that was given is run, nothing is written outside the output, nothing reaches a terminal
or a page as other than text, and no words become control tokens.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.forked import ANY_CLIP, DECODER, answers, complaint, media, must, run, sets, told

SECONDS, MEMORY = 60, 4 << 30
"""Of an attempt, at most; a command of good things takes a twentieth of either."""
INNER = ["-q", "--engine", "inline"]
CPU = ["-q", "--device", "cpu"]
DEEP = 200_000
"""Brackets in each other."""


class Run:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@dataclass
class Trial:
    """One attempt: a command, and what else has to hold after it."""

    name: str
    arguments: list[str]
    codes: tuple[int, ...] = (0, 1, 2)
    after: Callable[[], str | None] = lambda: None


@dataclass
class Ground:
    """A folder with something good of each kind, and a place beside which nothing may appear."""

    folder: Path
    every: int = 1
    """Of attempts only each so-manieth is made."""
    number: int = 0

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    def make(self) -> Ground:
        """Pictures, a run, shards and a checkpoint."""
        at = self.folder
        media(at / "in", pictures=8, films=1)
        kept = sets(ANY_CLIP)
        must(["curate", f"{at}/in", "-o", f"{at}/run", *INNER, *kept])
        must(["tokenize", f"{at}/run", "-o", f"{at}/shards", *INNER, "--area", "2304"])
        must([*train(f"{at}/shards"), "-o", f"{at}/ckpt"])
        return self

    def place(self) -> Path:
        """An empty folder, two levels below anything else."""
        self.number += 1
        place = self.folder / "places" / f"{self.number}" / "inner"
        place.mkdir(parents=True)
        return place

    def copy(self, name: str) -> Path:
        """A copy of something good that may be changed."""
        return Path(shutil.copytree(self.folder / name, self.place() / name))

    def attempt(self, what: str, trials: Iterator[Trial]) -> dict[str, Any]:
        """Try them all; a row of the table."""
        row: dict[str, Any] = {"what": what, "tried": 0, "survived": 0, "ended_well": 0}
        row |= {"notes": [], "slowest_s": 0.0, "most_mib": 0}
        for trial in trials:
            ended = run(trial.arguments, patience=SECONDS, memory=MEMORY)
            wrong = complaint(ended)
            if ended.code not in trial.codes:
                wrong = wrong or f"exit {ended.code}, not {trial.codes}: {ended.stderr[-300:]}"
            if self.canary.exists():
                self.canary.unlink()
                wrong = "what was given was run"
            outside = [p for p in (self.folder / "places").glob("*/*") if p.name != "inner"]
            if outside or list(self.folder.glob("evil*")):
                wrong = f"written outside: {outside}"
            wrong = wrong or trial.after()
            row["tried"] += 1
            row["survived"] += wrong is None
            row["ended_well"] += ended.code == 0
            row["slowest_s"] = max(row["slowest_s"], round(ended.seconds, 1))
            row["most_mib"] = max(row["most_mib"], ended.memory >> 20)
            if wrong:
                row["notes"].append(f"{trial.name}: {wrong}")
                print("   ", row["notes"][-1], file=sys.stderr, flush=True)
        shutil.rmtree(self.folder / "places", ignore_errors=True)
        return told(row)


def train(shards: str, *more: str) -> list[str]:
    """A training of two steps, without --out."""
    return ["train", shards, *CPU, "--steps", "2", *sets(DECODER), *more]


# --- shards, and tars of media ----------------------------------------------------------------


def member(name: str, data: bytes = b"", size: int | None = None, **kind: Any) -> bytes:
    """A member of a tar whose header may say another size than it has."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    for key, value in kind.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def hostile_members(data: bytes, canary: Path) -> dict[str, bytes]:
    """Members that no tar of media should have, by what they are."""
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    return {
        "a name above": member("../../evil.png", data),
        "a name from the root": member("/tmp/../evil.png", data),
        "a name that is a command": member(f"pipe:touch {canary}.png", data),
        "a name of control characters": member("\x1b]0;evil\x07\x1b[2J.png", data),
        "a pickle": member("a.pkl", pickle.dumps(Run(canary))) + member("a.pyd", b"x"),
        "a pickle called png": member("a.png", pickle.dumps(Run(canary))),
        "a link": member("a.png", **link),
        "a hard link": member("a.png", type=tarfile.LNKTYPE, linkname="../../../etc/passwd"),
        "a device": member("a.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "a pipe": member("a.png", type=tarfile.FIFOTYPE),
        "eight exabytes": member("a.png", data, size=(1 << 63) - 512),
        "a gibibyte": member("a.png", data, size=1 << 30),
        "a caption of a terabyte": member("a.png", data) + member("a.txt", b"x", size=1 << 40),
        "a bomb of JSON": member("a.png", data) + member("a.json", b"[" * DEEP),
        "a torn header": member("a.png", data)[:300],
        "noise": bytes(range(256)) * 8,
    }


def tars(ground: Ground) -> Iterator[Trial]:
    """Tars as inputs of curate: what is good in them is read."""
    data = next((ground.folder / "in").glob("*.png")).read_bytes()
    for name, blocks in hostile_members(data, ground.canary).items():
        place = ground.place()
        (place / "a.tar").write_bytes(member("good.png", data) + blocks + bytes(1024))
        command = ["curate", f"{place}/a.tar", "-o", f"{place}/run", *INNER]
        yield Trial(f"curate of a tar with {name}", [*command, "--set", "patience.failures=1"])
    for kind in ("pipe:touch {}", "pipe:touch {}.tar", "file:///dev/zero", "{}/../*.tar"):
        given = kind.format(ground.canary)
        yield Trial(f"curate of {kind}", ["curate", given, "-o", f"{ground.place()}/run"], (1, 2))


def index(folder: Path, **values: Any) -> None:
    """Change columns of a directory's index, in another process: threads do not survive a fork."""
    code = (
        "import json, sys, pyarrow as pa, pyarrow.parquet as pq\n"
        "t = pq.read_table(sys.argv[1])\n"
        "for name, value in json.loads(sys.argv[2]).items():\n"
        "    i = t.schema.get_field_index(name)\n"
        "    c = pa.array([value] * t.num_rows, t.schema.field(i).type)\n"
        "    t = t.set_column(i, t.schema.field(i), c)\n"
        "pq.write_table(t, sys.argv[1])\n"
    )
    file = next(folder.glob("shard-*.parquet"))
    subprocess.run([sys.executable, "-c", code, str(file), json.dumps(values)], check=True)


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file."""
    record = json.loads(path.read_text())
    path.write_text(json.dumps(change(record)))


def npy_of(canary: Path) -> bytes:
    """An array of objects, which NumPy would unpickle."""
    head = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head += " " * (-(len(head) + 11) % 64) + "\n"
    return (
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", len(head))
        + head.encode()
        + pickle.dumps([Run(canary)])
    )


def damaged_shards(canary: Path) -> dict[str, Callable[[Path], Any]]:
    """Ways to change a directory of shards."""

    def tar(folder: Path) -> Path:
        return next(folder.glob("shard-*.tar"))

    def pickled(folder: Path) -> None:
        data, bad = tar(folder).read_bytes(), npy_of(canary)
        for at in [found.start() for found in re.finditer(rb"\x93NUMPY", data)]:
            data = data[:at] + bad + data[at + len(bad) :]
        tar(folder).write_bytes(data)

    def linked(folder: Path, to: str) -> None:
        path = tar(folder)
        path.unlink()
        path.symlink_to(to)

    manifest = "manifest.json"
    big = 2**31 - 1
    return {
        "pickles in place of codes": pickled,
        "a torn tar": lambda f: os.truncate(tar(f), 700),
        "an empty tar": lambda f: os.truncate(tar(f), 0),
        "a link to /dev/zero for a tar": lambda f: linked(f, "/dev/zero"),
        "a link to /etc/passwd for a tar": lambda f: linked(f, "/etc/passwd"),
        "a shard above": lambda f: index(f, shard="../../../../etc/passwd"),
        "a shard from the root": lambda f: index(f, shard="/etc/passwd"),
        "a shard that is a command": lambda f: index(f, shard=f"pipe:touch {canary}"),
        "keys above": lambda f: index(f, key="../../evil"),
        "offsets before the beginning": lambda f: index(f, offset=-1),
        "offsets far behind the end": lambda f: index(f, offset=2**62),
        "sizes of exabytes": lambda f: index(f, nbytes=2**62),
        "grids of billions": lambda f: index(f, height=big, width=big, frames=big),
        "grids that are negative": lambda f: index(f, height=-1),
        "an index that is a pickle": lambda f: next(f.glob("shard-*.parquet")).write_bytes(
            pickle.dumps(Run(canary))
        ),
        "a manifest that is a bomb": lambda f: (f / manifest).write_text("[" * DEEP),
        "a manifest of a huge number": lambda f: (f / manifest).write_text("1" * 10**6),
        "a manifest that is a list": lambda f: (f / manifest).write_text("[]"),
        "a manifest of other types": lambda f: edited(f / manifest, lambda r: dict.fromkeys(r, 7)),
        "a manifest that names a shard above": lambda f: (f / manifest).write_text(
            (f / manifest).read_text().replace("shard-00000", "../../evil")
        ),
        "a vocabulary that is a bomb": lambda f: (f / "vocabulary/vocabulary.json").write_text(
            '{"a":' * DEEP
        ),
        "a vocabulary of huge ids": lambda f: edited(
            f / "vocabulary/vocabulary.json", lambda r: {**r, "vision_start": 10**18}
        ),
        "a vocabulary whose control tokens are text": lambda f: edited(
            f / "vocabulary/vocabulary.json", lambda r: {**r, "bos": 65}
        ),
    }


def shards(ground: Ground) -> Iterator[Trial]:
    """Each way, through each command that reads shards."""
    commands: dict[str, Callable[[Path], list[str]]] = {
        "train": lambda at: [*train(str(at)), "-o", f"{at.parent}/ckpt"],
        "inspect": lambda at: ["inspect", str(at), "-o", f"{at.parent}/page", *CPU],
        "inspect --where": lambda at: [
            *("inspect", str(at), "--where", "true", "-o", f"{at.parent}/merged", "-q")
        ],
        "tokenize --captions": lambda at: [
            *("tokenize", f"{ground.folder}/run", "-o", str(at), "--captions", *INNER)
        ],
    }
    for name, change in damaged_shards(ground.canary).items():
        for command in commands:
            at = ground.copy("shards")
            change(at)
            yield Trial(f"{command} of shards with {name}", commands[command](at))
    for command in ("train", "inspect"):
        given = f"pipe:touch {ground.canary}"
        place = ["-o", f"{ground.place()}/out"]
        yield Trial(f"{command} of pipe:", [command, given, *place, "-q"], (1, 2))


# --- checkpoints and tokenizers ---------------------------------------------------------------


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of safetensors, and leave the rest."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    new = json.dumps(change(json.loads(data[8:end]))).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[end:])


def one(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The header with one tensor changed."""
    name = next(key for key in record if key != "__metadata__")
    return {**record, name: {**record[name], **values}}


def overlapping(record: dict[str, Any]) -> dict[str, Any]:
    """The header with all tensors at the place of the first of their size."""
    seen: dict[int, Any] = {}
    for name, about in record.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            record[name] = {**about, "data_offsets": seen.setdefault(end - begin, [begin, end])}
    return record


def damaged_weights(canary: Path) -> dict[str, Callable[[Path], Any]]:
    """Ways to change a file of safetensors."""
    rest = [0, 2**42]
    return {
        "a pickle": lambda p: p.write_bytes(pickle.dumps(Run(canary))),
        "a header of 2^63 bytes": lambda p: p.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "a header of a terabyte": lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
        "a tensor of terabytes": lambda p: header(
            p, lambda r: one(r, shape=[2**20, 2**20], data_offsets=rest)
        ),
        "a shape without end": lambda p: header(p, lambda r: one(r, shape=[2**62, 2**62])),
        "tensors in one place": lambda p: header(p, overlapping),
        "offsets backwards": lambda p: header(p, lambda r: one(r, data_offsets=[64, 0])),
        "a header that is a bomb": lambda p: p.write_bytes(struct.pack("<Q", DEEP) + b"[" * DEEP),
        "another type": lambda p: header(p, lambda r: one(r, dtype="F64")),
        "a torn end": lambda p: os.truncate(p, p.stat().st_size // 2),
        "nothing": lambda p: p.write_bytes(b""),
    }


def damaged_config(canary: Path) -> dict[str, Callable[[Path], Any]]:
    """Ways to change a config.json, whose folder is given."""

    def remote(path: Path) -> None:
        code = f"import os\nos.system('touch {canary}')\n"
        (path.parent / "modeling_evil.py").write_text(code)
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
        edited(path, lambda r: {**r, "auto_map": dict.fromkeys(names, "modeling_evil.Evil")})

    def everything(value: Any) -> Callable[[Path], Any]:
        return lambda path: edited(
            path,
            lambda r: {
                key: value if isinstance(was, int) and not isinstance(was, bool) else was
                for key, was in r.items()
            },
        )

    return {
        "huge sizes": everything(2**40),
        "sizes beyond any number": everything(10**400),
        "a billion of each": everything(10**9),
        "no sizes": everything(0),
        "negative sizes": everything(-1),
        "words for sizes": everything("evil"),
        "lists for sizes": everything([[]]),
        "code of its own": remote,
        "a bomb": lambda p: p.write_text('{"a":' * DEEP),
        "a huge number": lambda p: p.write_text('{"hidden_size": ' + "1" * 10**6 + "}"),
        "a list": lambda p: p.write_text("[]"),
        "bytes": lambda p: p.write_bytes(b"\xff\xfe\x00"),
    }


def checkpoints(ground: Ground) -> Iterator[Trial]:
    """Each way, through each command that reads checkpoints."""

    def step(at: Path) -> Path:
        return next(at.glob("step-*"))

    def indexed(at: Path) -> None:
        (step(at) / "model.safetensors").unlink()
        names = {"lm_head.weight": "../../../../../etc/passwd"}
        file = step(at) / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": names}))

    ways: dict[str, Callable[[Path], Any]] = {
        f"{name} for weights": lambda at, change=change: change(step(at) / "model.safetensors")
        for name, change in damaged_weights(ground.canary).items()
    }
    ways |= {
        f"config.json with {name}": lambda at, change=change: change(step(at) / "config.json")
        for name, change in damaged_config(ground.canary).items()
    }
    ways |= {
        "an index that names files above": indexed,
        "a step above": lambda at: (at / "latest").write_text("../../../etc"),
        "a step of control characters": lambda at: (at / "latest").write_text("\x1b[2Jevil"),
        "data.json that is a bomb": lambda at: (at / "data.json").write_text('{"a":' * DEEP),
        "data.json of other types": lambda at: edited(
            at / "data.json", lambda r: dict.fromkeys(r, 7)
        ),
        "config.toml that is a bomb": lambda at: (at / "config.toml").write_text("a=" + "[" * DEEP),
        "train.json that is a bomb": lambda at: (step(at) / "train.json").write_text("[" * DEEP),
        "train.json of other types": lambda at: edited(
            step(at) / "train.json", lambda r: dict.fromkeys(r, "evil")
        ),
        "pickled moments": lambda at: (step(at) / "optimizer.safetensors").write_bytes(
            pickle.dumps(Run(ground.canary))
        ),
        "a pickled vision tokenizer": lambda at: (
            at / "vision_tokenizer/model.safetensors"
        ).write_bytes(pickle.dumps(Run(ground.canary))),
        "another vision tokenizer": lambda at: header(
            at / "vision_tokenizer/model.safetensors", overlapping
        ),
        "a vocabulary that is a bomb": lambda at: (at / "vocabulary/vocabulary.json").write_text(
            '{"a":' * DEEP
        ),
    }
    given = f"{ground.folder}/shards"
    commands: dict[str, Callable[[Path], list[str]]] = {
        "sample": lambda at: ["sample", str(at), "a kite", "-o", f"{at.parent}/out", *CPU],
        "train, resumed": lambda at: [*train(given), "--steps", "3", "-o", str(at)],
        "train --init": lambda at: [
            *train(given, "--init", str(at)),
            *("-o", f"{at.parent}/new"),
        ],
        "export model": lambda at: ["export", "model", str(at), "-o", f"{at.parent}/out", "-q"],
        "eval generation": lambda at: [
            *("eval", "generation", str(at), f"{ground.folder}/prompts.txt"),
            *("-o", f"{at.parent}/out", *CPU),
        ],
    }
    (ground.folder / "prompts.txt").write_text("a red kite\n")
    for name, change in ways.items():
        for command, arguments in commands.items():
            at = ground.copy("ckpt")
            change(at)
            yield Trial(f"{command} of a checkpoint with {name}", arguments(at))


def tokenizers(ground: Ground) -> Iterator[Trial]:
    """Each way, as the vision tokenizer of tokenize and the start of train-tokenizer."""
    ways: dict[str, Callable[[Path], Any]] = {
        f"{name} for weights": lambda at, change=change: change(at / "model.safetensors")
        for name, change in damaged_weights(ground.canary).items()
    }
    ways |= {
        f"config.json with {name}": lambda at, change=change: change(at / "config.json")
        for name, change in damaged_config(ground.canary).items()
    }
    for name, change in ways.items():
        at = ground.copy("shards") / "vision_tokenizer"
        change(at)
        out = ["-o", f"{at.parents[1]}/out"]
        tokenize = ["tokenize", f"{ground.folder}/run", "--tokenizer", str(at), *out, *INNER]
        yield Trial(f"tokenize by a tokenizer with {name}", tokenize)
        start = ["train-tokenizer", f"{ground.folder}/in", "--init", str(at), "--steps", "1"]
        yield Trial(f"train-tokenizer from {name}", [*start, *out, *CPU, "--set", "crop=32"])


# --- captions ---------------------------------------------------------------------------------

MARK = "7331"
CAPTIONS = {
    "a script": f"<script>alert({MARK})</script>",
    "a picture that runs": f"<img src=x onerror=alert({MARK})><svg/onload=alert({MARK})>",
    "the end of an attribute": f"\"'><b onclick=alert({MARK})>x</b>",
    "the end of a script": f"</script></style></title><script>alert({MARK})</script>",
    "an address that runs": f'<a href="javascript:alert({MARK})">x</a>',
    "a comment that is not closed": f"<!-- <script>alert({MARK})//",
    "control strings": "\x1b[2J\x1b]0;evil\x07\x1b]52;c;ZXZpbA==\x07\x9b31m red \x08\x08\r over",
    "control tokens": "<|image token|><|image start|><|extra_203|><|endoftext|><bos><|im_start|>",
    "words turned around": "\u202egnp.exe\u202c \u2066\u200f\ufeff",
    "a NUL": "a\x00b",
    "a megabyte": "kite " * 200_000,
    "a word of a megabyte": "k" * 1_000_000,
    "a thousand marks on a letter": "Z" + "\u0301\u0489" * 5000,
    "a surrogate": "\\ud83d half of a pair",
    "a line of a table": '=HYPERLINK("http://evil";"x"),"\n',
    "markup of a terminal": "[link=file:///etc/passwd]x[/link][bold red]",
}


class _Pages(HTMLParser):
    """What of a page would run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            runs = name.startswith("on") or (value or "").strip().startswith("javascript:")
            if runs and MARK in (value or ""):
                self.found.append(f"<{tag} {name}={value!r}")

    def handle_data(self, data: str) -> None:
        if self.inside == "script" and data.strip().startswith(f"alert({MARK})"):
            self.found.append(data)


def runs(page: Path) -> str | None:
    """What a page of ours would run of a caption."""
    if not page.exists():
        return None
    parser = _Pages()
    parser.feed(page.read_text("utf-8", "replace"))
    return f"{page.name} runs {parser.found[0]}" if parser.found else None


def ids_are_text(folder: Path) -> str | None:
    """Whether any caption of shards has ids that are not text, in another process."""
    code = (
        "import sys, numpy as np\n"
        "from unimodal.tokenize.shards import Shards\n"
        "s = Shards.open(sys.argv[1])\n"
        "import pyarrow.parquet as pq, pathlib\n"
        "for f in sorted(pathlib.Path(sys.argv[1]).glob('shard-*.parquet')):\n"
        "    for row in pq.read_table(f, columns=['captions']).to_pylist():\n"
        "        for one in row['captions'] or []:\n"
        "            ids = np.array(s.vocabulary.text.encode(one['text']))\n"
        "            assert s.vocabulary.is_text(ids).all(), one['text'][:50]\n"
        "            assert len(ids) == one['tokens'], one['text'][:50]\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    return done.stderr[-400:] if done.returncode else None


def captions(ground: Ground) -> Iterator[Trial]:
    """Each caption in turn, from where it comes in to where it is seen."""
    pictures = sorted((ground.folder / "in").glob("*.png"))[:2]
    server = answers()
    for number, (name, text) in enumerate([*CAPTIONS.items(), ("bad UTF-8", "")]):
        if number % ground.every:
            continue
        at = ground.folder / f"captions-{number}"
        (at / "in").mkdir(parents=True)
        for path in pictures:
            shutil.copy(path, at / "in")
        data = text.encode("utf-8", "surrogatepass") or b"\xff\xfe\xc3\x28 kite"
        (at / "in" / pictures[0].name).with_suffix(".txt").write_bytes(data)
        sidecar = (at / "in" / pictures[1].name).with_suffix(".json")
        sidecar.write_text(
            json.dumps({"caption": text or "x", "style": text[:99], text[:99]: text})
        )
        run_, shards_ = f"{at}/run", f"{at}/shards"
        every = sets((*ANY_CLIP, 'skip=["dedup"]'))
        say = f" of {name}"
        yield Trial(
            "curate" + say,
            ["curate", f"{at}/in", "-o", run_, *INNER, *every],
            after=lambda at=at: runs(at / "run/report.html"),
        )
        rows = [{"path": str(at / "in" / path.name), "caption": text} for path in pictures]
        listed = at / "captions.jsonl"
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["caption", run_, "--source", "sidecar", "-q"]
        yield Trial(
            "caption --source sidecar" + say,
            given,
            after=lambda at=at: runs(at / "run/report.html"),
        )
        tabled = ["curate", f"{at}/in", "-o", f"{at}/run2", "--captions", str(listed)]
        yield Trial(
            "curate --captions" + say,
            [*tabled, *INNER, *every],
            after=lambda at=at: runs(at / "run2/report.html"),
        )
        if text:
            server.saying = lambda digest, style, text=text: text
            with server.answering() as there:
                asked = ["caption", f"{at}/run2", "--source", "endpoint", "--model", "m"]
                yield Trial(
                    "caption --source endpoint" + say,
                    [*asked, "--url", there.url, "-q"],
                    after=lambda at=at: runs(at / "run2/report.html"),
                )
        for command in ("why", "report"):
            more = [next(iter(sorted((at / "in").glob("*.png")))).as_posix()]
            yield Trial(command + say, [command, run_, *(more if command == "why" else [])])
        yield Trial(
            "tokenize" + say,
            ["tokenize", run_, "-o", shards_, "--area", "2304", *INNER],
            after=lambda at=at: ids_are_text(at / "shards"),
        )
        yield Trial(
            "inspect" + say,
            ["inspect", shards_, "-o", f"{at}/page", "--device", "cpu"],
            after=lambda at=at: runs(at / "page/index.html"),
        )
        yield Trial("train" + say, [*train(shards_), "-o", f"{at}/ckpt"])
        (at / "prompts.jsonl").write_text(json.dumps({"prompt": text or "x"}) + "\n")
        drawn = ["sample", f"{ground.folder}/ckpt", "--prompts", f"{at}/prompts.jsonl"]
        yield Trial("sample --prompts" + say, [*drawn, "-o", f"{at}/drawn", "--device", "cpu"])
        if text and "\0" not in text and len(text) < 100_000:
            drawn = ["sample", f"{ground.folder}/ckpt", text, "-o", f"{at}/drawn2"]
            yield Trial("sample" + say, [*drawn, "--device", "cpu"])


# --- settings ---------------------------------------------------------------------------------

SETTINGS = {
    "lists in lists": "seed=" + "[" * 50_000,
    "tables in tables": "seed=" + "{a=" * 20_000,
    "keys in keys": ".".join("a" * 30_000) + "=1",
    "a huge number": "seed=" + "9" * 50_000,
    "a huge float": "seed=1e999999999",
    "a huge string": "seed=" + "x" * 100_000,
    "words for a number": "seed=evil",
    "a date": "seed=1979-05-27",
    "a list": "seed=[1, 2]",
    "an unknown key": "sede=1",
    "an unknown key of control characters": "\x1b]0;evil\x07\x1b[2J=1",
    "a value of control characters": "seed=\x1b]0;evil\x07\x1b[2J",
    "a line break and another key": "seed=1\nsteps=2",
    "no key": "=1",
    "nothing": "",
    "Python's own names": "__class__.__init__.__globals__=1",
    "not a number": "seed=nan",
    "less than nothing": "seed=-1",
    "a path": "seed=../../../etc/passwd",
}
FILES = {
    "lists in lists": "seed = " + "[" * DEEP,
    "tables in tables": "seed = " + "{a = " * DEEP,
    "keys in keys": ".".join("a" * DEEP) + " = 1",
    "headings in headings": "[" + ".".join("a" * DEEP) + "]",
    "a huge number": "seed = " + "9" * 10**6,
    "a huge string": 'seed = "' + "x" * 10**7 + '"',
    "a key twice": "seed = 1\nseed = 2",
    "a table twice": "[data]\n[data]",
    "a million keys": "".join(f"a{i} = 1\n" for i in range(10**5)),
    "another type": "seed = 'evil'",
    "an unknown key": "sede = 1",
    "control characters": 'seed = "\\u001b]0;evil\\u0007"',
    "control characters in a key": '"\\u001b[2J" = 1',
    "a NUL": "seed = \x00",
    "nothing that is TOML": "<?xml version='1.0'?>",
}


def settings(ground: Ground) -> Iterator[Trial]:
    """Each as --set of each command, and as the file of a recipe; refused, with exit code 2."""
    at = ground.folder
    out = f"{at}/places/none/inner/out"
    commands = {
        "curate": ["curate", f"{at}/in", "-o", out, "-q"],
        "tokenize": ["tokenize", f"{at}/run", "-o", out, "-q"],
        "train": ["train", f"{at}/shards", "-o", out, *CPU],
        "train-tokenizer": ["train-tokenizer", f"{at}/in", "-o", out, *CPU],
        "sample": ["sample", f"{at}/ckpt", "a kite", "-o", out, *CPU],
        "decide": ["decide", f"{at}/run", "-q"],
    }
    for command, arguments in commands.items():
        for name, value in SETTINGS.items():
            # Where 1 is meant as text, others take it: only those of no command are for all.
            yield Trial(f"{command} --set {name}", [*arguments, "--set", value], (2,))
    for number, (name, text) in enumerate(FILES.items()):
        file = at / f"recipe-{number}.toml"
        file.write_text(text)
        for command in ("train", "train-tokenizer"):
            arguments = [*commands[command], "--recipe", str(file)]
            yield Trial(f"{command} --recipe with {name}", arguments, (2,))
        preset = ["curate", f"{at}/in", "-o", out, "-q", "--preset", str(file)]
        yield Trial(f"curate --preset with {name}", preset, (2,))
        words = ["caption", f"{at}/run", "--source", "endpoint", "--model", "m", "-q"]
        words += ["--url", "http://127.0.0.1:9/v1", "--prompt", str(file)]
        yield Trial(f"caption --prompt with {name}", words, (1, 2))


KINDS: dict[str, Callable[[Ground], Iterator[Trial]]] = {
    "tars of media": tars,
    "shards": shards,
    "checkpoints": checkpoints,
    "vision tokenizers": tokenizers,
    "captions": captions,
    "settings": settings,
}


def hostile(folder: Path, only: list[str], every: int = 1) -> list[dict[str, Any]]:
    """A row for each kind; `every` takes only each so-manieth attempt, or caption."""
    ground = Ground(folder, every).make()
    rows = []
    for name, trials in KINDS.items():
        if name in only:
            step = 1 if name == "captions" else every  # what one makes is what the next one takes
            rows.append(ground.attempt(f"hostile {name}", islice(trials(ground), 0, None, step)))
    return rows

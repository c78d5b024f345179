"""Hostile files of weights against `refinedet weights import`.

    python benchmarks/fuzz_importers.py [--inputs 2000] [--seed 0] [--out fuzz]

Small files of every kind that can be imported (narrow networks with the real names) are spoilt: bits turned, cut off,
pieces doubled or exchanged, lengths made huge, and pickles that would run code or ask for memory put in. It is a bug
where reading or recognising one

- raises anything but a RefineDetError, warns, or takes above 1 s of processor time,
- starts a program, makes a socket, or opens a file to write, or makes the process grow by more than 512 MB.

Prints a table; writes the first bug of each kind of file to --out; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from refinedet_cli.errors import RefineDetError
from refinedet_cli.zoo.importers.convert import convert
from refinedet_cli.zoo.importers.weight_file import read_weight_file

LIMIT = 1.0  # seconds of processor time for one input
MEMORY = 512 << 20
ROOT = Path(__file__).resolve().parents[1]
_NARROW = 64
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "os.remove",
    "os.rename",
)


class Sound(NamedTuple):
    """A file before it is spoilt."""

    kind: str
    content: bytes


class Result(NamedTuple):
    """What became of many inputs.

    Attributes:
        counts: inputs of each kind of file.
        outcomes: how they ended, by the class of the error.
        bugs: kind of file, its bytes, and what was wrong.
        slowest: seconds of processor time.
        growth: bytes.
    """

    counts: Counter[str]
    outcomes: Counter[str]
    bugs: list[tuple[str, bytes, str]]
    slowest: float
    growth: int


class Payload:
    """Its pickle makes a file where it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("other_projects", ROOT / path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(content: object, *, archive: bool = True) -> bytes:
    """Have ``torch.save`` write to memory."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def sound_files(target: Path) -> list[Sound]:
    """Make one small file of every kind, and hostile ones that are well-formed; ``target`` is what these would make."""
    other = _load("tests/zoo/other_projects.py")
    states = {
        "luuuyi": other.luuuyi(21, _NARROW), "dd604": other.dd604(21, _NARROW), "lzx": other.lzx(21, _NARROW),
        "dd604 ResNet": other.dd604_resnet(3, _NARROW), "ssd.pytorch": other.ssd(21, _NARROW),
    }  # fmt: skip
    files = [Sound(f"{name}, archive", saved(state)) for name, state in states.items()]
    files += [Sound(f"{name}, legacy", saved(states[name], archive=False)) for name in ("luuuyi", "dd604")]
    files.append(Sound("luuuyi, safetensors", save({n: t.contiguous() for n, t in states["luuuyi"].items()})))
    vgg, resnet = other.caffe_vgg(21, _NARROW), other.caffe_resnet(3, _NARROW)
    files += [
        Sound("Caffe, VGG", other.caffemodel(vgg, "net")),
        Sound("Caffe, VGG, V1, unpacked", other.caffemodel(vgg, "net", form="unpacked", old=True)),
        Sound("Caffe, ResNet", other.caffemodel(resnet, "net")),
    ]
    return [*files, *(Sound("hostile", content) for content in hostile(target))]


def hostile(target: Path) -> Iterator[bytes]:
    """Write files that are whole and mean harm: code, and more memory than they are long."""
    for archive in (True, False):
        yield saved({"vgg.0.weight": Payload(target)}, archive=archive)
        yield saved({"state_dict": {"vgg.0.weight": torch.zeros(1)}, "args": Payload(target)}, archive=archive)
        # A tensor of one number that says it is 40 GB large.
        wide = torch.zeros(1).expand(10**5, 10**5)
        yield saved({"vgg.0.weight": wide, "tcb0.0.weight": wide, "odm_conf.0.weight": wide}, archive=archive)
    yield bytearray_bomb()
    yield compressed(saved({"vgg.0.weight": torch.zeros(50_000_000, dtype=torch.int8)}))
    yield storage_bomb()


def bytearray_bomb() -> bytes:
    """Ask for 100 GB of zeros, by a call that weights_only allows."""
    call = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (10**11).to_bytes(6, "little") + b"\x85R."
    head = b"".join(pickle.dumps(x, 2) for x in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}))
    return head + call + pickle.dumps([], 2)


def compressed(content: bytes) -> bytes:
    """Write an archive again, compressed: 50 MB in a few kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def storage_bomb() -> bytes:
    """Announce a storage of 2 GB in a legacy file of a few hundred bytes."""
    content = saved({"vgg.0.weight": torch.zeros(77_777)}, archive=False)[:700]
    return content.replace(struct.pack("<i", 77_777), struct.pack("<i", 500_000_000))


def spoilt(sound: Sound, others: list[Sound], draw: random.Random) -> bytes:
    """Change a file somewhere; most often in its first or last bytes, where lengths and names are."""
    content = bytearray(sound.content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(_CHANGES)(content, others, draw)
    return bytes(content)


def _place(content: bytearray, draw: random.Random) -> int:
    size = max(1, len(content))
    near = min(size, draw.choice((64, 1024, 16_384)))
    return draw.choice((draw.randrange(near), size - 1 - draw.randrange(near), draw.randrange(size)))


def _turn_bits(content: bytearray, _: list[Sound], draw: random.Random) -> None:
    for _turn in range(draw.choice((1, 2, 8))):
        if content:
            content[_place(content, draw)] ^= 1 << draw.randrange(8)


def _cut(content: bytearray, _: list[Sound], draw: random.Random) -> None:
    del content[_place(content, draw) :]


def _double(content: bytearray, _: list[Sound], draw: random.Random) -> None:
    at = _place(content, draw)
    piece = content[at : at + draw.choice((1, 8, 100, 4000))]
    content[at:at] = piece * draw.choice((1, 2, 50))


def _remove(content: bytearray, _: list[Sound], draw: random.Random) -> None:
    at = _place(content, draw)
    del content[at : at + draw.choice((1, 4, 64, 1000))]


def _huge(content: bytearray, _: list[Sound], draw: random.Random) -> None:
    at = _place(content, draw)
    bomb = draw.choice((
        b"\xff" * 4, b"\xff" * 8, b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07", b"\x7f\xff\xff\xff",
        struct.pack("<q", 1 << 40), struct.pack("<i", -1), b"\x00" * 8,
    ))  # fmt: skip
    content[at : at + len(bomb)] = bomb


def _splice(content: bytearray, others: list[Sound], draw: random.Random) -> None:
    other = draw.choice(others).content
    at, of = _place(content, draw), draw.randrange(len(other))
    content[at : at + 512] = other[of : of + draw.choice((16, 512, 20_000))]


_CHANGES: tuple[Callable[[bytearray, list[Sound], random.Random], None], ...] = (
    _turn_bits, _turn_bits, _cut, _double, _remove, _huge, _huge, _splice,
)  # fmt: skip


class _Watch:
    """An audit hook; Python cannot take it away, so it sleeps between inputs."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.awake = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.awake:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith(_FORBIDDEN):
            self.seen.append(f"{event} {arguments[:1]!r}"[:200])

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.seen, self.awake = [], True
        try:
            yield self.seen
        finally:
            self.awake = False


def judge(path: Path, watch: _Watch) -> tuple[str, str | None, float]:
    """Import one file: how it ended, what was wrong with that, and the processor time."""
    started = time.process_time()
    fault = None
    with watch.watching() as seen:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                convert(read_weight_file(path))
            outcome = "imported"
        except RefineDetError as error:
            outcome = type(error).__name__
            if "\n" in error.message or len(error.message) > 2000:
                fault = f"message of {len(error.message)} characters: {error.message[:200]!r}"
        except BaseException:
            outcome, fault = "crash", traceback.format_exc()
    spent = time.process_time() - started
    if seen:
        fault = f"did what it must not: {seen}"
    elif spent > LIMIT:
        fault = fault or f"took {spent:.2f} s"
    return outcome, fault, spent


def run(inputs: int, seed: int) -> Result:
    """Spoil files and import them, each kind in turn."""
    draw, watch = random.Random(seed), _Watch()
    counts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    bugs: list[tuple[str, bytes, str]] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        target, path = Path(folder) / "owned", Path(folder) / "weights.bin"
        files = sound_files(target)
        for sound in files:  # what is loaded and built once is no growth
            path.write_bytes(sound.content)
            outcome, fault, _ = judge(path, watch)
            fault = "code in the file has run" if target.exists() else fault
            bugs += [(sound.kind, sound.content, fault)] if fault and not fault.startswith("took") else []
            outcomes[outcome] += 1
            counts[sound.kind] += 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(inputs):
            sound = files[number % len(files)]
            content = spoilt(sound, files, draw)
            path.write_bytes(content)
            outcome, fault, spent = judge(path, watch)
            slowest = max(slowest, spent)
            if target.exists():
                fault = "code in the file has run"
                target.unlink()
            bugs += [(sound.kind, content, fault)] if fault else []
            counts[sound.kind] += 1
            outcomes[outcome] += 1
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if growth > MEMORY:
        bugs.append(("all", b"", f"the process grew by {growth / 1e6:.0f} MB"))
    return Result(counts, outcomes, bugs, slowest, growth)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.inputs, options.seed)
    for kind, count in sorted(result.counts.items()):
        print(f"{kind:28}{count:7}  {sum(bug[0] == kind for bug in result.bugs)} bugs")
    print(", ".join(f"{name} {count}" for name, count in result.outcomes.most_common()))
    print(f"slowest {result.slowest:.2f} s of processor time, growth {result.growth / 1e6:.0f} MB")
    for number, (kind, content, fault) in enumerate(result.bugs[:5]):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"importer-{number}.bin").write_bytes(content)
        print(f"\n{kind}: {fault}\nwritten to {options.out / f'importer-{number}.bin'}")
    return 1 if result.bugs else 0


if __name__ == "__main__":
    raise SystemExit(main())

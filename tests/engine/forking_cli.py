"""A process that has everything imported and calls the command line in forks of itself, each with an accident.

It reads calls from stdin, one JSON document a line, and answers each with one. A fork costs little, so that a run can
be killed and resumed many times. Tests start it with `subprocess`; they cannot import it.

An accident is one of

- ``{"do": "SIGKILL", "kind": "replace", "target": "state.pt", "file": 2}``: at a moment of writing a file. Kinds are
  "open", "write" (after half of what is written), "fsync", "replace" (the new file still has its temporary name) and
  "replaced"; ``file`` says which writing of that name is meant. ``do`` may also be "ENOSPC" and the like, which the
  file system then answers, or "SIGINT";
- ``{"do": "SIGINT", "call": "refinedet_cli.engine.train:_Run._optimise", "times": 2, "nth": 3}``: signals as the main
  thread calls something for the nth time;
- ``{"do": "SIGKILL", "after": 0.3}``: a signal after so many seconds;
- ``{"do": "limit", "bytes": 1000}``: no file may grow larger.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from refinedet_cli import files
from refinedet_cli.cli.app import main

TIMEOUT = 200.0


def do(what: str, times: int = 1) -> None:
    """Send a signal to this process, or fail as the file system does."""
    if not what.startswith("SIG"):
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))
    for _ in range(times):
        signal.raise_signal(getattr(signal, what))


class Writing:
    """Watches every file that is written, for one moment of it."""

    def __init__(self, accident: dict[str, Any]) -> None:
        self.accident = accident
        self.target = ""
        self.files = 0
        self.over = False

    def at(self, kind: str) -> bool:
        """Tell whether this is the moment."""
        wanted = self.accident
        return not self.over and (kind, self.target, self.files) == (
            wanted["kind"], wanted["target"], wanted.get("file", 1),
        )  # fmt: skip

    def begins(self, target: str) -> None:
        self.target = target
        self.files += target == self.accident["target"]
        self.act("open")

    def act(self, kind: str) -> None:
        if self.at(kind):
            self.strike()

    def strike(self) -> None:
        # A signal comes once; a disk stays as it is.
        self.over = self.accident["do"].startswith("SIG")
        do(self.accident["do"], self.accident.get("times", 1))

    def install(self) -> None:
        """Put itself between the package and the file system."""
        beside, write, replace, append = (
            files.temporary_beside, files._Recording.write, os.replace, files.append_whole,
        )  # fmt: skip

        def temporary_beside(target: Path) -> Path:
            self.begins(target.name)
            return beside(target)

        def append_whole(path: Path, content: str) -> None:
            self.begins(path.name)
            append(path, content)

        def half_written(file: Any, data: Any) -> int:
            if not self.at("write"):
                return write(file, data)
            half = write(file, memoryview(data)[: len(data) // 2])
            try:
                self.strike()
            except OSError as error:
                file.failure = error
                raise
            return half + write(file, memoryview(data)[half:])

        def replaced(source: Any, target: Any) -> None:
            self.act("replace")
            replace(source, target)
            self.act("replaced")

        files.temporary_beside = temporary_beside
        files._Recording.write = half_written
        os.replace = replaced
        for module in ("refinedet_cli.engine.run_log",):
            importlib.import_module(module).append_whole = append_whole
        os.fsync = lambda handle: self.act("fsync")


def on_call(accident: dict[str, Any]) -> None:
    module, _, dotted = accident["call"].partition(":")
    holder: Any = importlib.import_module(module)
    *path, name = dotted.split(".")
    for part in path:
        holder = getattr(holder, part)
    real, calls = getattr(holder, name), 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == accident.get("nth", 1):
            do(accident["do"], accident.get("times", 1))
        return real(*args, **options)

    setattr(holder, name, called)


def prepare(accident: dict[str, Any]) -> None:
    if accident.get("do") == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (accident["bytes"],) * 2)
    elif "call" in accident:
        on_call(accident)
    elif "kind" in accident:
        Writing(accident).install()


def child(arguments: list[str], accident: dict[str, Any], outputs: list[int]) -> None:
    for number, handle in enumerate(outputs, start=1):
        os.dup2(handle, number)
    # What is to survive here is the end of a process, not of the machine: waiting for the disk proves nothing.
    os.fsync = lambda handle: None
    prepare(accident)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(process: int, accident: dict[str, Any]) -> int:
    started = time.monotonic()
    after = accident.get("after")
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        if elapsed > TIMEOUT or (after is not None and elapsed > after):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if elapsed > TIMEOUT else getattr(signal, accident["do"]))
            after = None
        time.sleep(0.01)


def read_all(handle: int) -> str:
    with os.fdopen(handle, encoding="utf-8") as file:
        return file.read()


def serve() -> None:
    """Answer calls until stdin ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        call = json.loads(line)
        accident = call["accident"] or {}
        # Pipes, which no limit on files holds for; they are read when all is over, and hold as much.
        pipes = [os.pipe() for _ in range(2)]
        process = os.fork()
        if not process:
            try:
                child(call["arguments"], accident, [write for _, write in pipes])
            finally:
                os._exit(99)
        for _, write in pipes:
            os.close(write)
        code = wait(process, accident)
        said = [read_all(read) for read, _ in pipes]
        sys.stdout.write(json.dumps([code, *said]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # Imported before the first fork, so that no fork has to.
    import refinedet_cli.engine.report
    import refinedet_cli.engine.training_session  # noqa: F401

    serve()

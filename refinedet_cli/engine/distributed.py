"""Processes that share the work of one command, as ``torchrun`` starts them: their parts, and how they stay in step."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, distributed, nn

from refinedet_cli.core.backbones import Timm
from refinedet_cli.engine.memory import is_out_of_memory
from refinedet_cli.errors import DeviceError, PartialError, RefineDetError, ToldElsewhere, UsageError

T = TypeVar("T")

# So long a process waits for the others to start, and between steps: the first may be scoring a large data set. That
# another has ended shows at once.
_PATIENCE_AT_START = timedelta(minutes=10)
_PATIENCE = timedelta(days=1)
_TOLD_KEY = "refinedet/told"
# Whether each forward pass begins with the buffers of the first process; torch 2.14 has renamed it.
_SENDS_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(nn.parallel.DistributedDataParallel).parameters
)


@dataclass(frozen=True)
class Shard:
    """The part of one process.

    Attributes:
        rank: of the process, from 0.
        count: processes there are, at least two.
    """

    rank: int
    count: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """Read RANK and WORLD_SIZE; None where the process is alone.

        Raises:
            UsageError: they are no numbers, or do not go together.
        """
        given = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE")}
        if not given["WORLD_SIZE"] or given["WORLD_SIZE"] == "1":
            return None
        if not all(value.isdecimal() for value in given.values()) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise UsageError(
                f"the environment says {shown}", "start with torchrun, which sets both, or unset WORLD_SIZE"
            )
        return cls(int(given["RANK"]), int(given["WORLD_SIZE"]))

    def has(self, block: int) -> bool:
        """Tell whether this process works on a block of pictures."""
        return block % self.count == self.rank

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"


def own_device(device: torch.device, environment: Mapping[str, str]) -> torch.device:
    """Choose among the CUDA devices by LOCAL_RANK, so that the processes of a machine share them evenly."""
    rank = environment.get("LOCAL_RANK", "")
    if device.type != "cuda" or not rank.isdecimal():
        return device
    return torch.device("cuda", int(rank) % torch.cuda.device_count())


class Processes:
    """The processes of a command as one of them sees them; this class is a process that is alone.

    All of them call the same methods in the same order. Each call but those about tensors is also where they learn that
    one of them has failed: all then raise.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
        on_machine: how many of them are on this machine.
    """

    rank = 0
    count = 1
    on_machine = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Choose this process's among the devices of a kind."""
        return device

    def meet(self) -> None:
        """Wait for all."""

    def any(self, flag: bool) -> bool:
        """Tell whether it is so for one of them at least."""
        return flag

    def gather(self, value: T) -> list[T]:
        """Collect what each of them has, in the order of the ranks, for all."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Have the first one make something, for all."""
        return make()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Surround what calls the methods about tensors: who fails here cannot tell the others, who wait for it."""
        yield

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over them; no gradient flows through it."""
        return tensor

    def parallel(self, network: nn.Module) -> nn.Module:
        """Wrap a network, that of the first one, so that ``backward`` gives each of them their mean gradients.

        Parameters that need no gradient are left out; if that changes, wrap anew.
        """
        return network


ALONE = Processes()


class _Told(NamedTuple):
    """A failure as the others hear of it."""

    kind: type[Exception]
    message: str
    hint: str | None
    code: int

    @classmethod
    def of(cls, error: Exception) -> _Told:
        if isinstance(error, RefineDetError):
            # What a more special kind holds beyond its words stays with the process.
            kind = next(kind for kind in type(error).__mro__ if kind.__module__ == RefineDetError.__module__)
            return cls(kind, error.message, error.hint, error.exit_code)
        code = DeviceError.exit_code if is_out_of_memory(error) else 1
        return cls(RuntimeError, f"{type(error).__name__}: {error}", None, code)


class Group(Processes):
    """Two or more processes in contact; made by `join`."""

    def __init__(self, shard: Shard) -> None:
        self.rank, self.count = shard.rank, shard.count
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        self.on_machine = int(local) if local.isdecimal() and local != "0" else shard.count
        self._tensors: Any = None
        self._over = False
        with self._contact("could not be reached"):
            distributed.init_process_group("gloo", timeout=_PATIENCE_AT_START)
            self._words: Any = distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def device(self, device: torch.device) -> torch.device:
        """Choose by LOCAL_RANK.

        Raises:
            DeviceError: processes cannot compute together on devices of this kind.
        """
        if device.type == "mps":
            raise DeviceError("processes cannot share their work on mps", "take --device cpu, or leave torchrun out")
        return own_device(device, os.environ)

    def meet(self) -> None:
        """Wait for all."""
        self._meet(None)

    def any(self, flag: bool) -> bool:
        """Tell whether it is so for one of them at least."""
        return self._meet(None, flag)

    def gather(self, value: T) -> list[T]:
        """Collect what each of them has, in the order of the ranks, for all."""
        self._meet(None)
        return self._gather(value)

    def from_first(self, make: Callable[[], T]) -> T:
        """Have the first one make something, for all."""
        made = [make() if self.first else None]
        self._meet(None)
        with self._contact():
            distributed.broadcast_object_list(made, src=0, group=self._words)
        value: Any = made[0]
        return value  # type: ignore[no-any-return]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Surround what calls the methods about tensors: who fails here cannot tell the others, who wait for it."""
        try:
            with self._contact():
                yield
        except BaseException:
            self._over = True
            raise

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over them; no gradient flows through it."""
        total = tensor.detach().clone()
        with self.computing():
            distributed.all_reduce(total, group=self._group_for(total.device))
        return total

    def parallel(self, network: nn.Module) -> nn.Module:
        """Wrap a network, that of the first one, so that ``backward`` gives each of them their mean gradients."""
        device = next(network.parameters()).device
        present = torch.cuda.device_count() if device.type == "cuda" else self.on_machine
        if self.on_machine > present:
            raise DeviceError(
                f"{self.on_machine} processes on this machine need as many CUDA devices, and it has {present}",
                f"start torchrun with --nproc-per-node {present}",
            )
        # Running statistics are averaged after the step instead.
        options: dict[str, Any] = {"gradient_as_bucket_view": True, _SENDS_BUFFERS: False}
        # Some of timm's have layers that lead to no map that is read.
        options["find_unused_parameters"] = any(isinstance(module, Timm) for module in network.modules())
        with self.computing():
            return nn.parallel.DistributedDataParallel(network, process_group=self._group_for(device), **options)

    def fail(self, error: Exception) -> None:
        """Tell the others, at the next call that they make, that this process has failed.

        Raises:
            RefineDetError: what the first that failed tells; or that another process tells it.
            Exception: ``error``, where it is a bug.
        """
        if not self._over:
            self._meet(error)

    def leave(self) -> None:
        """Wait until all have come to their end, and part."""
        self._meet(None)
        distributed.destroy_process_group()

    def _group_for(self, device: torch.device) -> Any:
        """Make, once, the group that sums tensors of a device; all do so at the same moment."""
        if self._tensors is None:
            self._tensors = distributed.new_group(backend="nccl" if device.type == "cuda" else "gloo")
        return self._tensors

    def _meet(self, error: Exception | None, flag: bool = False) -> bool:
        """Learn whether the flag of any is set; end together if any has failed."""
        state = torch.tensor([error is not None, flag], dtype=torch.int64)
        with self._contact():
            distributed.all_reduce(state, op=distributed.ReduceOp.MAX, group=self._words)
        if state[0]:
            self._end(error)
        return bool(state[1])

    def _end(self, error: Exception | None) -> None:
        heard = self._gather(None if error is None else _Told.of(error))
        self._over = True
        distributed.destroy_process_group()
        rank, told = next((r, t) for r, t in enumerate(heard) if t is not None)
        if error is not None and rank == self.rank and (self.first or not issubclass(told.kind, RefineDetError)):
            raise error
        message = told.message if heard[0] is not None else f"rank {rank}: {told.message}"
        if self.first and issubclass(told.kind, RefineDetError):
            raise told.kind(message, told.hint) from error
        raise ToldElsewhere(message, told.hint, told.code) from error

    def _gather(self, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.count
        with self._contact():
            distributed.all_gather_object(gathered, value, group=self._words)
        return gathered

    @contextmanager
    def _contact(self, what: str = "is gone") -> Iterator[None]:
        """Turn the failure of a connection into the user's words."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if not _is_lost(error):
                raise
            self._over = True
            raise self._lost(what, error) from error

    def _lost(self, what: str, error: Exception) -> RefineDetError:
        # Without the place in the library's source before it, and advice about its logs after it.
        reason = re.sub(r"^\[[^]]*]\s*", "", str(error).strip()).partition("\n")[0].partition(". ")[0]
        message = f"rank {self.rank} of {self.count}: another process of the command {what} ({reason})"
        lost = PartialError(message, "see what ended it; train goes on with --resume, with any number of processes")
        return lost if self._is_to_tell() else ToldElsewhere(message, lost.hint, lost.exit_code)

    def _is_to_tell(self) -> bool:
        """Tell whether this one is the first of those left to say so."""
        try:
            store = distributed.distributed_c10d._get_default_store()
            return bool(store.add(_TOLD_KEY, 1) == 1)
        except (RuntimeError, ValueError):  # the store was with the process that is gone
            return True


def _is_lost(error: Exception) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextmanager
def join() -> Iterator[Processes]:
    """Get in contact with the other processes of a command, if the environment tells of any.

    A failure inside the block of one of them ends all with the same exit code: one tells what went wrong, the others
    raise `ToldElsewhere`. If one disappears, the others raise a `PartialError`.

    Raises:
        UsageError: the environment does not say where to find the others.
    """
    shard = Shard.from_environment(os.environ)
    if shard is None:
        yield ALONE
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"the environment says that this is {shard}, and {missing[0]} is missing",
            "start with torchrun, which sets it, or unset WORLD_SIZE",
        )
    if not distributed.is_available():
        raise DeviceError("this PyTorch cannot connect processes", "leave torchrun out")
    group = Group(shard)
    try:
        yield group
        group.leave()
    except Exception as error:
        group.fail(error)
        raise

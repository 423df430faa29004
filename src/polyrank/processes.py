"""Several processes of one run: how they come together, and what all of them know before one of them acts on it.

A launcher (torchrun, accelerate launch, Slurm) starts the same command several times and says in the environment who
is who. The first process writes the run folder and speaks; an error of one of them is an error of all, so that none is
left waiting. In a step they wait for each other for less than a minute, so that a process that was killed ends the
others; while one downloads, factorises or writes, the others have patience.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
from accelerate import Accelerator
from torch import distributed as dist

IN_A_STEP = timedelta(seconds=45)  # what one process may be ahead of another
PATIENCE = timedelta(hours=2)  # what one process may do alone
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")

T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """Another process met an error; the message is its own."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"process {rank}: {text}")
        self.rank = rank


class ProcessLost(RuntimeError):
    """Another process ended, or did not answer in time."""


def launched() -> int:
    """How many processes this one was started with, itself included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the first of those that it was launched with, which shows what there is to show."""
    return os.environ.get("RANK", "0") == "0"


def join() -> None:
    """Meet the others that this process was launched with; nothing where it is alone, or they have met already."""
    if launched() == 1 or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=IN_A_STEP)


def accelerator(**options: Any) -> Accelerator:
    """accelerate's view of this process; of several without a GPU it wants to be told so."""
    join()
    return Accelerator(cpu=launched() > 1 and not torch.accelerator.is_available(), **options)


@contextmanager
def telling_loss() -> Iterator[None]:
    """An exchange that failed because another process is gone says so.

    Raises:
        ProcessLost: in the place of what the library said.
    """
    try:
        yield
    except RuntimeError as error:
        told = isinstance(error, ProcessLost | ProcessFailed | torch.OutOfMemoryError)
        if told or not (isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)):
            raise
        raise ProcessLost(
            f"another process of this run ended, or did not answer within {IN_A_STEP.seconds} s: its own message says "
            "why. The checkpoints are whole: start all processes again with --resume"
        ) from error


@final
class Together:
    """The processes of a run, and what they agree on. Making one is a meeting of all of them."""

    def __init__(self) -> None:
        met = dist.is_available() and dist.is_initialized()
        self.count, self.rank = (dist.get_world_size(), dist.get_rank()) if met else (1, 0)
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def texts(self, own: str) -> list[str]:
        """What each process has to say; nothing is sent but its length where all are silent."""
        if self.group is None:
            return [own]
        data = torch.tensor([*own.encode()], dtype=torch.uint8)
        sizes = torch.zeros(self.count, dtype=torch.long)
        sizes[self.rank] = len(data)
        with telling_loss():
            dist.all_reduce(sizes, group=self.group)
            if not sizes.any():
                return [""] * self.count
            padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            padded[: len(data)] = data
            parts = [torch.zeros_like(padded) for _ in range(self.count)]
            dist.all_gather(parts, padded, group=self.group)
        return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes.tolist(), strict=True)]

    def of_first(self, own: str) -> str:
        """What the first process has to say."""
        return self.texts(own if self.first else "")[0]

    def check_same(self, what: str, own: str) -> None:
        """
        Raises:
            ValueError: it is not the same everywhere.
        """
        texts = self.texts(own)
        odd = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
        if odd is not None:
            raise ValueError(
                f"process {odd} has {what} other than the first process: give every machine the same files and "
                "packages, and a run folder that all of them see"
            )

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """All processes leave the block together; not to be nested.

        Raises:
            ProcessFailed: another process met an error in it.
            ProcessLost: another process is gone.
        """
        try:
            yield
        except ProcessLost:
            raise
        except BaseException as error:
            self.texts(str(error) or type(error).__name__)
            raise
        failed = [(rank, text) for rank, text in enumerate(self.texts("")) if text]
        if failed:
            raise ProcessFailed(*failed[0])

    def first_then_others(self, work: Callable[[], T]) -> T:
        """``work`` on the first process of each machine, then on the others: they find what it downloaded and cached.

        Raises:
            ProcessFailed, ProcessLost: as ``sharing_errors``.
        """
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        found: list[T] = []
        for turn in (True, False) if self.count > 1 else (first_here,):
            with self.sharing_errors():
                if first_here is turn:
                    found.append(work())
        return found[0]

    def in_turns(self, work: Callable[[], T]) -> T:
        """``work`` on one process of each machine after the other: what takes all of its memory for a while.

        Raises:
            ProcessFailed, ProcessLost: as ``sharing_errors``.
        """
        here, most = (os.environ.get(name, "0") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        found: list[T] = []
        for turn in range(max(1, *(int(size) for size in self.texts(most)))):
            with self.sharing_errors():
                if turn == int(here):
                    found.append(work())
        return found[0]


@contextmanager
def joined() -> Iterator[Together]:
    """The processes of a command: they meet, and part when all have done their work."""
    join()
    yield Together()
    if launched() > 1:  # after an error there is nobody to wait for
        dist.destroy_process_group()

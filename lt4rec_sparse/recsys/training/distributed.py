"""Several processes train one model, each on its part of every batch: what `torchrun` starts.

The first process leads: it alone prepares data, searches masks, reads and writes the run folder. What it calls
`together`, a training or an evaluation, every process carries out at once, on the same objects: they are sent with the
call. So all start from the first one's weights and masks, and take the same steps.

Inside such a call `current()` are all processes, elsewhere this one alone, and their sums are then no work: a training
says once what it does, for one process or many.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
STEP = timedelta(minutes=30)  # after so long without an answer a process counts as lost
CALL = timedelta(days=365)  # for the next call a process waits longer: preparing a log may take hours


@dataclass(frozen=True)
class Ranks:
    """The processes that carry out a call: how many there are, and which one this is.

    Every method that communicates must be called by all of them in the same order. Sums are the same bits in each.
    """

    rank: int = 0
    size: int = 1
    calls: Any = None  # torch's group in which they wait for calls

    @property
    def leads(self) -> bool:
        """Whether this process is the first, which alone touches files."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """Return the rows that are this process's, `[n]` of `[rows]`; none if there are fewer rows than processes."""
        return rows[self.rank :: self.size]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each dense tensor by its sum over the processes."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def total(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of each loss over the processes, each a scalar, with the gradient of this process's term.

        So the sum over the processes of what `backward` leaves at a model's parameters is the gradient of the whole.
        What else depends on the sums, such as weights of the losses, has its whole gradient in each process.
        """
        if self.size == 1 or not losses:
            return dict(losses)
        sums = torch.stack([loss.detach() for loss in losses.values()])
        self.sum_([sums])
        # A term minus itself is 0: the value has the same bits in every process.
        return {name: whole + (loss - loss.detach()) for (name, loss), whole in zip(losses.items(), sums, strict=True)}

    def sum_gradients(self, model: nn.Module) -> None:
        """Replace the gradient of each of a model's parameters by its sum over the processes.

        A parameter has one if it has one in any process: a part of a batch may hold no value of some bag, say. A sparse
        gradient then names the rows that any process names.
        """
        if self.size == 1:
            return
        parameters = list(model.parameters())
        found = torch.zeros(2, len(parameters), dtype=torch.int64)  # how many have a dense one, and a sparse one
        for place, parameter in enumerate(parameters):
            if parameter.grad is not None:
                found[int(parameter.grad.is_sparse), place] = 1
        self.sum_([found])
        dense, sparse = ([p for p, n in zip(parameters, of, strict=True) if n] for of in found.tolist())
        for parameter in dense:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_([parameter.grad for parameter in dense if parameter.grad is not None])
        for parameter in sparse:
            if parameter.grad is None:
                nothing = torch.zeros(1, 0, dtype=torch.int64), parameter.new_zeros(0, *parameter.shape[1:])
                parameter.grad = torch.sparse_coo_tensor(*nothing, parameter.shape, check_invariants=False)
            parameter.grad = self._sum_of_rows(parameter.grad.coalesce())

    def _sum_of_rows(self, gradient: Tensor) -> Tensor:
        """Return the sum of coalesced gradients `[rows, dim]`: entries in the order of the processes."""
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = gradient.values().shape[0]
        self.sum_([counts])
        end = int(counts[: self.rank + 1].sum())
        indices = gradient.indices().new_zeros(gradient.sparse_dim(), int(counts.sum()))
        values = gradient.values().new_zeros(int(counts.sum()), *gradient.values().shape[1:])
        own = slice(end - int(counts[self.rank]), end)
        indices[:, own], values[own] = gradient.indices(), gradient.values()
        self.sum_([indices, values])  # each entry is one process's: a sum with zeros gathers them
        return torch.sparse_coo_tensor(indices, values, gradient.shape, check_invariants=False).coalesce()

    def add(self, number: float) -> float:
        """Return the sum of a number over the processes."""
        numbers = torch.tensor([number], dtype=torch.float64)
        self.sum_([numbers])
        return numbers.item()

    def first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in the first process, which alone calls it."""
        found: Any = make() if self.leads else None
        result: T = found if self.size == 1 else self.sent(found)
        return result

    def sent(self, value: Any, is_call: bool = False) -> Any:
        """Return the first process's value in every process; a call may be long in coming."""
        values = [value]
        dist.broadcast_object_list(values, 0, self.calls if is_call else None)
        return values[0]

    def check_equal(self, model: nn.Module) -> None:
        """Refuse to go on with weights or masks that are not the same bits in every process.

        Raises:
            RuntimeError: If they differ, as they may on processors of different kinds.
        """
        if self.size == 1:
            return
        state = hashlib.blake2b(digest_size=7)  # exact as an int64
        for value in model.state_dict().values():
            state.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
        found = torch.zeros(self.size, dtype=torch.int64)
        found[self.rank] = int.from_bytes(state.digest(), "little")
        self.sum_([found])
        others = (found != found[0]).nonzero().flatten().tolist()
        if others:
            raise RuntimeError(f"weights: got other ones in process {others[0]} than in process 0, wanted equal ones")


ALONE = Ranks()
_joined: ContextVar[Ranks] = ContextVar("joined", default=ALONE)
_current: ContextVar[Ranks] = ContextVar("current", default=ALONE)


def joined() -> Ranks:
    """Return all processes that were started together."""
    return _joined.get()


def current() -> Ranks:
    """Return the processes that carry out the present call."""
    return _current.get()


def is_apart() -> bool:
    """Return whether `torchrun` started this process beside others that it has not joined, as it does in `led`."""
    return joined().size == 1 and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def together(function: Callable[..., T], /, *arguments: Any, **named: Any) -> T:
    """Call a function in every process at once, with copies of the arguments in all but the first; return the result.

    The function and its arguments can be pickled. Inside such a call, or in a process alone, it is an ordinary call.
    """
    ranks = joined()
    if ranks.size == 1 or current() is ranks:
        return function(*arguments, **named)
    ranks.sent((function, arguments, named), is_call=True)
    with _set(_current, ranks):
        try:
            return function(*arguments, **named)
        except BaseException:
            _joined.set(ALONE)  # the others fail in this call too, or wait in it: they hear of no other
            raise


def led(call: Callable[[], T]) -> T | None:
    """Make a call in the first of the processes that `torchrun` started; the others join in what it calls `together`.

    Returns:
        The result; None in the other processes, once the first one is done. A process that was not started by
        `torchrun`, or is the only one, just calls.

    Raises:
        Whatever the call raises. The other processes then return None, or end with an error if one of the calls that
        they joined in failed.
    """
    if not is_apart():
        return call()
    known, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = _store(known, leads=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=STEP)
    try:
        return _shared(call, Ranks(rank, size, dist.new_group(timeout=CALL)))
    finally:
        dist.destroy_process_group()


def _shared(call: Callable[[], T], ranks: Ranks) -> T | None:
    with _set(_joined, ranks):
        if ranks.leads:
            try:
                return call()
            finally:
                if joined() is ranks:  # no call has failed: the others wait for the next one
                    ranks.sent(None, is_call=True)
        with _set(_current, ranks):
            while (received := ranks.sent(None, is_call=True)) is not None:
                function, arguments, named = received
                function(*arguments, **named)
        return None


_COUNT = itertools.count()


def _store(known: Any, leads: bool) -> Any:
    """Return a store of these processes alone, for this time.

    The one that `torchrun` gives outlives a restart: it holds the addresses of processes that have died, and whoever
    asks early would wait for one of them.
    """
    host = os.environ["MASTER_ADDR"]  # of the first process, by torchrun's contract
    connect: Any = dist.TCPStore  # type: ignore[attr-defined]
    key = f"port of time {next(_COUNT)}"
    if leads:
        own = connect(host, 0, is_master=True, wait_for_workers=False, timeout=STEP)
        known.set(key, str(own.port))
        return own
    while True:
        try:
            own = connect(host, int(known.get(key)), is_master=False, timeout=timedelta(seconds=2))
        except dist.DistNetworkError:  # the port of a process that has died
            continue
        own.set_timeout(STEP)
        return own


@contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)

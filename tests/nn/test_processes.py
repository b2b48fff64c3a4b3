"""A frozen module in other processes: forked, spawned, in DataLoader's workers, and called from several threads."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import assert_exact
from torch.utils.data import DataLoader, Dataset

from lt4rec_sparse import MaskedMLP, SparseMLP, freeze
from lt4rec_sparse.kernels import cpu

needs_engine = pytest.mark.skipif(not cpu.is_available(), reason=f"no native engine: {cpu.absence_reason()}")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def large_enough_for_threads() -> tuple[SparseMLP, torch.Tensor]:
    torch.manual_seed(0)
    mlp = freeze(MaskedMLP(128, (128, 64)))
    return mlp, torch.randn(2048, 128)


def scored(mlp: SparseMLP, x: torch.Tensor, queue: multiprocessing.Queue) -> None:
    queue.put(mlp(x).numpy())


# Python 3.12 and newer warn of a fork in a process with threads: that is the case at hand.
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@forks
@needs_engine
def test_a_forked_child_computes_with_one_thread(two_threads):
    mlp, x = large_enough_for_threads()
    wanted = mlp(x)  # from here on the process has threads
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            y = mlp(x)
            status = 0 if bool((y.numpy() == wanted.numpy()).all()) else 2  # torch.equal has threads of its own
        finally:
            os.write(writing, bytes([status]))
            os._exit(status)
    os.close(writing)
    assert os.read(reading, 1) == b"\0"
    os.close(reading)
    os.waitpid(child, 0)
    assert_exact(mlp(x), wanted)  # the parent as before


def test_a_spawned_child_computes_the_same():
    mlp, x = large_enough_for_threads()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=scored, args=(mlp, x[:64], queue))
    child.start()
    y = torch.from_numpy(queue.get(timeout=120))
    child.join()
    assert_exact(y, mlp(x[:64]))


class Scores(Dataset):
    def __init__(self, mlp: SparseMLP, x: torch.Tensor) -> None:
        self.mlp, self.x = mlp, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.mlp(self.x[index])


@forks
def test_workers_of_a_data_loader_call_it(two_threads):
    mlp, x = large_enough_for_threads()
    mlp(x)
    loader = DataLoader(Scores(mlp, x[:8]), batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert_exact(torch.cat(list(loader)), torch.stack([mlp(row) for row in x[:8]]))


def test_threads_share_one_module():
    mlp, x = large_enough_for_threads()
    sizes = [1, 7, 64, 300, 1, 2048] * 4
    with ThreadPoolExecutor(4) as pool:  # layouts are prepacked while others are in use
        results = list(pool.map(lambda rows: mlp(x[:rows]), sizes))
    for rows, y in zip(sizes, results, strict=True):
        assert_exact(y, mlp(x[:rows]))

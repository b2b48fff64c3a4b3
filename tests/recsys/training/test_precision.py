"""Training computes in bfloat16 only where that was measured to be faster."""

import pytest
import torch

from lt4rec_sparse.recsys.training import fastest_dtype, precision
from lt4rec_sparse.stopwatch import Timing


@pytest.mark.parametrize(("float32", "bfloat16", "wanted"), [(1.0, 8.0, "float32"), (2.0, 1.0, "bfloat16")])
def test_the_faster_one_is_taken(monkeypatch, float32, bfloat16, wanted):
    times = {"float32": Timing(float32, float32, float32), "bfloat16": Timing(bfloat16, bfloat16, bfloat16)}
    monkeypatch.setattr(precision, "interleaved", lambda calls, **rest: {name: times[name] for name in calls})
    assert fastest_dtype() == wanted


def test_it_is_measured_in_one_thread_and_leaves_the_number_of_threads():
    threads = torch.get_num_threads()
    assert fastest_dtype() in ("float32", "bfloat16")
    assert torch.get_num_threads() == threads

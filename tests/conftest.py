"""Settings for all tests: replayable examples, no deadline (a first call may compile or page in)."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads: workers share the cores between them

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels are interpreted. Triton reads this when a kernel is defined: set it before all else.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
else:
    os.environ["TRITON_INTERPRET"] = "1"

# A plain `pytest` draws fewer examples; the check asks for all: `--hypothesis-profile=thorough`.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.register_profile("thorough", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill `torch.empty` with NaN, so that a result that was never written cannot pass for zero."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


collect_ignore = ["serve/kserve_client.py"]  # it runs in another environment
# Registered in pyproject.toml; each implies `heavy`.
HEAVY = (
    "ahead_of_time",
    "bench_short",
    "c_library",
    "emulated",
    "end_to_end",
    "gpu_rehearsal",
    "neon",
    "packaging",
    "sanitizers",
    "triton36",
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.get_closest_marker(name) for name in HEAVY):
            item.add_marker("heavy")


def pytest_configure() -> None:
    if os.environ.get("LT4REC_SPARSE_REQUIRE_NATIVE") == "1":
        from lt4rec_sparse.kernels import cpu

        assert cpu.is_available(), cpu.absence_reason()


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """A small simulated click log: a folder like a user's."""
    from lt4rec_sparse.recsys.data import SimulatorConfig, simulate

    folder = tmp_path_factory.mktemp("small") / "log"
    simulate(SimulatorConfig(users=300, videos=120, impressions=9_000, days=6), folder)
    return folder


@pytest.fixture(scope="session")
def small_log(small_folder, tmp_path_factory):
    """The same, prepared."""
    from lt4rec_sparse.recsys.data import prepare

    return prepare(small_folder, tmp_path_factory.mktemp("small_prepared") / "out")

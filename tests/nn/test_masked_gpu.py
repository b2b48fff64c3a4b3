"""Masked modules down to the Triton kernels: on a GPU, or interpreted, standing in for the kernels of the CPU.

Values are whole numbers so small that 16 bits hold every result. The wanted result is that of the same module in
float64, which takes the reference on every device. 16 bits are bfloat16 on a GPU, since float16 runs the same code,
and float16 elsewhere: the interpreter's product of bfloat16 is wrong.
"""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from oracle import assert_exact, small_integers

from lt4rec_sparse import MaskedLinear, MaskedMLP, ops
from lt4rec_sparse.masks import pack_words
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.ops.masked_linear import _on_gpu

pytest.importorskip("triton", reason="Triton is not installed")

from lt4rec_sparse.kernels.gpu import masked_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
OPS = ("masked_linear", "masked_linear_dgrad", "masked_linear_wgrad")
TASKS = {1: ("ctr",), 2: ("ctr", "cvr"), 3: ("a", "b", "c")}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Let the CPU run what a GPU runs, from the same packed masks; a GPU does so by itself."""
    if DEVICE.type == "cuda":
        yield
        return
    monkeypatch.setattr(MaskedLinear, "_planes", lambda layer: layer.mask_words)
    library = torch.library.Library("lt4rec_sparse", "IMPL")
    for name in OPS:
        library.impl(name, _on_gpu(name), "CPU")
    yield
    library._destroy()
    assert not any(torch._C._dispatch_has_kernel_for_dispatch_key(f"lt4rec_sparse::{name}", "CPU") for name in OPS)


@pytest.fixture(autouse=True)
def sums_in_float32():
    """Keep cuBLAS from adding the parts of a sum in 16 bits, as torch allows by default: that breaks every bound."""
    matmul = torch.backends.cuda.matmul
    settings = [f"allow_{name}_reduced_precision_reduction" for name in ("bf16", "fp16")]
    before = [getattr(matmul, setting) for setting in settings]
    for setting in settings:
        setattr(matmul, setting, False)
    yield
    for setting, value in zip(settings, before, strict=True):
        setattr(matmul, setting, value)


@pytest.fixture(params=masked_linear.PATHS)
def path(request):
    with masked_linear.forced_path(request.param):
        yield request.param


def network(tasks=("ctr", "cvr"), dtype=torch.float32, seed=0) -> MaskedMLP:
    """An MLP of -1, 0 and 1, with a random mask per task."""
    generator = torch.Generator().manual_seed(seed)
    mlp = MaskedMLP(21, hidden=(18, 5), tasks=tasks)
    for parameter in mlp.parameters():
        parameter.data = small_integers(*parameter.shape, generator=generator).clamp(-1, 1)
    for layer in mlp.masked_layers():
        for task in tasks:
            layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.4, task)
    return mlp.to(DEVICE, dtype)


def batch(rows=17, dtype=torch.float32, seed=1):
    return small_integers(rows, 21, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1).to(DEVICE, dtype)


def run(module, x, *arguments, **keywords):
    """Call the module and its backward pass; return the result and every gradient, None where there is none."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x, *arguments, **keywords)
    dy = small_integers(*y.shape, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    y.backward(dy.to(y))
    return {"y": y, "x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(ours, wanted):
    """Fail unless a run is exactly that of the float64 module, rounded to its dtypes."""
    assert [name for name, t in ours.items() if t is None] == [name for name, t in wanted.items() if t is None]
    for name, t in ours.items():
        if t is not None:
            assert_exact(t, wanted[name].to(t.dtype))


def reference(module, x, *arguments, **keywords):
    return run(copy.deepcopy(module).double(), x.double(), *arguments, **keywords)


@pytest.mark.parametrize("tasks", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_all_tasks_are_exact(tasks, path, dtype):
    mlp, x = network(tasks, dtype), batch(dtype=dtype)
    assert_same(run(mlp, x), reference(mlp, x))


@pytest.mark.parametrize("rows", [0, 1, 17])
def test_one_task_is_exact(path, rows):
    mlp, x = network(), batch(rows)
    assert_same(run(mlp, x, "cvr"), reference(mlp, x, "cvr"))


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_layer_takes_any_leading_dimensions(activation, path):
    layer, x = network().masked_layers()[0], batch(12).view(2, 6, 21)
    assert_same(run(layer, x, "ctr", activation), reference(layer, x, "ctr", activation))


def test_modules_run_the_kernels_and_float64_the_reference(monkeypatch):
    called = []
    for name in OPS:
        kernel = getattr(masked_linear, name)
        monkeypatch.setattr(
            masked_linear, name, lambda *parts, name=name, kernel=kernel: called.append(name) or kernel(*parts)
        )
    mlp, x = network(), batch()
    reference(mlp, x)
    assert called == []
    run(mlp, x)
    # Every layer once for both tasks, and back in the other order.
    assert called == [OPS[0]] * 2 + [OPS[1], OPS[2]] * 2


def test_a_forced_path_holds_in_the_backward_pass(monkeypatch):
    choose, paths = masked_linear._path, []
    monkeypatch.setattr(masked_linear, "_path", lambda *shape: paths.append(choose(*shape)) or paths[-1])
    y = network()(batch()).sum()
    other = ({*masked_linear.PATHS} - {*paths}).pop()
    paths.clear()
    with masked_linear.forced_path(other):
        thread = threading.Thread(target=y.backward)  # as autograd runs that of a GPU
        thread.start()
        thread.join()
    assert set(paths) == {other}


@pytest.mark.parametrize("strided", ["masks", "words", "bias"])
def test_masks_and_biases_may_be_strided(strided, path):
    layer = network(("a", "b", "c")).masked_layers()[0]
    x, weight, bias, masks = batch(), layer.weight.detach(), layer.bias.detach(), layer.masks[::2]
    parts = {"masks": masks, "words": pack_words(layer.masks)[::2], "bias": bias.repeat_interleave(2)[::2]}
    assert not parts[strided].is_contiguous()
    wanted = torch.stack([torch.nn.functional.linear(x, weight * mask, bias) for mask in masks])
    planes = parts["words"] if strided == "words" else masks
    assert_exact(ops.masked_linear(x, weight, planes, parts["bias"] if strided == "bias" else bias), wanted)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs masks on a GPU; tests/nn/test_masked.py stands in for one")
def test_masks_written_in_place_are_packed_again():
    mlp, x = network(), batch()
    run(mlp, x)
    for layer in mlp.masked_layers():
        layer.masks.logical_not_()
    assert_same(run(mlp, x), reference(mlp, x))
    assert all(torch.equal(layer.mask_words, pack_words(layer.masks)) for layer in mlp.masked_layers())


@pytest.mark.heavy
@pytest.mark.parametrize(("tasks", "kind"), [(1, pack_words), (2, lambda masks: masks)], ids=["words", "two-tasks"])
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "apart"])
def test_opcheck(tasks, kind, is_shared, path):
    layer = network().masked_layers()[0]
    masks = kind(layer.masks[:tasks])
    x = batch(9)[None].repeat(1 if is_shared else tasks, 1, 1)
    dy = torch.ones(tasks, 9, 18, device=DEVICE)
    weight, door = layer.weight.detach(), torch.ops.lt4rec_sparse
    torch.library.opcheck(door.masked_linear, (x.clone().requires_grad_(), layer.weight, masks, layer.bias, "relu"))
    torch.library.opcheck(door.masked_linear_dgrad, (dy, weight, masks, is_shared))
    torch.library.opcheck(door.masked_linear_wgrad, (dy, x, masks, torch.float32))


def test_compiled_it_is_exact(path):
    mlp = network()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (9, 6):
        x = batch(rows)
        with torch.compiler.set_stance("default" if rows == 9 else "fail_on_recompile"):
            ours = run(compiled, x)
        assert_same({name.removeprefix("_orig_mod."): t for name, t in ours.items()}, reference(mlp, x))


@pytest.mark.parametrize("dtype", dict.fromkeys((HALF, torch.float16)))
def test_autocast_is_exact_and_leaves_the_gradients_in_float32(dtype, path):
    mlp, x = network(), batch()
    with torch.autocast(DEVICE.type, dtype=dtype):
        ours = run(mlp, x)
    assert ours["y"].dtype == dtype
    assert ours["layers.0.weight"].dtype == torch.float32
    assert_same(ours, reference(mlp, x))


def test_a_training_step_is_that_of_the_reference(path):
    mlp = network()
    twin = copy.deepcopy(mlp)
    start = copy.deepcopy(mlp)
    x = batch()
    for module in (mlp, twin):
        optimiser = MaskedAdam(module, learning_rate=0.1)
        gradients = (run if module is mlp else reference)(module, x, "ctr")
        for name, parameter in module.named_parameters():
            parameter.grad = None if gradients[name] is None else gradients[name].float()
        optimiser.step("ctr")
    for (name, ours), wanted in zip(mlp.named_parameters(), twin.parameters(), strict=True):
        assert_exact(ours, wanted)
        assert torch.equal(ours, start.get_parameter(name)) == name.startswith("heads.cvr")
    for layer, before in zip(mlp.masked_layers(), start.masked_layers(), strict=True):
        assert_exact(layer.weight[~layer.mask("ctr")], before.weight[~layer.mask("ctr")])


RANK = """
import inspect
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank, folder, device = int(sys.argv[1]), sys.argv[2], sys.argv[3]
mlp, x = torch.load(f"{folder}/start.pt", weights_only=False)
dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), rank=rank, world_size=2)
mlp = mlp.to(device)
first = mlp.layers[0].masks
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:  # from torch 2.13 on
    option = "forward_sync_buffers"
    if rank == 1:
        first.logical_not_()
else:
    option = "broadcast_buffers"
parallel = DistributedDataParallel(mlp, find_unused_parameters=True, **{option: False})
torch.save(first.cpu(), f"{folder}/masks{rank}.pt")
first[0, 0, 0] = rank == 1
with torch.no_grad():
    parallel(x.to(device))
assert first[0, 0, 0] == (rank == 1), "masks were sent with a forward pass"
first.copy_(torch.load(f"{folder}/masks{rank}.pt"))
steps = []
for task in ("ctr", "cvr", "ctr"):
    parallel.zero_grad()
    parallel(x[rank::2].to(device), task).sum().backward()
    steps.append({name: None if p.grad is None else p.grad.cpu() for name, p in mlp.named_parameters()})
torch.save(steps, f"{folder}/steps{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.heavy
def test_two_processes_have_the_masks_and_gradients_of_one(tmp_path):
    mlp, x = network().cpu(), batch(18).cpu()
    torch.save((mlp, x), tmp_path / "start.pt")
    # In processes of their own: a process group that ends in this one may wait for its threads for ever.
    ranks = []
    try:
        for rank in ("0", "1"):
            # On a machine with a GPU the versions are not ours to choose, nor are their warnings.
            warnings = [] if DEVICE.type == "cuda" else ["-W", "error"]
            command = [sys.executable, *warnings, "-c", RANK, rank, str(tmp_path), DEVICE.type]
            ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
    for rank in (0, 1):  # those of the first process, which only the construction sends
        assert torch.equal(torch.load(tmp_path / f"masks{rank}.pt"), mlp.layers[0].masks)
    first, second = (torch.load(tmp_path / f"steps{rank}.pt") for rank in (0, 1))
    for task, ours, others in zip(("ctr", "cvr", "ctr"), first, second, strict=True):
        mlp.zero_grad()
        mlp.double()(x.double(), task).sum().backward()
        for name, parameter in mlp.named_parameters():
            assert (parameter.grad is None) == (ours[name] is None) == (others[name] is None), name
            if parameter.grad is not None:
                assert_exact(ours[name] * 2, parameter.grad.float())  # the mean of two ranks
                assert_exact(others[name], ours[name])

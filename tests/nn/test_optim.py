"""A step for one task moves only what the task owns, and moves it as a plain Adam would."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt4rec_sparse import MaskedLinear, MaskedMLP, mask_linears
from lt4rec_sparse.masks import Mask
from lt4rec_sparse.nn.optim import MaskedAdam

TASKS = ("ctr", "cvr")


def masked_mlp(seed: int, density: float = 0.5) -> MaskedMLP:
    torch.manual_seed(seed)
    mlp = MaskedMLP(5, hidden=(4, 3), tasks=TASKS)
    generator = torch.Generator().manual_seed(seed)
    for task in TASKS:
        shapes = mlp.mask(task).shapes
        mlp.set_mask(Mask.random(shapes, {n: round(r * c * density) for n, (r, c) in shapes.items()}, generator), task)
    return mlp


def step(mlp: MaskedMLP, optimizer: MaskedAdam, task: str, generator: torch.Generator) -> None:
    x = torch.randn(6, 5, generator=generator)
    optimizer.zero_grad()
    mlp(x, task).square().sum().backward()
    optimizer.step(task)


@given(
    seed=st.integers(0, 2**31),
    order=st.lists(st.sampled_from(TASKS), min_size=1, max_size=8),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_weights_outside_the_mask_keep_every_bit(seed, order, decay):
    mlp = masked_mlp(seed)
    # -0.0 is the weight that a plain `w += 0` would change.
    mlp.layers[0].weight.data[0] = -0.0
    optimizer = MaskedAdam(mlp, learning_rate=0.1, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    for task in order:
        before = {name: w.detach().clone().view(torch.int32) for name, w in mlp.masked_weights().items()}
        heads = {t: head.weight.detach().clone() for t, head in mlp.heads.items()}
        step(mlp, optimizer, task, generator)
        kept = mlp.mask(task)
        for name, weight in mlp.masked_weights().items():
            assert torch.equal(weight.detach().view(torch.int32)[~kept[name]], before[name][~kept[name]])
        for other, head in heads.items():
            assert other == task or torch.equal(mlp.heads[other].weight, head)


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 4), decay=st.sampled_from([0.0, 0.1]))
def test_pruned_weights_of_the_only_task_keep_every_bit(seed, steps, decay):
    """Without decay the plain step passes over them: it must subtract zero, from -0.0 and NaN too."""
    torch.manual_seed(seed)
    mlp = MaskedMLP(5, hidden=(4, 3))
    generator = torch.Generator().manual_seed(seed)
    shapes = mlp.mask().shapes
    mlp.set_mask(Mask.random(shapes, {n: r * c // 2 for n, (r, c) in shapes.items()}, generator))
    for name, weight in mlp.masked_weights().items():
        pruned = (~mlp.mask()[name]).nonzero()
        weight.data[tuple(pruned[0])], weight.data[tuple(pruned[1])] = -0.0, math.nan
    before = {name: w.detach().clone().view(torch.int32) for name, w in mlp.masked_weights().items()}
    optimizer = MaskedAdam(mlp, learning_rate=0.1, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        mlp(torch.randn(6, 5, generator=generator)).square().sum().backward()
        optimizer.step()
    for name, weight in mlp.masked_weights().items():
        kept = mlp.mask()[name]
        assert torch.equal(weight.detach().view(torch.int32)[~kept], before[name][~kept])


def test_the_only_tasks_plain_step_is_the_gathered_one():
    """A decay too small to change anything takes the other way; both end bit for bit alike, through remasks too."""
    results = []
    for own_decay in (1e-30, 0.0):
        torch.manual_seed(1)
        mlp = MaskedMLP(40, hidden=(16,))
        generator = torch.Generator().manual_seed(2)
        optimizer = MaskedAdam(mlp, 0.01, weight_decay=own_decay)
        for kept in (640, 400, 200):
            mlp.set_mask(Mask.random({"layers.0": (16, 40)}, {"layers.0": kept}, generator))
            optimizer.remask()
            for _ in range(3):
                optimizer.zero_grad()
                mlp(torch.randn(6, 40, generator=generator)).square().sum().backward()
                optimizer.step()
        results.append([p.detach().clone() for p in mlp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class NaiveAdam:
    """Adam on one scalar, in Python, as the paper of Adam writes it."""

    def __init__(self, value, learning_rate, decay, betas=(0.9, 0.999), eps=1e-8):
        self.value, self.m, self.v, self.t = value, 0.0, 0.0, 0
        self.learning_rate, self.decay, self.betas, self.eps = learning_rate, decay, betas, eps

    def step(self, gradient):
        gradient += self.decay * self.value
        self.t += 1
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * gradient
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * gradient**2
        m, v = self.m / (1 - self.betas[0] ** self.t), self.v / (1 - self.betas[1] ** self.t)
        self.value -= self.learning_rate * m / (math.sqrt(v) + self.eps)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_weight_lives_in_its_own_time(decay):
    """Against one naive scalar Adam per weight, stepped only when a task that owns the weight is."""
    mlp = masked_mlp(0).double()
    rate = 0.01
    optimizer = MaskedAdam(mlp, learning_rate=rate, weight_decay=decay)
    naive = {
        name: [NaiveAdam(value, rate, decay) for value in weight.flatten().tolist()]
        for name, weight in mlp.masked_weights().items()
    }
    generator = torch.Generator().manual_seed(3)
    order = ["ctr", "cvr", "cvr", "ctr", "cvr", "ctr", "ctr", "cvr"] * 3
    for task in order:
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        mlp(x, task).square().sum().backward()
        for name, weight in mlp.masked_weights().items():
            gradients, kept = weight.grad.flatten().tolist(), mlp.mask(task)[name].flatten().tolist()
            for scalar, gradient, is_kept in zip(naive[name], gradients, kept, strict=True):
                if is_kept:
                    scalar.step(gradient)
        optimizer.step(task)
    for name, weight in mlp.masked_weights().items():
        wanted = torch.tensor([scalar.value for scalar in naive[name]], dtype=torch.float64).view_as(weight)
        # 24 steps of about 20 roundings each, on values near 1, in the dtype of the state (float64).
        assert ((weight - wanted).abs() <= 24 * 20 * 2.0**-53 * (1 + wanted.abs())).all()


def test_with_full_masks_it_is_torchs_adam():
    torch.manual_seed(1)
    ours, theirs = MaskedMLP(5, hidden=(4, 3)), MaskedMLP(5, hidden=(4, 3))
    theirs.load_state_dict(ours.state_dict())
    masked, plain = MaskedAdam(ours, 0.01), torch.optim.Adam(theirs.parameters(), 0.01, fused=True)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(6, 5, generator=generator)
        masked.zero_grad()
        plain.zero_grad()
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        masked.step("task")
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_task_that_no_layer_knows_is_named():
    with pytest.raises(ValueError, match="task: got 'crt', wanted one of ctr, cvr"):
        MaskedAdam(masked_mlp(0)).step("crt")


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_masks_set_later_want_a_remask(density):
    mlp = masked_mlp(0, density)
    optimizer, generator = MaskedAdam(mlp), torch.Generator().manual_seed(0)
    step(mlp, optimizer, "ctr", generator)
    mlp.set_mask(mlp.mask("ctr"), "ctr")  # the same again: nothing to refuse
    step(mlp, optimizer, "ctr", generator)
    mlp.set_mask(masked_mlp(1).mask("ctr"), "ctr")
    with pytest.raises(RuntimeError, match=r"wanted remask\(\)"):
        step(mlp, optimizer, "ctr", generator)


def test_state_round_trip_continues_bit_for_bit():
    whole, resumed = masked_mlp(4), masked_mlp(4)
    first, second = MaskedAdam(whole), MaskedAdam(resumed)
    generator = torch.Generator().manual_seed(0)
    for task in ("ctr", "cvr", "ctr"):
        step(whole, first, task, generator)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    for model, optimizer in ((whole, first), (resumed, second)):
        generator = torch.Generator().manual_seed(9)
        for task in ("cvr", "ctr"):
            step(model, optimizer, task, generator)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def set_random_masks(mlp: MaskedMLP, generator: torch.Generator) -> None:
    """Masks of any density: all weights and none among them, one task's like the other's or not."""
    for task in mlp.tasks:
        counts = {
            name: round(weight.numel() * max(0.0, min(1.0, 1.6 * torch.rand((), generator=generator).item() - 0.3)))
            for name, weight in mlp.masked_weights().items()
        }
        mlp.set_mask(Mask.random(mlp.mask(task).shapes, counts, generator), task)


def owned(mlp: MaskedMLP, tasks: tuple[str, ...]) -> dict[str, list[bool]]:
    names = mlp.masked_weights()
    return {name: torch.stack([mlp.mask(t)[name] for t in tasks]).any(0).flatten().tolist() for name in names}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    moves=st.lists(st.sampled_from(["ctr", "cvr", "both", "remask", "reload"]), min_size=1, max_size=14),
    decay=st.sampled_from([0.0, 0.1]),
    is_full=st.booleans(),
)
def test_through_remasks_each_weight_lives_in_its_own_time(seed, moves, decay, is_full):
    """Against one naive scalar Adam per weight, which begins anew when no task owned the weight."""
    rate, generator = 0.01, torch.Generator().manual_seed(seed)
    mlp = masked_mlp(seed, 1.0 if is_full else 0.5).double()
    optimizer = MaskedAdam(mlp, learning_rate=rate, weight_decay=decay)
    naive = {
        name: [NaiveAdam(value, rate, decay) for value in weight.flatten().tolist()]
        for name, weight in mlp.masked_weights().items()
    }
    for move in moves:
        if move == "remask":
            before = owned(mlp, TASKS)
            set_random_masks(mlp, generator)
            with torch.no_grad():
                for name, weight in mlp.masked_weights().items():
                    grown = torch.tensor(owned(mlp, TASKS)[name]) & ~torch.tensor(before[name])
                    weight.masked_fill_(grown.view_as(weight), 0.25)  # a weight may come alive with any value
            optimizer.remask()
            for name, scalars in naive.items():
                for i, (was, is_) in enumerate(zip(before[name], owned(mlp, TASKS)[name], strict=True)):
                    if not (was and is_):
                        value = 0.25 if is_ and not was else scalars[i].value
                        scalars[i] = NaiveAdam(value, rate, decay)
            continue
        if move == "reload":
            # As the training loop does: through a file, into an optimiser that was made for other masks.
            file = io.BytesIO()
            torch.save({"model": mlp.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            mlp = masked_mlp(seed + 1).double()
            optimizer = MaskedAdam(mlp)
            mlp.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            continue
        tasks = TASKS if move == "both" else (move,)
        optimizer.zero_grad()
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        sum(mlp(x, task).square().sum() for task in tasks).backward()
        before_step = {name: weight.detach().clone() for name, weight in mlp.masked_weights().items()}
        for name, weight in mlp.masked_weights().items():
            gradients = weight.grad.flatten().tolist()
            for scalar, gradient, is_owned in zip(naive[name], gradients, owned(mlp, tasks)[name], strict=True):
                if is_owned:
                    scalar.step(gradient)
        optimizer.step(*(() if move == "both" else tasks))
        for name, weight in mlp.masked_weights().items():
            kept = torch.tensor(owned(mlp, tasks)[name]).view_as(weight)
            untouched = weight.detach().view(torch.int64)[~kept]
            assert torch.equal(untouched, before_step[name].view(torch.int64)[~kept])
    for name, weight in mlp.masked_weights().items():
        wanted = torch.tensor([scalar.value for scalar in naive[name]], dtype=torch.float64).view_as(weight)
        # At most 14 steps of about 20 roundings each, on values near 1, in the dtype of the state (float64).
        assert ((weight - wanted).abs() <= 14 * 20 * 2.0**-53 * (1 + wanted.abs())).all()


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_a_remask_that_changes_nothing_changes_nothing(density):
    one, other = masked_mlp(4, density), masked_mlp(4, density)
    plain, remasked = MaskedAdam(one), MaskedAdam(other)
    for model, optimizer in ((one, plain), (other, remasked)):
        generator = torch.Generator().manual_seed(0)
        for task in ("ctr", "cvr", "ctr"):
            step(model, optimizer, task, generator)
            if optimizer is remasked:
                optimizer.remask()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_step_for_two_tasks_moves_what_either_owns():
    torch.manual_seed(0)
    mlp = MaskedMLP(5, hidden=(4, 3), tasks=("ctr", "cvr", "like"))
    set_random_masks(mlp, torch.Generator().manual_seed(1))
    optimizer, before = MaskedAdam(mlp), copy.deepcopy(mlp)
    mlp(torch.ones(2, 5)).sum().backward()
    optimizer.step("ctr", "like")
    for name, weight in mlp.masked_weights().items():
        kept = mlp.mask("ctr")[name] | mlp.mask("like")[name]
        assert not torch.equal(weight[kept], before.masked_weights()[name][kept])
        assert torch.equal(weight[~kept], before.masked_weights()[name][~kept])


def test_a_state_of_another_model_or_of_other_masks_is_refused():
    mlp, other = masked_mlp(0), masked_mlp(1)
    optimizer = MaskedAdam(mlp)
    step(mlp, optimizer, "ctr", torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="wanted the model loaded first"):
        MaskedAdam(other).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state: got 6 parameters and masked weights \[\[20\], \[12\]\], wanted 5"):
        MaskedAdam(MaskedMLP(5, hidden=(4,), tasks=TASKS)).load_state_dict(optimizer.state_dict())


def test_a_whole_layer_that_was_nobodys_begins_anew():
    mlp = masked_mlp(0, 1.0)
    shapes = mlp.mask("ctr").shapes
    optimizer = MaskedAdam(mlp)
    step(mlp, optimizer, "ctr", torch.Generator().manual_seed(0))
    for density in (0, 1):
        for task in TASKS:
            mlp.set_mask(
                Mask.random(shapes, {n: r * c * density for n, (r, c) in shapes.items()}, torch.Generator()), task
            )
        optimizer.remask()
        for of_layer in optimizer.state_dict()["masked"]:
            assert not of_layer["steps"].any()
            assert not of_layer["exp_avg"].any()


# Lazy steps, for sparse gradients


class Table(torch.nn.Module):
    """An embedding table in float64, looked up with a sparse gradient or a dense one, beside a masked MLP."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.mlp = MaskedMLP(3, hidden=(2,)).double()

    def forward(self, ids: list[int], sparse: bool) -> torch.Tensor:
        return torch.nn.functional.embedding(torch.tensor(ids, dtype=torch.int64), self.rows, sparse=sparse)


lookups = st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=7), st.booleans()), min_size=1, max_size=10)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), steps=lookups, decay=st.sampled_from([0.0, 0.1]), reload=st.booleans())
def test_a_lazy_step_moves_the_rows_that_are_looked_up_as_adam_and_no_other_by_a_bit(seed, steps, decay, reload):
    """Against a naive scalar Adam per number, whose count of steps is the table's, lazy and dense steps mixed."""
    model, rate = Table(seed), 0.01
    model.rows.data[0] = -0.0  # that `w -= 0` would change
    optimizer = MaskedAdam(model, learning_rate=rate, weight_decay=decay)
    naive = [[NaiveAdam(value, rate, decay) for value in row] for row in model.rows.tolist()]
    generator = torch.Generator().manual_seed(seed)
    for count, (ids, sparse) in enumerate(steps):
        slopes = torch.randn(len(ids), 3, generator=generator, dtype=torch.float64)
        before = model.rows.detach().clone().view(torch.int64)
        optimizer.zero_grad()
        (model(ids, sparse) * slopes).sum().backward()
        assert model.rows.grad.is_sparse == sparse
        optimizer.step()
        for row, scalars in enumerate(naive):
            if sparse and row not in ids:
                assert torch.equal(model.rows.detach().view(torch.int64)[row], before[row])
                continue
            mine = [slopes[i].tolist() for i, looked_up in enumerate(ids) if looked_up == row]
            for scalar, *gradients in zip(scalars, *mine, strict=True):
                scalar.t = count
                scalar.step(sum(gradients))
        if reload:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            model = Table(seed + 1)
            optimizer = MaskedAdam(model)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    wanted = torch.tensor([[scalar.value for scalar in row] for row in naive], dtype=torch.float64)
    # At most 10 steps of about 20 roundings each and of 6 sums, on values near 1, in the dtype of the state (float64).
    assert ((model.rows - wanted).abs() <= 10 * 26 * 2.0**-53 * (1 + wanted.abs())).all()


@given(rows=st.integers(1, 40), dim=st.integers(1, 19), decay=st.sampled_from([0.0, 0.1]))
def test_a_lazy_step_of_all_rows_is_the_plain_step_to_the_bit(rows, dim, decay):
    found = []
    for sparse in (True, False):
        generator = torch.Generator().manual_seed(rows)
        table = torch.nn.Embedding(rows, dim, sparse=sparse)
        torch.nn.init.normal_(table.weight, generator=generator)
        optimizer = MaskedAdam(table, 0.01, weight_decay=decay)
        for _ in range(3):
            ids = torch.randperm(rows, generator=generator)
            optimizer.zero_grad()
            (table(ids) * torch.randn(rows, dim, generator=generator)).sum().backward()
            optimizer.step()
        found.append((table.weight, optimizer.state_dict()["free"][0]))
    (weight, state), (plain_weight, plain_state) = found
    assert torch.equal(weight, plain_weight)
    assert all(torch.equal(state[name], plain_state[name]) for name in plain_state)


def test_a_resumed_lazy_training_ends_bit_for_bit_where_an_uninterrupted_does():
    def steps(table, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            ids = torch.randint(1000, (64,), generator=generator)
            table(ids).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = torch.nn.Embedding(1000, 16, sparse=True)
    cut = copy.deepcopy(whole)
    steps(whole, MaskedAdam(whole), range(6))
    first = MaskedAdam(cut)
    steps(cut, first, range(3))
    resumed = copy.deepcopy(cut)
    second = MaskedAdam(resumed)
    second.load_state_dict(first.state_dict())
    steps(resumed, second, range(3, 6))
    assert torch.equal(whole.weight, resumed.weight)


def test_a_sparse_gradient_that_names_single_numbers_is_refused():
    table = torch.nn.Embedding(4, 3)
    table.weight.grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(ValueError, match="gradient: got sparse_dim 2, wanted 1, which names whole rows"):
        MaskedAdam(table).step()


def test_a_weight_of_two_masked_layers_is_refused():
    """Its own step would be taken twice, once through each layer's masks."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[2].weight = model[1].weight
    mask_linears(model)
    with pytest.raises(ValueError, match="masked layers 1 and 2: got one weight for both, wanted one each"):
        MaskedAdam(model)
    model[2].weight = torch.nn.Parameter(model[1].weight.detach().clone())
    optimizer = MaskedAdam(model)
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="masked layers 0 and 2: got one weight for both"):
        optimizer.remask()
    one = MaskedLinear(4, 4)
    MaskedAdam(torch.nn.Sequential(one, torch.nn.ReLU(), one))  # a layer in two places is one

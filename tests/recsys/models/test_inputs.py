import pytest
import torch
from oracle import assert_exact
from recsys.models.samples import FIELDS, SIZES, TASKS, features, naive_vectors, reached, with_integers

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.ranker.features import EncodedFeatures
from lt4rec_sparse.ranker.inputs import CrossedEmbeddings
from lt4rec_sparse.recsys.models.inputs import CROSSES, FirstOrder, MultiviewEmbeddings, TaskInputs


def new(cross, exclusive_dim=0) -> TaskInputs:
    return with_integers(TaskInputs(FIELDS, SIZES, TASKS, 3, cross, exclusive_dim))


@pytest.mark.parametrize("exclusive_dim", [0, 2])
@pytest.mark.parametrize("cross", CROSSES)
def test_shapes(cross, exclusive_dim):
    inputs = new(cross, exclusive_dim)
    views, terms = inputs(features(), ("like", "ctr"))
    flat = 4 * (3 + exclusive_dim)
    assert inputs.out_features == (flat + 6 if cross == "dlrm" else flat)
    assert {task: x.shape for task, x in views.items()} == dict.fromkeys(("like", "ctr"), (4, inputs.out_features))
    wanted = {} if cross == "dlrm" else dict.fromkeys(("like", "ctr"), (4, 1))
    assert {task: logit.shape for task, logit in terms.items()} == wanted
    assert (views["like"] is views["ctr"]) == (exclusive_dim == 0)


@pytest.mark.parametrize("exclusive_dim", [0, 2])
@pytest.mark.parametrize("cross", CROSSES)
def test_raw_numbers_end_each_view_and_change_nothing_else(cross, exclusive_dim):
    bare, numbers = new(cross, exclusive_dim), torch.arange(8.0).view(4, 2)
    inputs = TaskInputs(FIELDS, SIZES, TASKS, 3, cross, exclusive_dim, numbers=2)
    inputs.load_state_dict(bare.state_dict())
    rows = features()
    with_two = EncodedFeatures(rows.single, rows.multi_values, rows.multi_offsets, numbers)
    (views, terms), (wanted, wanted_terms) = inputs(with_two, TASKS), bare(rows, TASKS)
    assert inputs.out_features == bare.out_features + 2
    for task in TASKS:
        assert torch.equal(views[task], torch.cat([wanted[task], numbers], 1))
        assert cross == "dlrm" or torch.equal(terms[task], wanted_terms[task])
    with pytest.raises(InputError, match="numbers: got 0 per row, wanted 2"):
        inputs(rows, TASKS)


@pytest.mark.parametrize("exclusive_dim", [0, 2])
@pytest.mark.parametrize("cross", CROSSES)
def test_attention_is_each_tables_own_and_first_orders_have_none(cross, exclusive_dim):
    inputs = with_integers(TaskInputs(FIELDS, SIZES, TASKS, 3, cross, exclusive_dim, attention={"past": "video"}))
    units = {name.partition(".units.")[0] for name, _ in inputs.named_parameters() if ".units." in name}
    own = {f"embeddings.exclusive.{task}" for task in TASKS}
    assert units == ({"embeddings.shared", *own} if exclusive_dim else {"embeddings"})
    views, _ = inputs(features(), ("ctr",))
    loss = views["ctr"].sum()
    moved = {name for name in reached(inputs, loss) if ".units." in name}
    assert {name.partition(".units.")[0] for name in moved} == units - (own - {"embeddings.exclusive.ctr"})


def test_dlrm_without_exclusive_embeddings_is_the_cross_of_the_served_input():
    inputs = new("dlrm")
    assert isinstance(inputs.embeddings, CrossedEmbeddings)
    assert torch.equal(inputs(features(), TASKS)[0]["cvr"], inputs.embeddings(features()))


@pytest.mark.parametrize("exclusive_dim", [0, 2])
def test_deepfm_adds_first_and_second_order_to_the_logit(exclusive_dim):
    inputs = new("deepfm", exclusive_dim)
    views, terms = inputs(features(), TASKS)
    shared = inputs.embeddings.shared if exclusive_dim else inputs.embeddings
    for task in TASKS:
        first = inputs.first_order(features(), task).double()
        logits = []
        for row, vectors in enumerate(naive_vectors(shared.embedding.detach().double())):
            if exclusive_dim:
                own = naive_vectors(inputs.embeddings.exclusive[task].embedding.detach().double())[row]
                vectors = [torch.cat(pair) for pair in zip(vectors, own, strict=True)]
            second = sum(float(vectors[i] @ vectors[j]) for i in range(4) for j in range(i + 1, 4))
            logits.append(first[row] + second)
            assert torch.equal(views[task][row].double().sort().values, torch.cat(vectors).sort().values)
        assert_exact(terms[task].detach(), torch.stack(logits).float().detach())


def test_wide_and_deep_adds_the_first_order_alone():
    inputs = new("wide_deep")
    views, terms = inputs(features(), TASKS)
    flat = torch.stack([torch.cat(vectors) for vectors in naive_vectors(inputs.embeddings.embedding)])
    for task in TASKS:
        assert torch.equal(terms[task], inputs.first_order(features(), task))
        assert torch.equal(views[task], flat)


def test_the_first_order_equals_a_naive_sum_over_fields():
    wide = with_integers(FirstOrder(FIELDS, SIZES, TASKS))
    for task in TASKS:
        rows = [torch.stack(vectors).sum(0) for vectors in naive_vectors(wide.weights[task].embedding)]
        assert_exact(wide(features(), task).detach(), torch.stack(rows).detach())


def test_the_first_order_starts_at_zero_and_reaches_its_task_alone():
    wide = FirstOrder(FIELDS, SIZES, TASKS)
    logits = wide(features(), "cvr")
    assert torch.equal(logits, torch.zeros(4, 1))
    assert reached(wide, logits.sum()) == {"weights.cvr.embedding"}


def test_views_equal_the_cross_over_joined_vectors():
    inputs = with_integers(MultiviewEmbeddings(FIELDS, SIZES, TASKS, 3, 2))
    seen = inputs(features(), TASKS)
    assert list(seen) == list(TASKS)
    for task in TASKS:
        own = naive_vectors(inputs.exclusive[task].embedding)
        rows = []
        for shared, exclusive in zip(naive_vectors(inputs.shared.embedding), own, strict=True):
            joined = [torch.cat(pair) for pair in zip(shared, exclusive, strict=True)]
            dots = [joined[i] @ joined[j] for i in range(4) for j in range(i + 1, 4)]
            rows.append(torch.cat([*shared, *exclusive, torch.stack(dots)]))
        assert_exact(seen[task].detach(), torch.stack(rows).detach())
        assert seen[task].shape[1] == inputs.out_features == 4 * 5 + 6


def test_a_task_reaches_its_own_embeddings_and_the_shared_ones():
    inputs = with_integers(MultiviewEmbeddings(FIELDS, SIZES, TASKS, 3, 2))
    names = reached(inputs, inputs(features(), ("cvr",))["cvr"].sum())
    assert names == {"shared.embedding", "exclusive.cvr.embedding"}

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Bounded, assert_rounding, small_integers
from recsys.models.samples import with_integers

from lt4rec_sparse.recsys.models.gate import Gate


def naive_mixture(x, weight, experts):
    """In float64, row by row."""
    weight, rows = weight.detach(), []
    for b in range(x.shape[0]):
        logits = [float(w.double() @ x[b].double()) for w in weight]
        powers = [torch.tensor(z - max(logits), dtype=torch.float64).exp() for z in logits]
        share = [p / sum(powers) for p in powers]
        rows.append(sum(s * expert[b].double() for s, expert in zip(share, experts, strict=True)))
    return torch.stack(rows)


def roundings(experts):
    """Of a mixture of exact outputs by exact logits: two exps of an ulp, a sum, a quotient, a product, a sum."""
    return 2 * 2 + experts + 1 + 1 + experts


@given(st.integers(1, 5), st.integers(0, 1000))
def test_equals_a_naive_mixture(n, seed):
    generator = torch.Generator().manual_seed(seed)
    gate = with_integers(Gate(3, n), seed)
    x = small_integers(4, 3, generator=generator)
    experts = [small_integers(4, 2, generator=generator) for _ in range(n)]
    value = naive_mixture(x, gate.linear.weight, experts)
    magnitude = naive_mixture(x, gate.linear.weight, [expert.abs() for expert in experts])
    assert_rounding(gate(x, experts).detach(), Bounded(value, roundings(n) * 2.0**-24 * magnitude))

"""The experiments: which rows each has, and what every row trains. Data only; nothing here trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import GRANULARITIES
from lt4rec_sparse.recsys.harness.rows import RANDOM_RESCALED, Row, Rows, scaled
from lt4rec_sparse.recsys.harness.trials import Masks
from lt4rec_sparse.recsys.models import Conflict


@dataclass(frozen=True)
class Variants:
    """What the paper leaves open about its variants of S-Weight.

    Attributes:
        cvr_scale: Eq 2's b while a = 1 (taskbalance); the paper says only "b >> a".
        conflict: Which rows count as clicked but hardly watched, and their weight (gradientconflict).
        exclusive_dim: Width of each task's own embedding (multiview); None for a quarter of the shared width, like the
            paper's 8 beside 32.
        wider: Factor on every hidden width (biggernet). With the default, five rounds leave as many weights as four
            rounds leave of the usual network, within 2 % at KuaiRand's 1,258 inputs.
    """

    cvr_scale: float = 5.0
    conflict: Conflict = field(default_factory=Conflict)
    exclusive_dim: int | None = None
    wider: float = 1.375

    def __post_init__(self) -> None:
        for name, least in (("cvr_scale", 0), ("exclusive_dim", 1), ("wider", 0)):
            value = getattr(self, name)
            if value is not None and (value < least or value == 0):
                raise InputError(f"{name}: got {value}, wanted {'at least 1' if least else 'more than 0'}")


def table2(rows: Rows, variants: Variants = Variants()) -> list[Row]:
    """The paper's Table 2 and the opponents that ranking engineers would ask about."""
    best = Masks(search=rows.search())
    s_weight, s_weight_last = rows.tickets()
    first, *rest = rows.tasks
    balance: dict[str, Any] = {"scales": ((first, 1.0), *((task, variants.cvr_scale) for task in rest))}
    conflict: dict[str, Any] = {"conflict": variants.conflict}
    multiview = replace(rows.training, exclusive_dim=variants.exclusive_dim or max(1, rows.training.embedding_dim // 4))
    bigger = replace(rows.training, hidden=scaled(rows.training.hidden, variants.wider))
    further = rows.rounds + 1
    more = rows.search(training=bigger, rounds=further, density=rows.density ** (further / rows.rounds))
    variant = {
        "s_neuron": ("S-Neuron", Masks(search=rows.search(granularity="neuron")), {}),
        "s_weight_taskbalance": ("S-Weight-taskbalance", best, balance),
        "s_weight_gradientconflict": ("S-Weight-gradientconflict", best, conflict),
        "s_weight_multiview": ("S-Weight-multiview", Masks(search=rows.search(training=multiview)), {}),
        "s_weight_biggernet": (
            f"S-Weight-biggernet ({variants.wider:g}x as wide)",
            Masks(search=rows.search(training=bigger)),
            {},
        ),
        "s_weight_tuning": ("S-Weight-tuning", best, balance | conflict),
    }
    equal = "S-Weight-biggernet, a round further: the multiply-adds of S-Weight at 20 %"
    return [
        rows.base(),
        rows.hard(),
        s_weight,
        *(rows.sparse(key, title, masks, key, **changes) for key, (title, masks, changes) in variant.items()),
        rows.sparse("s_weight_biggernet_equal", equal, Masks(search=more, level="last"), "s_weight_biggernet"),
        s_weight_last,
        *rows.random(),
        rows.dense("hard_sharing", "hard sharing, one step for all tasks"),
        rows.dense("shared_bottom", "shared-bottom"),
        rows.dense("shared_bottom", "shared-bottom, one step per task", "alternating"),
        rows.dense("shared_bottom", "shared-bottom, uncertainty weights", "uncertainty"),
        rows.dense("shared_bottom", "shared-bottom, PCGrad", "pcgrad"),
        rows.dense("mmoe", "MMoE"),
        rows.dense("mmoe", "MMoE, one step per task", "alternating"),
        rows.dense("ple", "PLE"),
        rows.dense("ple", "PLE, one step per task", "alternating"),
        rows.dense("aitm", "AITM's network, CVR of clicks"),
        *rows.small(),
        rows.dense("esmm", "ESMM, log losses of all impressions"),
    ]


def table3(rows: Rows) -> list[Row]:
    """The models that Table 3's four arms combine."""
    return [rows.base(), rows.hard(), rows.tickets()[0]]


def figure4(rows: Rows) -> list[Row]:
    """Prunes for twice as many rounds as the method does, to see where each task breaks."""
    deep = rows.search(rounds=2 * rows.rounds, density=rows.density**2)
    return [rows.base(), rows.sparse("s_weight_deep", "S-Weight, best of 8 rounds", Masks(search=deep))]


def granularity(rows: Rows) -> list[Row]:
    """From single weights to whole neurons: best and last tickets of each, beside small dense networks."""
    table = [rows.base(), rows.hard(), *rows.small()]
    for kind in GRANULARITIES:
        if kind == "block64":
            continue
        search = rows.search(granularity=kind)
        table += [
            rows.sparse(f"{kind}_{level}", f"{kind}, {level} tickets", Masks("tickets", search, level), f"{kind}_best")
            for level in ("best", "last")
        ]
    return table


def cheap(rows: Rows) -> list[Row]:
    """Masks from one training per task, or from none, beside the paper's rounds."""
    found = {
        "rounds": "four rounds (S-Weight at 20 %)",
        "one_shot": "the single-task baseline pruned at once",
        "gradual": "gradual magnitude pruning, one training",
        "drop_and_grow": "drop and grow (RigL), one training",
    }
    masked = [
        rows.sparse(f"{method}_last", title, Masks(search=rows.search(method=method), level="last"))
        for method, title in found.items()
    ]
    return [rows.base(), rows.hard(), *masked, *rows.random()]


def tickets(rows: Rows) -> list[Row]:
    """Does the ticket matter: which property of a mask decides, at one density?

    All rows train at S-Weight's learning rates, which were searched with tickets. Random masks and rows that are
    scaled up at the start have learning rates of their own.
    """
    search = rows.search()
    last = Masks(search=search, level="last")
    longer = rows.search(training=replace(rows.training, epochs=2))
    warm = rows.search(training=replace(rows.training, warm_up=0.25))
    rewound = Masks(search=rows.search(rewind=0.2), level="last")
    of_layers = Masks(search=rows.search(scope="layer"), level="last")
    disjoint = Masks("random_separate", search, shared=0.0, rescale=True)
    # At S-Weight's rates.
    masks = {
        "ticket": ("ticket: one quantile over all layers", last),
        "ticket_layer": ("ticket: one quantile per layer", of_layers),
        "random_like": ("the ticket's layer densities, shuffled", replace(last, kind="random_like")),
        "random_at_ticket_rate": ("random masks at the tickets' learning rates", Masks("random", search)),
        "ticket_fresh": ("ticket, fresh initial weights", replace(last, fresh_start=True)),
        "random_fresh": ("random, fresh initial weights", Masks("random", search, fresh_start=True)),
        "ticket_longer": ("ticket, two epochs per round", Masks(search=longer, level="last")),
        "ticket_rewound": ("ticket of a search rewound to epoch 0.2", rewound),
        "ticket_warm": ("ticket, after a warm-up of 0.25 epochs", Masks(search=warm, level="last")),
        "random_warm": ("random, after a warm-up of 0.25 epochs", Masks("random", warm)),
        "one_ticket": ("one mask for all: the first task's ticket", replace(last, kind="one_for_all")),
        "one_random": ("one mask for all: random", Masks("one_random", search)),
        "unanimous": ("one mask for all: unanimous", Masks("unanimous", search)),
    }
    for density in (0.4, 0.1, 0.05):  # beside the method's own
        at = Masks("random", replace(search, density=density))
        masks[f"random_{density}"] = (f"random, uniform density of {density:.0%}", at)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        for kind, title in (("separate", "by magnitude"), ("random_separate", "random")):
            masks[f"{kind}_{share}"] = (f"{title}, {share:.0%} co-owned", Masks(kind, search, shared=share))
    by_layer, rescaled = replace(of_layers, rescale=True), "ticket_rescaled"
    scaled_up = {
        rescaled: ("ticket, scaled up at the start", replace(last, rescale=True), rescaled),
        "ticket_layer_rescaled": ("ticket: one quantile per layer, scaled up at the start", by_layer, rescaled),
        "random_disjoint_rescaled": ("random, nothing co-owned, scaled up at the start", disjoint, RANDOM_RESCALED),
    }
    return [
        rows.base(),
        rows.hard(),
        *rows.small(),
        *rows.random(),
        *(rows.sparse(key, title, of_row) for key, (title, of_row) in masks.items()),
        *(rows.sparse(key, title, of_row, rate_of) for key, (title, of_row, rate_of) in scaled_up.items()),
    ]


DENSITIES = (0.4, 0.2, 0.1, 0.05, 0.025)
WIDTHS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.06)  # each takes some 0.6 to 0.7 times the one before
ROUNDS = (2, 4, 6, 8, 9)  # 45, 20, 8.9, 4 and 2.7 % are left


def frontier(rows: Rows) -> list[Row]:
    """Sparse networks beside narrow dense ones, from two fifths of the weights to a fortieth; rates of their own."""
    first, *rest = rows.tasks

    def found(method: str, density: float) -> Masks:
        search = rows.search(method=method, granularity="16x4", density=density)
        return Masks(search=search, level="last")

    blocks = [_masked(rows, f"blocks_{d:g}", "random blocks", _random(rows, "16x4", d)) for d in DENSITIES]
    weights = [_masked(rows, f"weights_{d:g}", "random weights", _random(rows, "weight", d)) for d in DENSITIES]
    mixed = []
    for a, b in ((0.025, 0.1), (0.05, 0.2), (0.1, 0.4), (0.1, 0.025), (0.2, 0.05), (0.4, 0.1)):
        density = ((first, a), *((task, b) for task in rest))
        mixed.append(_masked(rows, f"mixed_{a:g}_{b:g}", "random blocks", _random(rows, "16x4", density)))
    cheap = []
    for method, title in (("gradual", "blocks pruned while training"), ("one_shot", "blocks of the trained base")):
        cheap += [_masked(rows, f"{method}_{d:g}", title, found(method, d)) for d in DENSITIES]
    # One chain of rounds that keep a share alike, of which each row takes the first few.
    chain = [_block_tickets(rows, rounds) for rounds in ROUNDS]
    return [rows.base(), rows.hard(), *_narrow(rows, WIDTHS), *blocks, *mixed, *weights, *cheap, *chain]


def regimes(rows: Rows) -> list[Row]:
    """A shorter frontier for many logs, and single-task networks of random blocks: sparsity without sharing."""
    blocks = [_masked(rows, f"blocks_{d:g}", "random blocks", _random(rows, "16x4", d)) for d in DENSITIES[:-1]]
    alone = []
    for density in (0.2, 0.05):
        key, masks = f"alone_{density:g}", _random(rows, "16x4", density)
        trials = tuple(replace(rows, tasks=(task,)).sparse(key, "", masks).trials[0] for task in rows.tasks)
        alone.append(Row(key, f"random blocks, single-task at {_shares(density)}", trials, key))
    weights = _masked(rows, "weights_0.2", "random weights", _random(rows, "weight", 0.2))
    single_weights = rows.tickets()[1]
    return [
        rows.base(),
        rows.hard(),
        *_narrow(rows, (0.5, 0.25, 0.12)),
        *blocks,
        *alone,
        _block_tickets(rows, rows.rounds),
        weights,
        replace(single_weights, rate_of=single_weights.key),
    ]


def _narrow(rows: Rows, widths: Sequence[float]) -> list[Row]:
    """Return dense networks, single-task and hard sharing, at narrow widths."""
    dense = []
    for width in widths:
        for row in replace(rows, narrow=width).small():
            key = f"{row.key}_{width:g}"
            dense.append(replace(row, key=key, rate_of=key))
    return dense


def _masked(rows: Rows, key: str, title: str, masks: Masks) -> Row:
    return rows.sparse(key, f"{title} at {_shares(masks.search.density)}", masks, key)


def _shares(density: Any) -> str:
    return f"{density * 100:g} %" if isinstance(density, float) else ", ".join(f"{t} {_shares(d)}" for t, d in density)


def _random(rows: Rows, granularity: str, density: Any) -> Masks:
    return Masks("random", rows.search(granularity=granularity, density=density), rescale=True)


def _block_tickets(rows: Rows, rounds: int) -> Row:
    """Return the tickets of 16x4 after some rounds, each of which keeps as much as one of the paper's."""
    search = rows.search(granularity="16x4", rounds=rounds, density=rows.density ** (rounds / rows.rounds))
    title = f"tickets of blocks at {search.density * 100:.2g} %"
    return rows.sparse(f"tickets_{rounds}", title, Masks(search=search, level="last"), f"tickets_{rounds}")


def many_tasks(rows: Rows) -> list[Row]:
    """Every task of the log together."""
    dense = [rows.dense("mmoe", "MMoE"), rows.dense("ple", "PLE")]
    return [rows.base(), rows.hard(), *rows.tickets(), *rows.random(), *dense]

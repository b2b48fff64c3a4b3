"""The experiments: which rows each has, and what every row trains. Data only; nothing here trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.lottery import GRANULARITIES
from lt4rec_sparse.recsys.harness.trials import Masks, Search, Training, Trial
from lt4rec_sparse.recsys.models import Conflict

BASE, HARD, S_WEIGHT = "base", "hard_sharing", "s_weight"
ROUNDS, DENSITY = 4, 0.2
KEPT_A_ROUND = DENSITY ** (1 / ROUNDS)
SMALL = 0.25  # of the widths: a dense network of some 20 % of the weights, where the first layer has most of them
RANDOM_DENSITIES = (0.4, 0.1, 0.05)  # beside the method's own
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Row:
    """A row of a table: one model for all tasks, or a model a task.

    Attributes:
        key: Its name in files.
        title: Its name in reports.
        trials: At seed 0; every other seed's are made from them.
        rate_of: The row whose learning rate it trains with; its own key if it searches one. Models of single tasks
            search one each.
    """

    key: str
    title: str
    trials: tuple[Trial, ...]
    rate_of: str

    def at(self, seed: int, rates: Sequence[float]) -> tuple[Trial, ...]:
        """Return the row's trials at a seed, each with its learning rate."""
        return tuple(trial.at(seed, rate) for trial, rate in zip(self.trials, rates, strict=True))


@dataclass(frozen=True)
class Variants:
    """What the paper's variants of S-Weight leave open.

    Attributes:
        cvr_scale: Eq 2's b beside a = 1 (taskbalance): "b >> a" is all that the paper says.
        conflict: The rows that are clicked and hardly watched, and what they count (gradientconflict).
        exclusive_dim: Width of an embedding of each task's own (multiview); None for a quarter of the shared one's, as
            the paper's 8 beside 32.
        wider: Factor of every hidden width (biggernet). With the default, five rounds leave what four leave of the
            usual network, within 2 % at KuaiRand's 1,258 inputs.
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


@dataclass(frozen=True)
class Rows:
    """Makes rows over the same tasks and the same training.

    Attributes:
        tasks: The tasks, the densest first.
        training: Of every row but where a row says otherwise; learning rates are searched.
        search_rates: Task -> learning rate of its search: that of its single-task baseline.
        variants: What the variants of S-Weight are.
    """

    tasks: tuple[str, ...]
    training: Training = field(default_factory=Training)
    search_rates: tuple[tuple[str, float], ...] = ()
    variants: Variants = field(default_factory=Variants)

    def base(self) -> Row:
        """Return the single-task models, one a task."""
        trials = tuple(Trial("sparse_sharing", (task,), training=self.training) for task in self.tasks)
        return Row(BASE, "base (single-task)", trials, BASE)

    def small(self) -> list[Row]:
        """Return the dense networks that cost as much as a fifth of the usual one: what sparse ones must beat."""
        small = replace(self, training=replace(self.training, hidden=scaled(self.training.hidden, SMALL)))
        rows = [small.base(), small.dense(HARD, "hard sharing", "alternating")]
        return [
            replace(
                row,
                key=f"{row.key}_small",
                title=f"{row.title}, dense and {SMALL:g}x as wide",
                rate_of=f"{row.key}_small",
            )
            for row in rows
        ]

    def dense(self, model: str, title: str, objective: str = "joint", **options: object) -> Row:
        """Return a multi-task model without masks; its key says how it trains where its authors train it otherwise."""
        usual = "alternating" if model == HARD else "joint"
        key = model if objective == usual else f"{model}_{objective}"
        trial = Trial(
            model, self.tasks, training=self.training, objective=objective, options=tuple(sorted(options.items()))
        )
        return Row(key, title, (trial,), key)

    def search(self, **changes: object) -> Search:
        """Return the paper's search, but for what is changed."""
        return replace(Search(self.training, rounds=ROUNDS, density=DENSITY, rates=self.search_rates), **changes)  # type: ignore[arg-type]

    def random(self) -> list[Row]:
        """Return random masks, with the weights as they are drawn and scaled up to their density."""
        masks = Masks("random", self.search())
        percent = f"{masks.search.density * 100:g} %"
        return [
            self.sparse("random", f"random masks at {percent}, no search", masks, "random"),
            self.sparse(
                "random_rescaled",
                f"random masks at {percent}, scaled up at the start",
                replace(masks, rescale=True),
                "random_rescaled",
            ),
        ]

    def sparse(self, key: str, title: str, masks: Masks, rate_of: str = S_WEIGHT, **changes: object) -> Row:
        """Return sparse sharing through some masks; `changes` are of the trial."""
        training = replace(
            self.training,
            **{
                name: getattr(masks.search.training, name)
                for name in ("hidden", "embedding_dim", "exclusive_dim", "cross", "warm_up")
            },
        )
        trial = Trial("sparse_sharing", self.tasks, training=training, masks=masks)
        return Row(key, title, (replace(trial, **changes),), rate_of)  # type: ignore[arg-type]


def table2(rows: Rows) -> list[Row]:
    """The paper's Table 2 and the opponents that ranking engineers would ask about."""
    best = Masks(search=rows.search())
    first, *rest = rows.tasks
    variants = rows.variants
    balance = {"scales": ((first, 1.0), *((task, variants.cvr_scale) for task in rest))}
    conflict = {"conflict": variants.conflict}
    multiview = replace(rows.training, exclusive_dim=variants.exclusive_dim or max(1, rows.training.embedding_dim // 4))
    bigger = replace(rows.training, hidden=scaled(rows.training.hidden, variants.wider))
    more = rows.search(training=bigger, rounds=ROUNDS + 1, density=KEPT_A_ROUND ** (ROUNDS + 1))
    table = [
        rows.base(),
        rows.dense("hard_sharing", "hard sharing", "alternating"),
        rows.sparse(S_WEIGHT, "S-Weight", best, S_WEIGHT),
        rows.sparse("s_neuron", "S-Neuron", Masks(search=rows.search(granularity="neuron")), "s_neuron"),
        rows.sparse("s_weight_taskbalance", "S-Weight-taskbalance", best, "s_weight_taskbalance", **balance),
        rows.sparse(
            "s_weight_gradientconflict", "S-Weight-gradientconflict", best, "s_weight_gradientconflict", **conflict
        ),
        rows.sparse(
            "s_weight_multiview",
            "S-Weight-multiview",
            Masks(search=rows.search(training=multiview)),
            "s_weight_multiview",
        ),
        rows.sparse(
            "s_weight_biggernet",
            f"S-Weight-biggernet ({variants.wider:g}x as wide)",
            Masks(search=rows.search(training=bigger)),
            "s_weight_biggernet",
        ),
        rows.sparse(
            "s_weight_biggernet_equal",
            "S-Weight-biggernet, a round further: the multiply-adds of S-Weight at 20 %",
            Masks(search=more, level="last"),
            "s_weight_biggernet",
        ),
        rows.sparse("s_weight_tuning", "S-Weight-tuning", best, "s_weight_tuning", **balance, **conflict),
        rows.sparse("s_weight_last", "S-Weight at 20 %", replace(best, level="last")),
        *rows.random(),
        rows.dense("hard_sharing", "hard sharing, one step for both tasks"),
        rows.dense("shared_bottom", "shared-bottom"),
        rows.dense("shared_bottom", "shared-bottom, a step a task", "alternating"),
        rows.dense("shared_bottom", "shared-bottom, uncertainty weights", "uncertainty"),
        rows.dense("shared_bottom", "shared-bottom, PCGrad", "pcgrad"),
        rows.dense("mmoe", "MMoE"),
        rows.dense("mmoe", "MMoE, a step a task", "alternating"),
        rows.dense("ple", "PLE"),
        rows.dense("ple", "PLE, a step a task", "alternating"),
        rows.dense("aitm", "AITM's network, CVR of clicks"),
        *rows.small(),
    ]
    # ESMM's second task follows the first.
    return table + ([rows.dense("esmm", "ESMM, log losses of all impressions")] if len(rows.tasks) == 2 else [])


def table3(rows: Rows) -> list[Row]:
    """The models that Table 3's four arms are made of."""
    best = Masks(search=rows.search())
    return [
        rows.base(),
        rows.dense("hard_sharing", "hard sharing", "alternating"),
        rows.sparse(S_WEIGHT, "S-Weight", best, S_WEIGHT),
    ]


def figure4(rows: Rows) -> list[Row]:
    """Pruning twice as many rounds as the method uses, to see where each task breaks."""
    deep = rows.search(rounds=2 * ROUNDS, density=DENSITY**2)
    return [rows.base(), rows.sparse("s_weight_deep", "S-Weight, best of 8 rounds", Masks(search=deep))]


def granularity(rows: Rows) -> list[Row]:
    """From single weights to whole neurons: best and last tickets of each, beside small dense networks."""
    table = [rows.base(), rows.dense("hard_sharing", "hard sharing", "alternating"), *rows.small()]
    for kind in GRANULARITIES:
        if kind == "block64":
            continue
        search = rows.search(granularity=kind)
        table += [
            rows.sparse(
                f"{kind}_{level}", f"{kind}, {level} tickets", Masks(search=search, level=level), f"{kind}_best"
            )
            for level in ("best", "last")
        ]
    return table


def cheap(rows: Rows) -> list[Row]:
    """Masks from one training a task, or from none, beside the paper's rounds."""
    found = {
        "rounds": "four rounds (S-Weight at 20 %)",
        "one_shot": "the single-task baseline pruned at once",
        "gradual": "gradual magnitude pruning, one training",
        "drop_and_grow": "drop and grow (RigL), one training",
    }
    return [
        rows.base(),
        rows.dense("hard_sharing", "hard sharing", "alternating"),
        *(
            rows.sparse(f"{method}_last", title, Masks(search=rows.search(method=method), level="last"))
            for method, title in found.items()
        ),
        *rows.random(),
    ]


def tickets(rows: Rows) -> list[Row]:
    """Does the ticket matter: what of a mask decides, at one density.

    All at S-Weight's learning rate, which the tickets chose, but for random masks and what is scaled up: these have
    chosen their own.
    """
    search = rows.search()
    last = Masks(search=search, level="last")
    layer = rows.search(scope="layer")
    longer = rows.search(training=replace(rows.training, epochs=2))
    warm = rows.search(training=replace(rows.training, warm_up=0.25))
    table = [
        rows.base(),
        rows.dense("hard_sharing", "hard sharing", "alternating"),
        *rows.small(),
        rows.sparse("ticket", "ticket: one quantile over all layers", last),
        rows.sparse("ticket_layer", "ticket: a quantile a layer", Masks(search=layer, level="last")),
        rows.sparse("random_like", "the ticket's layer densities, shuffled", replace(last, kind="random_like")),
        *rows.random(),
        rows.sparse("random_at_ticket_rate", "random masks at the tickets' learning rate", Masks("random", search)),
        rows.sparse("ticket_fresh", "ticket, fresh initial weights", replace(last, fresh_start=True)),
        rows.sparse("random_fresh", "random, fresh initial weights", Masks("random", search, fresh_start=True)),
        rows.sparse(
            "ticket_rescaled", "ticket, scaled up at the start", replace(last, rescale=True), "ticket_rescaled"
        ),
        rows.sparse(
            "ticket_layer_rescaled",
            "ticket: a quantile a layer, scaled up at the start",
            Masks(search=layer, level="last", rescale=True),
            "ticket_rescaled",
        ),
        rows.sparse(
            "random_disjoint_rescaled",
            "random, nothing co-owned, scaled up at the start",
            Masks("random_separate", search, shared=0.0, rescale=True),
            "random_rescaled",
        ),
        rows.sparse("ticket_longer", "ticket, two epochs a round", Masks(search=longer, level="last")),
        rows.sparse(
            "ticket_rewound",
            "ticket of a search rewound to epoch 0.2",
            Masks(search=rows.search(rewind=0.2), level="last"),
        ),
        rows.sparse("ticket_warm", "ticket, after a warm-up of 0.25 epochs", Masks(search=warm, level="last")),
        rows.sparse("random_warm", "random, after a warm-up of 0.25 epochs", Masks("random", warm)),
        rows.sparse("one_ticket", "one mask for all: the first task's ticket", replace(last, kind="one_for_all")),
        rows.sparse("one_random", "one mask for all: random", Masks("one_random", search)),
        rows.sparse("unanimous", "one mask for all: unanimous", Masks("unanimous", search)),
    ]
    table += [
        rows.sparse(f"random_{density}", f"random, uniform density of {density:.0%}", Masks("random", at))
        for density in RANDOM_DENSITIES
        for at in [replace(search, density=density)]
    ]
    for share in SHARES:
        table += [
            rows.sparse(
                f"separate_{share}", f"by magnitude, {share:.0%} co-owned", Masks("separate", search, shared=share)
            ),
            rows.sparse(
                f"random_separate_{share}",
                f"random, {share:.0%} co-owned",
                Masks("random_separate", search, shared=share),
            ),
        ]
    return table


def many_tasks(rows: Rows) -> list[Row]:
    """Every task of the log together."""
    best = Masks(search=rows.search())
    return [
        rows.base(),
        rows.dense("hard_sharing", "hard sharing", "alternating"),
        rows.sparse(S_WEIGHT, "S-Weight", best, S_WEIGHT),
        rows.sparse("s_weight_last", "S-Weight at 20 %", replace(best, level="last")),
        *rows.random(),
        rows.dense("mmoe", "MMoE"),
        rows.dense("ple", "PLE"),
    ]


def scaled(widths: Sequence[int], factor: float) -> tuple[int, ...]:
    """Return hidden widths times a factor, each at least 1."""
    return tuple(max(1, round(factor * width)) for width in widths)

"""Early stopping: which epoch is the best, when a training ends, and with which weights."""

import pytest
import torch
from torch import nn

from lt4rec_sparse.errors import InputError
from lt4rec_sparse.nn.optim import MaskedAdam
from lt4rec_sparse.recsys.training import Alternating, EarlyStopping, TaskLosses, evaluate, train
from tests.recsys.training.test_loop import KINDS, LOSSES, new_model, states_equal


def stopped(losses: list[dict[str, float]], patience: int) -> tuple[int, int]:
    """Return after how many epochs a training with these losses ends, and the epoch whose weights are left."""
    model = nn.Linear(1, 1, bias=False)
    stopping = EarlyStopping(lambda model: losses[int(model.weight)], patience)
    for epoch in range(len(losses)):
        nn.init.constant_(model.weight, epoch)
        if stopping.is_over(model):
            break
    stopping.restore(model)
    return epoch + 1, int(model.weight)


@pytest.mark.parametrize(
    ("losses", "patience", "epochs", "best"),
    [
        ([3, 2, 1], 1, 3, 2),
        ([3, 2, 2, 1], 1, 3, 1),  # as good as before is no better
        ([3, 2, 4, 1, 5, 6, 0], 2, 6, 3),
        ([1, 2, 3, 4, 5], 3, 4, 0),
        ([0, 0, 1], 1, 2, 0),
    ],
)
def test_a_training_ends_after_epochs_without_gain_with_its_best_weights(losses, patience, epochs, best):
    assert stopped([{"ctr": float(loss)} for loss in losses], patience) == (epochs, best)


def test_a_task_counts_by_its_share_of_the_first_epochs_loss():
    """A watch ratio's error is a tenth of a click's log loss, and weighs as much."""
    losses = [{"ctr": 0.5, "cvr": 0.05}, {"ctr": 0.48, "cvr": 0.06}, {"ctr": 0.51, "cvr": 0.02}]
    assert stopped(losses, 2) == (3, 2)
    assert stopped(losses, 1) == (2, 0), "4 % less of the one, 20 % more of the other"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(loss):
    with pytest.raises(InputError, match=r"validation loss of cvr: got (nan|inf) after epoch 1, wanted a number"):
        stopped([{"ctr": 1.0, "cvr": 1.0}, {"ctr": 1.0, "cvr": loss}], 1)
    with pytest.raises(InputError, match="patience: got 0, wanted at least 1"):
        EarlyStopping(lambda model: {}, 0)


def test_what_is_left_is_what_the_best_epoch_alone_would_leave(small_log):
    """The training after the best epoch changes nothing: a training that ends there has the same weights."""
    stream, validation = small_log.stream("train", 128, seed=0), small_log.stream("validation", 4096, shuffle=False)
    judged: list[float] = []

    def losses(model):
        found = evaluate(model, validation, {"ctr": KINDS["ctr"]})["all"]["ctr"]["log_loss"]
        judged.append(found)
        return {"ctr": found}

    def trained(epochs, stopping=None):
        model = new_model(small_log)
        train(model, MaskedAdam(model, 0.03), stream, Alternating(TaskLosses(LOSSES)), epochs=epochs, stopping=stopping)
        return model

    early = trained(20, EarlyStopping(losses, 2))
    best = judged.index(min(judged))
    assert len(judged) == best + 3 < 20, "it ended early"
    assert states_equal(early, trained(best + 1))
    assert not states_equal(early, trained(best + 3))
    assert torch.is_grad_enabled()

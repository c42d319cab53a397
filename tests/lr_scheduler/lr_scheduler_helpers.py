"""What the tests of schedulers share: optimizers with two groups, and runs of a scheduler."""

import warnings

import torch


def sgd(lr=0.1, *, tensor=False, optimizer=torch.optim.SGD, **options):
    """Two groups with different rates, that can be stepped."""
    rates = [torch.tensor(rate) if tensor else rate for rate in (lr, lr / 3)]
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return optimizer(groups, **options)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def values(optimizer):
    """Everything that schedulers change."""
    keys = ("lr", "momentum", "betas")
    return [tuple(group[key] for key in keys if key in group) for group in optimizer.param_groups]


def run(scheduler, epochs, read=rates):
    """What `read` gives at the beginning and after each of so many epochs."""
    seen = [read(scheduler.optimizer)]
    scheduler.optimizer.step()  # Once is enough to avoid the warning.
    for _ in range(epochs):
        scheduler.step()
        seen.append(read(scheduler.optimizer))
    return seen


def quietly_stepped(scheduler, epochs):
    """The scheduler, moved on without an optimizer step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(epochs):
            scheduler.step()
    return scheduler

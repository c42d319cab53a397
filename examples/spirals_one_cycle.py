"""Two spirals told apart by a multilayer perceptron; Adam under OneCycleLR, which also cycles the momentum."""

import math

import torch
from torch import nn
from torch.optim import Adam, lr_scheduler

STEPS = 300


def spirals(count):
    """Give points on two spirals that wind around one another, and which spiral each lies on."""
    labels = torch.randint(2, (count,))
    turn = torch.rand(count).sqrt() * 3 * math.pi
    angle = turn + math.pi * labels
    points = torch.stack([turn * torch.cos(angle), turn * torch.sin(angle)], 1) / 6
    return points + 0.03 * torch.randn(count, 2), labels.float()


def main():
    torch.manual_seed(0)
    points, labels = spirals(2000)
    test_points, test_labels = spirals(1000)
    model = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer = Adam(model.parameters(), lr=1e-3)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=STEPS)
    criterion = nn.BCEWithLogitsLoss()
    for step in range(STEPS):
        batch = torch.randint(len(points), (256,))
        loss = criterion(model(points[batch]).squeeze(1), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            print(f"step {step}  lr {scheduler.get_last_lr()[0]:.5f}  loss {loss.item():.3f}")
    with torch.no_grad():
        outputs = model(test_points).squeeze(1)
    accuracy = ((outputs > 0) == (test_labels > 0)).float().mean()
    print(f"accuracy {accuracy.item():.3f}")
    print(f"final loss {criterion(outputs, test_labels).item():.4f}")


if __name__ == "__main__":
    main()

"""Handwritten-like digits with a small convolutional network and SGD, as in everybody's first script."""

import torch
from torch import nn, optim
from torch.nn import functional as F

FONT = """
01110 00100 01110 11111 00010 11111 00110 11111 01110 01110
10001 01100 10001 00010 00110 10000 01000 00001 10001 10001
10011 00100 00001 00100 01010 11110 10000 00010 10001 10001
10101 00100 00010 00010 10010 00001 11110 00100 01110 01111
11001 00100 00100 00001 11111 00001 10001 01000 10001 00001
10001 00100 01000 10001 00010 10001 10001 01000 10001 00010
01110 01110 11111 01110 00010 01110 01110 01000 01110 01100
"""


def digits(count):
    """Draw digits of the font at random places, thick or thin, in noise."""
    rows = [line.split() for line in FONT.split("\n") if line]
    glyphs = torch.tensor([[[float(c) for c in row[digit]] for row in rows] for digit in range(10)])
    labels = torch.randint(10, (count,))
    images = torch.zeros(count, 1, 14, 14)
    big = F.interpolate(glyphs[:, None], scale_factor=(1.5, 2), mode="bilinear")
    tops, lefts = torch.randint(5, (count,)).tolist(), torch.randint(5, (count,)).tolist()
    for image, label, top, left in zip(images, labels.tolist(), tops, lefts, strict=True):
        image[:, top : top + 10, left : left + 10] = big[label]
    return images + 0.25 * torch.randn(images.shape), labels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.fc1 = nn.Linear(16 * 5 * 5, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def main():
    torch.manual_seed(0)
    train, test = digits(2000), digits(500)
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), batch_size=50, shuffle=True)
    for epoch in range(4):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        scheduler.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        outputs = model(test[0])
    accuracy = (outputs.argmax(1) == test[1]).float().mean()
    print(f"accuracy {accuracy.item():.3f}")
    print(f"final loss {F.cross_entropy(outputs, test[1]).item():.4f}")


if __name__ == "__main__":
    main()

"""Word vectors by negative sampling: large embeddings, few rows of which have gradients, with SparseAdam."""

import collections
import pydoc_data.topics
import re

import torch
from torch.nn import Embedding
from torch.nn import functional as F
from torch.optim import SparseAdam

WIDTH, NEGATIVES, BATCH, STEPS = 32, 5, 512, 150


def main():
    torch.manual_seed(0)
    words = re.findall(r"[a-z]+", " ".join(pydoc_data.topics.topics.values()).lower())
    counts = collections.Counter(words)
    vocabulary = {word: index for index, (word, _) in enumerate(counts.most_common())}
    text = torch.tensor([vocabulary[word] for word in words])
    weights = torch.tensor([float(count) for _, count in counts.most_common()]) ** 0.75

    centre = Embedding(len(vocabulary), WIDTH, sparse=True)
    context = Embedding(len(vocabulary), WIDTH, sparse=True)
    torch.nn.init.normal_(centre.weight, std=0.1)
    torch.nn.init.zeros_(context.weight)
    optimizer = SparseAdam([*centre.parameters(), *context.parameters()], lr=0.01)

    losses = []
    for step in range(STEPS):
        places = torch.randint(2, len(text) - 2, (BATCH,))
        near = places + torch.tensor([-2, -1, 1, 2])[torch.randint(4, (BATCH,))]
        others = torch.multinomial(weights, BATCH * NEGATIVES, replacement=True).view(BATCH, NEGATIVES)
        vectors = centre(text[places])
        positive = (vectors * context(text[near])).sum(1)
        negative = torch.einsum("bw,bnw->bn", vectors, context(others))
        loss = -F.logsigmoid(positive).mean() - F.logsigmoid(-negative).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    print(f"final loss {sum(losses[-20:]) / 20:.4f}")


if __name__ == "__main__":
    main()

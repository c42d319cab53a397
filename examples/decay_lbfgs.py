"""Fits the rates and amplitudes of overlapping decays to noisy measurements with LBFGS."""

import torch
import torch.optim


def main():
    torch.manual_seed(0)
    time = torch.linspace(0, 5, 400, dtype=torch.float64)
    true_rates, true_amplitudes = torch.tensor([0.4, 2.5]), torch.tensor([1.0, 3.0])
    measured = (true_amplitudes * torch.exp(-true_rates * time[:, None])).sum(1) + 0.01 * torch.randn(len(time))

    rates = torch.nn.Parameter(torch.tensor([0.1, 1.0], dtype=torch.float64))
    amplitudes = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([rates, amplitudes], lr=1, max_iter=10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        model = (amplitudes * torch.exp(-rates * time[:, None])).sum(1)
        loss = torch.mean((model - measured) ** 2)
        loss.backward()
        return loss

    for _ in range(8):
        loss = optimizer.step(closure)
    print("rates", [round(rate, 3) for rate in rates.tolist()])
    print("amplitudes", [round(amplitude, 3) for amplitude in amplitudes.tolist()])
    print(f"loss at the start of the last step {loss.item():.8f}")
    print(f"final loss {closure().item():.8f}")


if __name__ == "__main__":
    main()

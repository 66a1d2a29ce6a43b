"""Training steps on small random batches."""

import torch


def batch(seed=1, size=8):
    """Images (B, 1, 32, 32) and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator)


def train(task, optimizer, steps, first=0, size=8):
    """Losses of some steps; each has a batch of its own."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        torch.manual_seed(step)  # distillers have dropout
        loss = task(*batch(step, size))['loss']
        loss.backward()
        optimizer.step()
        task.update_ema(step + 1)
        losses.append(loss.item())
    return losses

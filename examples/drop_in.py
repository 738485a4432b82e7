"""`afd_fast.nft_loss` in a trainer of your own, in one file: a flow model that learns to draw points near (1, 1).

python examples/drop_in.py
"""

import sys

import torch
from torch import nn

import afd_fast

PROMPTS, K = ["left", "right"], 16  # K rollouts per prompt


def main(iterations=300):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    tracker = afd_fast.PerPromptStatTracker()
    prompts = [p for p in PROMPTS for _ in range(K)]
    words = torch.tensor([[float(p == "right")] for p in prompts])

    def velocity(x, t):
        return model(torch.cat([x, words, t[:, None]], 1))

    def rollout():
        x = torch.randn(len(prompts), 2)
        for step in range(8, 0, -1):  # Euler from noise (t = 1) to data (t = 0)
            x = x - velocity(x, torch.full((len(x),), step / 8)) / 8
        return x

    for iteration in range(iterations):
        with torch.no_grad():
            x0 = rollout()
        rewards = -(x0 - 1).square().sum(1)
        tracker.clear()
        r = afd_fast.reward_to_r(tracker.update(prompts, rewards), clip=5.0)  # optimality in [0, 1]
        t = torch.rand(len(x0)) * 0.9 + 0.1
        x_t = afd_fast.forward_noise(x0, t, seed=iteration)
        loss = afd_fast.nft_loss(velocity(x_t, t), x0, r, t, seed=iteration, recipe="afd")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 50 == 0 or iteration == iterations - 1:
            print(f"iteration {iteration:3d}: mean reward {rewards.mean():.3f}")
    return rewards.mean().item()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    main()

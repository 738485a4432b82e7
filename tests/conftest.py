import pytest
import torch

from afd_fast.config import TrainConfig
from afd_fast.teachers import physics


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config():
    """Four iterations, one of them warm-up: seconds, not minutes."""
    return TrainConfig(
        name="tiny", iterations=4, disc_warmup=1, teacher_clips=1, prompts_per_step=3, rollouts_per_prompt=2,
        eval_every=2, eval_rollouts=2, checkpoint_every=2, lora_rank=4,
    )  # fmt: skip


@pytest.fixture
def few_prompts(monkeypatch):
    """The physics world with six training and two held-out prompts."""
    prompts = physics.all_prompts()
    monkeypatch.setattr(physics, "split_prompts", lambda: (prompts[:60:10], prompts[5:50:30]))

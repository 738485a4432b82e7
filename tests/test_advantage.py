"""Advantages, r, and the Bradley-Terry loss."""

import warnings

import numpy as np
import pytest
import torch

import afd_fast


def trainers_tracker(prompts, rewards, global_std):
    """DiffusionNFT flow_grpo/stat_tracking.py:5-40 for one call, transcribed."""
    prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
    advantages = np.empty_like(rewards)
    for prompt in np.unique(prompts):
        mine = rewards[prompts == prompt]
        mean = np.mean(mine, axis=0, keepdims=True)
        std = np.std(rewards if global_std else mine, axis=0, keepdims=True) + 1e-4
        advantages[prompts == prompt] = (mine - mean) / std
    return advantages


@pytest.mark.parametrize("global_std", [True, False])
@pytest.mark.parametrize("shape", [(24,), (24, 5)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_statistics_equal_the_trainers(global_std, shape, scale):
    rewards = scale * np.random.default_rng(0).normal(size=shape) + scale
    prompts = [f"p{i % 5}" for i in range(24)]
    expected = trainers_tracker(prompts, rewards, global_std)
    tracker = afd_fast.PerPromptStatTracker(global_std)
    np.testing.assert_allclose(tracker.update(prompts, rewards), expected, rtol=1e-9, atol=1e-12)
    tracker.clear()
    again = tracker.update(prompts, torch.from_numpy(rewards))
    assert isinstance(again, torch.Tensor) and again.dtype == torch.float64
    np.testing.assert_allclose(again, expected, rtol=1e-9, atol=1e-12)


def test_second_update_without_clear_uses_the_history():
    tracker = afd_fast.PerPromptStatTracker(global_std=False)
    tracker.update(["a", "a"], [0.0, 1.0])
    second = tracker.update(["a", "a"], [2.0, 3.0])
    history = np.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(second, (history[2:] - history.mean()) / (history.std() + 1e-4), rtol=1e-12)


def test_single_rollout_gives_zero_and_one_warning():
    tracker = afd_fast.PerPromptStatTracker()
    with pytest.warns(UserWarning, match="single rollout") as caught:
        assert (tracker.update(["a", "b"], [1.0, 5.0]) == 0).all()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.update(["c"], [1.0])
    with pytest.raises(ValueError, match="2 prompts for rewards"):
        tracker.update(["a", "b"], [1.0])


A = torch.tensor([-7.0, -5.0, -1.0, 0.0, 2.0, 5.0, 9.0], dtype=torch.float64)


@pytest.mark.parametrize("mode,expected", [
    ("continuous", [0, 0, 0.4, 0.5, 0.7, 1, 1]), ("positive_only", [0.5, 0.5, 0.5, 0.5, 0.7, 1, 1]),
    ("negative_only", [0, 0, 0.4, 0.5, 0.5, 0.5, 0.5]), ("one_only", [0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6]),
    ("binary", [0.4, 0.4, 0.4, 0.5, 0.6, 0.6, 0.6]),
])  # fmt: skip
def test_reward_to_r(mode, expected):
    torch.testing.assert_close(afd_fast.reward_to_r(A, mode=mode), torch.tensor(expected, dtype=torch.float64))


def test_rewards_of_any_dtype_become_r():
    """From the tracker straight to r: bfloat16 tensors, and NumPy arrays, also read-only and reversed ones."""
    rewards = torch.tensor([1.0, 3.0, -2.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    prompts, tracker = ["a", "a", "b", "b"], afd_fast.PerPromptStatTracker()
    of_tensor = tracker.update(prompts, rewards)
    tracker.clear()
    of_array = tracker.update(prompts, rewards.detach().float().numpy())
    assert of_tensor.dtype == torch.float64 and np.array_equal(of_tensor.numpy(), of_array)
    r = afd_fast.reward_to_r(of_array)
    assert isinstance(r, np.ndarray) and np.array_equal(r, afd_fast.reward_to_r(of_tensor).numpy())
    of_array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(afd_fast.reward_to_r(of_array[::-1]), r[::-1])


def test_reward_to_r_asymmetric_clip_and_errors():
    r = afd_fast.reward_to_r(A, clip=(-2.0, 4.0))  # cosmos-rl: clamp to (low, high), divide by high
    torch.testing.assert_close(r, (A.clamp(-2, 4) / 4 / 2 + 0.5).clamp(0, 1))
    for bad in (0.0, -1.0, (1.0, 2.0)):
        with pytest.raises(ValueError, match="clip must span zero"):
            afd_fast.reward_to_r(A, clip=bad)
    with pytest.raises(ValueError, match="mode must be one of"):
        afd_fast.reward_to_r(A, mode="all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bt_loss(dtype):
    teacher = torch.tensor([1e4, -1e4, 0.0, 3.0], dtype=dtype).requires_grad_()
    student = torch.tensor([-1e4, 1e4, 0.0, 1.0], dtype=dtype).requires_grad_()
    loss = afd_fast.bt_loss(teacher, student)
    margin = teacher.detach().double() - student.detach().double()
    torch.testing.assert_close(loss.double(), torch.nn.functional.softplus(-margin).mean(), rtol=1e-6, atol=0)
    loss.backward()
    exact = -torch.sigmoid(-margin) / 4
    torch.testing.assert_close(teacher.grad.double(), exact, rtol=1e-2, atol=1e-6)
    assert torch.equal(teacher.grad, -student.grad) and loss.isfinite()
    with pytest.raises(ValueError, match="paired by prompt"):
        afd_fast.bt_loss(teacher, student[:2])

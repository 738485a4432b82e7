import json

import pytest
import torch

from afd_fast.config import TrainConfig, keys, to_dict, with_overrides, with_values
from afd_fast.errors import ConfigError
from afd_fast.reference.nft import nft_recipe
from afd_fast.training import runs
from afd_fast.training.trainer import new_run


def test_overrides_are_typed():
    config = with_overrides(
        TrainConfig(),
        [
            "update.lr=1e-3",
            "iterations=70",
            "rollout.steps=1000,500",
            "update.lr_decay=false",
            "codec_crf=23",
            "loss=afd",
        ],
    )
    assert (config.update.lr, config.iterations, config.rollout.steps) == (1e-3, 70, (1000.0, 500.0))
    assert config.update.lr_decay is False and config.codec_crf == 23 and config.loss == nft_recipe("afd")
    assert with_overrides(config, ["codec_crf=none"]).codec_crf is None
    assert with_overrides(config, ["loss.name=gardo"]).loss == nft_recipe("gardo")  # its constants, not the name alone


@pytest.mark.parametrize(
    "item, message",
    [
        ("student_lr=1", "did you mean 'update.lr'"),
        ("disc_lr=1", "did you mean 'discriminator.lr'"),
        ("update.lrr=1", "did you mean 'update.lr'"),
        ("prior_weight=1", "did you mean 'loss.ref_coef'"),
        ("recipe=afd", "did you mean 'loss'"),
        ("nonsense=1", "afd-fast keys"),
        ("loss=afdd", "did you mean 'afd'"),
        ("loss.beta=0", "loss.beta must be positive"),
        ("loss.adv_clip=1,2,3", "two numbers"),
        ("rollout.steps=250,500", "rollout.steps must fall"),
        ("rollout.shift=nan", "rollout.shift must be a finite number"),
        ("rollout.chunk=4", "rollout.chunk=3"),
        ("rollout.window=6", "need a Wan student"),
        ("rollout.fuse_cache_pass=true", "chunks of any size"),
        ("rollout.independent_first_frame=true", "for generation"),
        ("student.frames=9", "student.frames has no meaning for the student 'toy'"),
        ("student.lora_rank=-1", "student.lora_rank must be at least 0"),
        ("discriminator.steps=0", "discriminator.steps must be at least 1"),
        ("discriminator.lora_rank=4", "discriminator.lora_rank has no meaning for the discriminator 'toy'"),
        ("discriminator.device=cudda", "discriminator.device must be one of PyTorch's"),
        ("discriminator.r1=-1", "discriminator.r1 must be at least 0"),
        ("discriminator.warmup=300", "set discriminator.warmup below 300"),
        ("iterations=20", "discriminator.warmup=20 leaves none of iterations=20"),
        ("update.ema=2", "update.ema must be in"),
        ("update.grad_norm=-1", "update.grad_norm must be positive"),
        ("update.batch=0", "update.batch must be at least 1"),
        ("evaluation.batch=0", "evaluation.batch must be at least 1"),
        ("codec_crf=99", "codec_crf must be in 0..51"),
        ("seed=-1", "seed must be at least 0"),
        (f"seed={2**63}", "seed must be below"),
        ("name= ", "name must be that of a folder"),
        ("rollout.shift=1e39", "rollout.shift=1e.39 gives the steps .* stay above 0"),
        ("rollout.steps=1000,0.5", "must fall and stay above 0"),
        ("rollout.steps=500.7,500.2", "must fall and stay above 0"),
        ("rollout.first_chunk_steps=0.5", "must fall and stay above 0"),
        ("discriminator.device=meta", "device must be one of PyTorch's"),
        ("method=ppo", "method must be"),
        ("iterations=many", "iterations=many"),
        ("update.lr_decay=perhaps", "true or false"),
        ("iterations", "key=value"),
        ("update.v_old=new", "v_old must be"),
        ("rollouts_per_prompt=1", "at least 2"),
        ("teacher_r=0.5", "above 0.5 and at most 1"),
        ("teacher_r=1.1", "above 0.5 and at most 1"),
        ("iterations=0", "at least 1"),
    ],
)
def test_bad_overrides_say_what_to_do(item, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(TrainConfig(), [item])


def test_runs_by_name_and_round_trip():
    for name in runs.RUNS:
        config = runs.get(name)
        assert config.name == name and with_values(TrainConfig(), json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match="did you mean 'demo_lagged'"):
        runs.get("demo_laged")


def test_what_a_stream_cannot_be_combined_with():
    keys = ["student=tiny", "rollout.graphs=true"]
    with pytest.raises(ConfigError, match="leave out one of it and stream.frames"):
        with_overrides(TrainConfig(), [*keys, "stream.frames=12"])
    with pytest.raises(ConfigError, match="needs update.history=detached, got teacher_forcing"):
        with_overrides(TrainConfig(), ["student=tiny", "stream.frames=12", "update.history=teacher_forcing"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA graphs, and the student is on cpu"):
            new_run(with_overrides(TrainConfig(), [*keys, "rollout.chunk=3"]))


def test_a_teachers_clip_joins_whole_rollouts_of_afd_alone():
    for given, message in (
        (["method=sft"], "teacher_r needs method=afd"),
        (["student=tiny", "stream.frames=42"], "leave out stream.frames"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_overrides(TrainConfig(), [*given, "teacher_r=1"])


@pytest.mark.parametrize("method", ["sft", "gan", "dmd", "rejection"])
def test_rewards_are_permuted_where_they_are_used(method):
    with pytest.raises(
        ConfigError, match=f"shuffle_rewards permutes the advantages of method=afd, got method={method}"
    ):
        with_overrides(TrainConfig(), [f"method={method}", "shuffle_rewards=true"])


def test_every_key_has_a_meaning():
    assert [key.name for key in keys(TrainConfig()) if not key.meaning] == []


def test_a_method_without_a_discriminator_needs_no_iteration_after_the_warm_up():
    assert with_overrides(TrainConfig(), ["method=sft", "iterations=5"]).iterations == 5


def test_short_forms_set_a_parts_name_or_all_of_a_recipe():
    config = with_overrides(TrainConfig(), ["student=tiny", "discriminator=some/folder", "loss=afd", "loss.beta=0.2"])
    assert config.student.name == "tiny" and config.discriminator.name == "some/folder"
    assert config.loss == nft_recipe("afd", beta=0.2)


@pytest.mark.parametrize(
    "given", [["loss.form=dpo"], ["loss.drift_clip=0.1"], ["loss.ref_reduction=batch"], ["loss.space=clean"]]
)
def test_losses_that_are_no_sum_over_chunks_are_refused(given):
    with pytest.raises(ConfigError, match=given[0].split("=")[0] + " must be .* in training"):
        with_overrides(TrainConfig(), given)
    assert with_overrides(TrainConfig(), ["loss=diffusionnft", "loss.shared_weight=true"]).loss.shared_weight

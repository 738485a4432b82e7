"""Sampler settings as a part of the student: presets, config.json in and out, and the training that follows them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from afd_fast.cli.main import app
from afd_fast.config import TrainConfig, with_overrides
from afd_fast.errors import ConfigError
from afd_fast.reference.schedule import step_table
from afd_fast.rollout import RolloutConfig, rollout
from afd_fast.sampler import PRESETS, of_config
from afd_fast.students import CausalWan, CausalWanConfig, load_student, save_student
from afd_fast.training.update import noised
from afd_fast.training.velocity import Chunking, chunk_velocities


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).eval()


def test_every_preset_is_a_configuration():
    for name in PRESETS:
        config = RolloutConfig.preset(name)
        assert all(getattr(config, key) == value for key, value in PRESETS[name].items())
    assert RolloutConfig.preset("longlive", sink=1).sink == 1
    with pytest.raises(ConfigError, match="unknown preset 'wan'; known: self_forcing"):
        RolloutConfig.preset("wan")


def test_steps_on_the_schedule():
    """As the official lookup: t is the step itself, sigma that of the nearest of the 1000 shifted times."""
    table = step_table((1000, 757, 522), 8.0, warp=False)
    raw = torch.linspace(1, 0, 1001)[:-1]
    sigmas = 8 * raw / (1 + 7 * raw)
    for (t, sigma), step in zip(table, (1000, 757, 522)):
        assert t == step and sigma == sigmas[(sigmas * 1000 - step).abs().argmin()] and abs(sigma - step / 1000) < 1e-3
    assert table != step_table((1000, 757, 522), 8.0)


def test_a_zero_at_the_end_is_left_out():
    config = RolloutConfig(steps=(1000, 757, 522, 0), warp=False, first_chunk_steps=(1000, 500, 0))
    assert config.steps == (1000, 757, 522) and config.first_chunk_steps == (1000, 500)
    for steps in ((0,), (1000, 0, 0), (1000, 0, 500)):
        with pytest.raises(ConfigError, match="steps must fall"):
            RolloutConfig(steps=steps)


@pytest.mark.parametrize("settings,sampler", [
    ({"local_attn_size": -1, "sink_size": 0}, {}),
    ({"local_attn_size": 12, "sink_size": 3, "num_frames_per_block": 3}, {"window": 12, "sink": 3, "chunk": 3}),
    ({"local_attn_size": -1, "num_frames_per_block": 1, "rope_cache_policy": "relativistic"}, {"chunk": 1}),
    ({"local_attn_size": 9, "sink_size": 3, "rope_cache_policy": "relativistic"}, {"window": 9, "sink": 3, "rope": "relative"}),
    ({"num_layers": 2}, {}),
    ({"local_attn_size": None, "sink_size": None, "num_frames_per_block": None, "rope_cache_policy": None}, {}),
])  # fmt: skip
def test_what_config_json_says(settings, sampler):
    assert of_config(settings) == sampler


def test_config_json_that_makes_no_sense():
    for settings, match in (
        ({"local_attn_size": "12"}, "local_attn_size in config.json must be a whole number"),
        ({"sink_size": True}, "sink_size in config.json must be a whole number"),
        ({"rope_cache_policy": "block_relativistic"}, "rope_cache_policy='block_relativistic'"),
        ({"sampler": [1]}, "sampler in config.json must hold settings"),
    ):
        with pytest.raises(ConfigError, match=match):
            of_config(settings)
    with pytest.raises(ConfigError, match="sampled with speed=9, which is not known here"):
        RolloutConfig.of({"speed": 9})


def test_saved_and_loaded(model, tmp_path):
    """A student keeps its settings, and a rollout without a configuration follows them."""
    config = RolloutConfig.preset("causal_forcing_pp_2step", window=4, sink=1, context_noise=20.0)
    save_student(model, tmp_path / "a", sampler=config.sampler())
    student = load_student(tmp_path / "a")
    assert RolloutConfig.of(student.sampler) == config
    save_student(student, tmp_path / "b")
    assert RolloutConfig.of(load_student(tmp_path / "b").sampler) == config
    g = torch.Generator().manual_seed(1)
    noise, words = torch.randn(1, 16, 6, 4, 4, generator=g), torch.randn(1, 3, 24, generator=g)
    with torch.no_grad():
        text = student.encode_text(words)
        sampled = [
            rollout(student, text, noise, *given, generator=torch.Generator().manual_seed(2))
            for given in ((), (config,), (RolloutConfig(chunk=1),))
        ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    save_student(model, tmp_path / "c")
    assert load_student(tmp_path / "c").sampler == {} and "sampler" not in json.loads(
        (tmp_path / "c/config.json").read_text()
    )


def test_a_run_takes_a_preset():
    config = with_overrides(
        TrainConfig(student=replace(TrainConfig().student, name="tiny")), ["rollout=longlive", "rollout.sink=1"]
    )
    assert config.rollout == RolloutConfig.preset("longlive", sink=1)
    with pytest.raises(ConfigError, match="unknown preset"):
        with_overrides(TrainConfig(), ["rollout=longlife"])
    wrong = ["student=tiny", "rollout.context_noise=50", "update.history=teacher_forcing"]
    with pytest.raises(ConfigError, match='context_noise=50.* needs update.history="detached"'):
        with_overrides(TrainConfig(), wrong)


@torch.no_grad()
def test_the_update_has_the_samplers_context_noise(model):
    """Clean chunks enter the cache at the sampler's t."""
    g = torch.Generator().manual_seed(3)
    x, clean = torch.randn(2, 1, 16, 4, 4, 4, generator=g)
    text, t = model.encode_text(torch.randn(1, 3, 24, generator=g)), torch.full((1, 4), 0.5)
    found = torch.cat([v for _, v in chunk_velocities(model, x, t, text, clean, Chunking(2, context_noise=80.0))], 2)
    cache = model.new_cache(1, 4, 4, 4)
    expected = []
    for start in (0, 2):
        part = slice(start, start + 2)
        expected.append(model(x[:, :, part], t[:, part] * 1000, text, cache=cache, start_frame=start))
        model(clean[:, :, part], torch.full((1, 2), 80.0), text, cache=cache, start_frame=start)
    assert torch.equal(found, torch.cat(expected, 2))
    assert not torch.equal(found, torch.cat([v for _, v in chunk_velocities(model, x, t, text, clean, Chunking(2))], 2))


def test_the_first_chunk_is_trained_at_its_own_steps():
    class Run:
        """What `noised` reads of a run."""

        class family:
            chunk = 2

        sampler = RolloutConfig(steps=(1000,), first_chunk_steps=(600, 300), chunk=2, warp=False)
        config = TrainConfig()

    x0 = torch.zeros(64, 1, 6, 1, 1)
    t = noised(Run, x0, torch.Generator().manual_seed(0)).t
    levels = [step.sigma for step in step_table((600, 300), 5.0, warp=False)]
    assert torch.equal(t[:, 2:], torch.ones(64, 4)) and torch.equal(t[:, 0], t[:, 1])
    assert {round(v, 6) for v in t[:, 0].tolist()} == {round(v, 6) for v in levels}


def test_a_run_knows_its_students_sampler(tmp_path, caplog):
    """A run that samples otherwise than the checkpoint says so, and what it trained carries the run's own settings."""
    from afd_fast.config import to_dict
    from afd_fast.students.student import StudentConfig, TrainedWeights
    from afd_fast.students.wan.family import save_run, wan_family
    from afd_fast.training.trainer import new_run

    config = with_overrides(
        TrainConfig(), ["student=tiny", "student.frames=6", "rollout=longlive", "rollout.graphs=false"]
    )
    family = wan_family(StudentConfig("tiny", frames=6))
    family.student.sampler = {"window": 9, "sink": 3}
    merged = {k: v.clone() for k, v in family.student.state_dict().items()}
    new_run(replace(config, student=StudentConfig("tiny")), family)
    assert (
        "the student's checkpoint says window=9, the run has rollout.window=12" in caplog.text
        and "sink" not in caplog.text
    )
    save_run(family.student, TrainedWeights(merged, {}), to_dict(config), tmp_path)
    assert RolloutConfig.of(load_student(tmp_path / "student").sampler) == config.rollout


@torch.no_grad()
def test_guidance(model):
    """Scale 1 is the prompt alone and scale 0 the negative prompt, each given the same history; frames to continue from are
    given to both, once for all samples; refused where one of prompt and scale is missing."""
    g = torch.Generator().manual_seed(4)
    noise, initial = torch.randn(2, 16, 4, 4, 4, generator=g), torch.randn(1, 16, 2, 4, 4, generator=g)
    given, negative = (model.encode_text(torch.randn(1, 3, 24, generator=g)) for _ in range(2))
    few = RolloutConfig(steps=(1000, 500), chunk=2, window=4, sink=1)

    def sample(text, config, **more):
        generator = torch.Generator().manual_seed(5)
        return rollout(model, text, noise, config, generator=generator, initial_latent=initial, **more)

    for scale, alone in ((1.0, given), (0.0, negative)):
        found = sample(given, replace(few, guidance=scale), negative=negative)
        assert torch.allclose(found, sample(alone, few), atol=1e-5)
    assert not torch.allclose(sample(given, replace(few, guidance=3.0), negative=negative), found, atol=1e-2)
    fused = sample(given, replace(few, guidance=3.0, fuse_cache_pass=True), negative=negative)
    assert torch.allclose(sample(given, replace(few, guidance=3.0), negative=negative), fused, atol=1e-4)
    for config, more in ((few, {"negative": negative}), (replace(few, guidance=3.0), {})):
        with pytest.raises(ValueError, match="belong together"):
            sample(given, config, **more)
    two = model.encode_text(torch.randn(2, 3, 24, generator=g))
    with pytest.raises(ValueError, match="needs one prompt, got 2"):
        sample(given, replace(few, guidance=3.0), negative=two)


def test_unipc_and_guidance_are_for_generation(model):
    with pytest.raises(ConfigError, match="leave out steps"):
        RolloutConfig(steps=(1000, 500), unipc_steps=4)
    with pytest.raises(ConfigError, match="leave out one of graphs and guidance"):
        RolloutConfig(guidance=3.0, graphs=True)
    for key in ("rollout=ar_diffusion", "rollout.unipc_steps=4", "rollout.guidance=3"):
        with pytest.raises(ConfigError, match="for generation"):
            with_overrides(TrainConfig(student=replace(TrainConfig().student, name="tiny")), [key])
    noise, text = torch.zeros(1, 16, 2, 4, 4), model.encode_text(torch.zeros(1, 3, 24))
    with pytest.raises(ValueError, match="grad_last_step needs"):
        rollout(model, text, noise, RolloutConfig(unipc_steps=2, chunk=2), grad_last_step=True)


class TestCommands:
    """`afd-fast rollout` and `eval export` say what the library can; what cannot be is refused before anything is made."""

    @pytest.fixture
    def prompts(self, tmp_path):
        (tmp_path / "p.txt").write_text("a red ball\n")
        return tmp_path / "p.txt"

    def call(self, *words):
        done = CliRunner().invoke(app, list(map(str, words)))
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    def videos(self, folder):
        from afd_fast.video_io import read_video

        return {p.name: tuple(read_video(p).shape) for p in sorted(folder.glob("*.mp4"))}

    def test_rollout(self, prompts, tmp_path):
        tiny = ("rollout", "--config", "tiny", "--prompts", prompts, "--out")
        self.call(
            *tiny, tmp_path / "a", "--preset", "causal_forcing_pp_1step", "--frames", 2, "--size", "32x48", "--fps", 8
        )
        assert self.videos(tmp_path / "a") == {"0000-a-red-ball.mp4": (3, 5, 32, 48)}
        self.call(*tiny, tmp_path / "b", "--steps", "900,300,0", "--no-warp", "--window", 4, "--sink", 1, "--chunk", 2,
                  "--frames", 4, "--seeds", "5,0", "--size", "32x32", "--first-chunk-steps", "1000,500,250")  # fmt: skip
        assert list(self.videos(tmp_path / "b")) == ["0000-a-red-ball-0.mp4", "0000-a-red-ball-5.mp4"]
        guided = ("--preset", "ar_diffusion", "--unipc-steps", 2, "--guidance", 2, "--frames", 3, "--size", "32x32")
        for name, words in (("c", ()), ("d", ("--negative", "blurred"))):
            self.call(*tiny, tmp_path / name, *guided, *words)
        assert len({(tmp_path / name / "0000-a-red-ball.mp4").read_bytes() for name in "cd"}) == 2

    @pytest.mark.parametrize("words,match", [
        (("--preset", "wan"), "unknown preset"), (("--size", "480"), "--size takes HEIGHTxWIDTH in multiples of 16"),
        (("--size", "40x64"), "such as 480x832"), (("--steps", "1000,x"), "--steps takes numbers"),
        (("--first-chunk-steps", ""), "--first-chunk-steps takes numbers"), (("--sink", 2), "needs a window"),
        (("--steps", "250,1000"), "steps must fall"), (("--seeds", "1,1"), "--seeds takes different"),
        (("--seeds", "-1"), "--seeds takes different"), (("--lora", "a.pt"), "a.pt"), (("--fps", "0"), "fps must be"),
        (("--negative", "blurred"), "set --guidance"), (("--preset", "causvid", "--unipc-steps", 9), "leave out steps"),
        (("--preset", "longlive", "--frames", 4), "4 latent frames do not divide into chunks of 3"), (("--window", 0), "window must be"),
        (("--preset", "streamdiffusionv2_v2v"), "the steps begin at t = 700, from a video noised to level 0.70"),
        (("--steps", "1000,1", "--zero-step"), "and zero_step the noise levels"),
    ])  # fmt: skip
    def test_refused_before_anything_is_made(self, prompts, tmp_path, monkeypatch, words, match):
        def not_yet(*_, **__):
            raise AssertionError("loaded")

        monkeypatch.setattr("afd_fast.students.wan.family.load_networks", not_yet)
        calls = [("rollout", "--config", "tiny", "--prompts", prompts, "--out", tmp_path / "out")]
        if words[0] != "--seeds":
            calls.append(("eval", "export", tmp_path / "out", "--prompts", prompts, "--student", "tiny"))
        for call in calls:
            with pytest.raises((ConfigError, FileNotFoundError), match=match):
                self.call(*call, *words)
            assert not (tmp_path / "out").exists()

    def test_export_makes_the_videos_of_rollout(self, prompts, tmp_path):
        """It kept --negative in export.json and did not use it."""
        words = ("--prompts", prompts, "--preset", "ar_diffusion", "--unipc-steps", 2, "--guidance", 2, "--frames", 3, "--size", "32x32",
                 "--negative", "blurred")  # fmt: skip
        self.call("rollout", "--config", "tiny", "--out", tmp_path / "a", *words)
        self.call("eval", "export", tmp_path / "b", "--student", "tiny", *words)
        made = (tmp_path / "b/videos/0000-a-red-ball-0.mp4").read_bytes()
        assert made == (tmp_path / "a/0000-a-red-ball.mp4").read_bytes()

    @pytest.mark.parametrize("words,names", [
        (("--preset", "nonesuch", "--steps", "x"), "--preset, --steps"), (("--no-warp",), "--warp"), (("--batch", 1), "--batch"),
        (("--first-chunk-steps", "1000"), "--first-chunk-steps"), (("--lora", "a.pt", "--base", "b"), "--lora, --base"),
    ])  # fmt: skip
    def test_export_without_a_student_takes_no_sampling(self, prompts, tmp_path, words, names):
        """It took anything, and the folder then refused the command with --student."""
        with pytest.raises(ConfigError, match=f"leave out {names}, or give --student"):
            self.call("eval", "export", tmp_path / "out", "--prompts", prompts, "--n", 2, "--seed", 5, *words)
        assert not (tmp_path / "out").exists()

    def test_export_knows_its_settings(self, prompts, tmp_path):
        make = (
            "eval",
            "export",
            tmp_path / "out",
            "--prompts",
            prompts,
            "--student",
            "tiny",
            "--frames",
            3,
            "--size",
            "32x32",
        )
        self.call(*make, "--preset", "longlive")
        kept = json.loads((tmp_path / "out/export.json").read_text())
        assert (
            kept | {"height": 4, "width": 4, "window": 12, "sink": 3, "steps": [1000, 750, 500, 250], "fps": 16} == kept
        )
        self.call(*make, "--preset", "longlive")  # again: nothing to do
        with pytest.raises(ConfigError, match="other prompts or settings"):
            self.call(*make, "--preset", "self_forcing")

    def test_the_student_says(self, model, prompts, tmp_path, monkeypatch):
        """Without a preset a command follows the checkpoint's config.json."""
        save_student(model, tmp_path / "student", sampler=RolloutConfig.preset("longlive").sampler())
        (tmp_path / "base/vae").mkdir(parents=True)
        (tmp_path / "base/vae/config.json").write_text(
            json.dumps({"_class_name": "AutoencoderKLWan", "z_dim": 48, "patch_size": 2})
        )
        seen = []
        monkeypatch.setattr(
            "afd_fast.generate.generate",
            lambda networks, todo, out, options, config, **_: seen.append((options, config)),
        )
        monkeypatch.setattr(
            "afd_fast.students.wan.family.load_networks", lambda *_, **__: SimpleNamespace(student=None)
        )
        with pytest.raises(AttributeError):  # `generate` above returns no statistics
            self.call("rollout", "--student", tmp_path / "student", "--base", tmp_path / "base", "--prompts", prompts,
                      "--out", tmp_path / "o", "--frames", 3, "--sink", 1, "--size", "704x1280")  # fmt: skip
        ((options, config),) = seen
        assert config == RolloutConfig.preset("longlive", sink=1)
        assert (options.height, options.width, options.fps) == (44, 80, 24)  # the VAE of Wan 2.2

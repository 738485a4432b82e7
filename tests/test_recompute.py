"""The context computed anew before each chunk (Krea): what each forward is given, whose latent comes first, videos, refusals.
And chunks without a cache pass (StreamDiffusionV2).

The numbers against Krea's server and StreamDiffusionV2's pipeline are in tests/test_official_rollouts.py."""

import copy
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from afd_fast.cli.main import app
from afd_fast.config import TrainConfig, with_overrides
from afd_fast.errors import ConfigError
from afd_fast.generate import GenerateOptions, _noise, generate, jobs
from afd_fast.rollout import RolloutConfig, rollout, stream
from afd_fast.students import CausalWan, CausalWanConfig, TwoExperts, load_student, save_student
from afd_fast.students.wan.experts import ExpertTexts
from afd_fast.students.wan.family import tiny
from afd_fast.students.wan.graphs import GraphedStudent
from tests.test_graphs import Recorder
from tests.test_prompt_schedule import Watched, inputs

CONFIG = RolloutConfig(steps=(1000,), window=9, recompute=True)
KREA = RolloutConfig.preset("krea")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CausalWan(CausalWanConfig.tiny()).double().requires_grad_(False)


class Marked:
    """`first_frame` that gives -1, -2, ... and keeps what it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, latents):
        self.seen.append(latents)
        return torch.full_like(latents[:, :, :1], -len(self.seen))


class Recorded(Watched):
    """And the latents of every forward."""

    def __call__(self, x, *args, **options):
        self.inputs = [*getattr(self, "inputs", []), x]
        return super().__call__(x, *args, **options)


def test_what_each_forward_is_given(model):
    """Whole chunks at positions from 0 on, under the text of the chunk before; the chunk right after them."""
    noise, draws, texts = inputs(model, frames=15)
    watched, marked = Recorded(model, texts), Marked()
    schedule = [(0, texts[0]), (12, texts[1])]
    video = rollout(watched, schedule, noise, CONFIG, renoise=draws, first_frame=marked)
    clean = lambda *starts: [(start, 3, 0, 0) for start in starts]
    made = lambda start, text=0: [(start, 3, 1000, text)]
    assert watched.calls == [
        *made(0), *clean(0), *made(3), *clean(0, 3), *made(6), *clean(0, 3), *made(6), *clean(0, 3), *made(6, 1)
    ]  # fmt: skip
    chunks, given = video.split(3, 2), watched.inputs
    assert all(torch.equal(a, b) for a, b in zip(marked.seen, chunks, strict=False)) and len(marked.seen) == 4
    for place, chunk in ((1, 0), (3, 0), (4, 1), (7, 2)):  # its own first frame while that is the video's
        assert torch.equal(given[place], chunks[chunk])
    for place, chunk in ((6, 1), (9, 2)):  # then the one that `first_frame` gave for that chunk
        assert torch.equal(given[place][:, :, 1:], chunks[chunk][:, :, 1:])
        assert (given[place][:, :, 0] == -chunk - 1).all()


def test_without_a_first_frame_the_latent_itself_comes_first(model):
    noise, draws, (text, *_) = inputs(model, frames=15)
    own = rollout(model, text, noise, CONFIG, renoise=draws)
    same = rollout(model, text, noise, CONFIG, renoise=draws, first_frame=lambda latents: latents[:, :, :1].float())
    other = rollout(model, text, noise, CONFIG, renoise=draws, first_frame=Marked())
    assert (own - same).abs().max() < 1e-5 and (own - other)[:, :, 9:].abs().max() > 1e-3
    assert torch.equal(own[:, :, :9], other[:, :, :9])


def test_while_nothing_has_left_the_window_it_is_the_cached_rollout(model):
    noise, draws, (text, *_) = inputs(model, frames=9)
    plain = rollout(model, text, noise, replace(CONFIG, recompute=False, window=None), renoise=draws)
    assert (rollout(model, text, noise, CONFIG, renoise=draws) - plain).abs().max() < 1e-12


@pytest.mark.parametrize("sink", [0, 1])
def test_batches_graphs_and_given_frames(model, sink):
    noise, draws, (text, *_) = inputs(model, frames=12, batch=2)
    config = replace(KREA, steps=(1000, 500), sink=sink)
    turned = None if sink else lambda latents: -latents[:, :, :1]
    given = torch.randn(1, 16, 3, 4, 6, dtype=torch.float64)
    options = {"first_frame": turned, "initial_latent": given.expand(2, -1, -1, -1, -1)}
    expected = rollout(model, text, noise, config, renoise=draws, **options)
    graphed = GraphedStudent(model, recorder=Recorder())
    for _ in range(2):
        replayed = rollout(graphed, text, noise, config, renoise=draws, **options)
        assert (replayed - expected).abs().max() < 1e-11
    assert graphed._graphs
    options["initial_latent"] = given
    alone = rollout(model, text[:1], noise[:1], config, renoise=draws[:, :1], **options)
    assert (alone - expected[:1]).abs().max() < 1e-12
    together = rollout(model, text[:1], noise, config, renoise=draws, **options)  # one given video for both
    assert (together[:1] - alone).abs().max() < 1e-12 and torch.equal(together[0, :, :3], together[1, :, :3])


def test_guidance(model):
    """Both prompts' histories are computed anew; at scale 1 the negative one has no say."""
    noise, draws, (text, against, _) = inputs(model, frames=12)
    plain = rollout(model, text, noise, CONFIG, renoise=draws)
    for scale in (1.0, 3.0):
        guided = rollout(model, text, noise, replace(CONFIG, guidance=scale), renoise=draws, negative=against)
        assert ((guided - plain).abs().max() < 1e-9) == (scale == 1)


def test_two_experts(model):
    """Each has its history: two that are the same network are one, from step to step of UniPC."""
    noise, draws, (text, *_) = inputs(model, frames=12)
    config = RolloutConfig(unipc_steps=3, window=9, recompute=True)
    both = TwoExperts(model, copy.deepcopy(model), 875)
    found = rollout(both, ExpertTexts(text, text), noise, config)
    assert (found - rollout(model, text, noise, config)).abs().max() < 1e-11
    with pytest.raises(ConfigError, match="cache_pass=False is for students of one network"):
        rollout(both, ExpertTexts(text, text), noise, RolloutConfig(cache_pass=False))


def test_gradient_of_the_last_step_and_a_noised_history(model):
    noise, draws, (text, *_) = inputs(model, frames=9)
    model.requires_grad_(True)
    config = replace(CONFIG, steps=(1000, 500), context_noise=20.0)
    video = rollout(model, text, noise, config, renoise=draws, grad_last_step=True, first_frame=lambda x: x[:, :, :1])
    (gradient,) = torch.autograd.grad(video.square().mean(), model.head.head.weight)
    model.requires_grad_(False)
    assert gradient.abs().max() > 0
    assert (video - rollout(model, text, noise, config, renoise=draws)).abs().max() < 1e-12
    other = rollout(model, text, noise, replace(config, context_noise=0.0), renoise=draws)
    assert (video - other)[:, :, 3:].abs().max() > 1e-3


def test_without_a_cache_pass(model):
    """The steps alone run; a new prompt may still write the history anew; given frames have their pass."""
    noise, draws, texts = inputs(model, frames=9)
    config, watched = RolloutConfig(steps=(1000, 500), window=6, cache_pass=False), Watched(model, texts)
    schedule, given = [(0, texts[0]), (9, texts[1])], torch.randn(1, 16, 3, 4, 6, dtype=torch.float64)
    steps = lambda start, text=0: [(start, 3, 1000, text), (start, 3, 833, text)]
    found = rollout(watched, schedule, noise, config, renoise=draws, initial_latent=given)
    assert watched.calls == [(0, 3, 0, 0), *steps(3), *steps(6), *steps(9, 1)]
    watched.calls.clear()
    rollout(watched, schedule, noise, config, renoise=draws, initial_latent=given, recache=True)
    assert watched.calls == [(0, 3, 0, 0), *steps(3), *steps(6), (3, 6, 0, 1), *steps(9, 1)]
    graphed = GraphedStudent(model, recorder=Recorder())
    for _ in range(2):
        replayed = rollout(graphed, schedule, noise, config, renoise=draws, initial_latent=given)
        assert (replayed - found).abs().max() < 1e-11
    other = rollout(model, schedule, noise, replace(config, cache_pass=True), renoise=draws, initial_latent=given)
    assert (found - other)[:, :, :6].abs().max() < 1e-12 and (found - other)[:, :, 6:].abs().max() > 1e-3


def test_the_last_step_at_zero():
    """As Krea's server: t = 0, noised to the lowest level of the schedule's thousand."""
    times = [(round(t, 4), round(sigma, 6)) for t, sigma in KREA.timetable()]
    assert times == [(1000, 1), (937.5, 0.9375), (833.3333, 0.833333), (625, 0.625), (0, round(0.005 / 1.004, 6))]
    assert [t for t, _ in replace(KREA, first_chunk_steps=(1000,)).timetable(first=True)] == [1000, 0]


def test_generate_encodes_its_own_pixels(tmp_path):
    """Files as of a rollout with the VAE in its `first_frame`; each frame is diffusers' encoding of one frame of the whole video."""
    networks, written, config = tiny(0, "cpu"), [], replace(KREA, steps=(1000,))
    todo, options = jobs(["a ball", "a cup"]), GenerateOptions(frames=9, height=2, width=4, batch=2)
    generate(networks, todo, tmp_path, options, config, write=lambda path, video, fps: written.append(video))
    text = networks.student.encode_text(networks.text([job.prompt for job in todo]))
    firsts = []

    def sampled(first_frame):
        generators = [torch.Generator().manual_seed(job.seed) for job in todo]
        noise = _noise(networks.student, generators, options)
        with torch.no_grad():
            return rollout(networks.student, text, noise, config, generator=generators, first_frame=first_frame)

    def first_frame(chunk, decoder=networks.vae.stream()):
        firsts.append(networks.vae.reencode(chunk, decoder(chunk)))
        return firsts[-1]

    latents = sampled(first_frame)
    video = networks.vae(latents)
    assert (torch.stack(written) - video).abs().max() < 1e-5
    assert (networks.vae(sampled(None)) - video).abs().max() > 1e-3
    for frame, found in zip((0, 12), firsts, strict=True):
        alone = video[:, :, frame : frame + 1]
        assert (networks.vae.encode(alone) - found).abs().max() < 1e-4 * found.abs().max()


def test_the_command(tmp_path):
    (tmp_path / "p.txt").write_text("a ball\n")
    words = ["rollout", "--config", "tiny", "--preset", "krea", "--frames", "9", "--prompts", str(tmp_path / "p.txt")]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a")])
    assert done.exit_code == 0 and len(list((tmp_path / "a").glob("*.mp4"))) == 1, done.output
    torch.save({}, tmp_path / "taew2_1.pth")
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "b"), "--preview", str(tmp_path / "taew2_1.pth")])
    assert done.exit_code != 0 and "leave out the preview" in str(done.exception) + done.output
    kept = [*words, "--out", str(tmp_path / "c"), "--no-recompute", "--no-zero-step"]
    assert CliRunner().invoke(app, kept).exit_code == 0


def test_saved_with_the_student(model, tmp_path):
    save_student(model, tmp_path / "a", sampler=KREA.sampler())
    assert RolloutConfig.of(load_student(tmp_path / "a").sampler) == KREA


@pytest.mark.parametrize(
    "settings",
    [
        {"window": None}, {"window": 3}, {"window": 8}, {"sink": 2}, {"rope": "relative"}, {"fuse_cache_pass": True},
        {"independent_first_frame": True}, {"chunk": 2},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit(settings):
    with pytest.raises(ConfigError, match="recompute makes the history anew of whole chunks"):
        replace(CONFIG, **settings)


def test_refusals(model):
    noise, _, (a, b, _) = inputs(model, frames=9)

    def refused(match, text=a, config=CONFIG, **options):
        with pytest.raises(ValueError, match=match):
            stream(model, text, noise, config, **options)

    refused("leave out recache", [(0, a), (3, b)], recache=True)
    refused("needs a CausalWan, rope=", scene_cuts=(3,))
    for other in (replace(CONFIG, recompute=False), replace(CONFIG, sink=1)):
        refused("recompute=True and sink=0", config=other, first_frame=Marked())
    for wrong in (lambda latents: latents, lambda latents: None):
        with pytest.raises(
            ValueError, match=r"first_frame must give a latent \(1, 16, 1, 4, 6\) of a chunk \(1, 16, 3, 4, 6\)"
        ):
            rollout(model, a, noise, CONFIG, first_frame=wrong)
    with pytest.raises(ConfigError, match="leave out steps, .*zero_step"):
        RolloutConfig(unipc_steps=4, zero_step=True)
    for settings in ({"recompute": True}, {"recompute": False, "fuse_cache_pass": True}):
        with pytest.raises(ConfigError, match="nothing to recompute or to fuse"):
            replace(CONFIG, cache_pass=False, **settings)
    far = RolloutConfig(window=9, sink=3, rope="relative", cache_pass=False)
    refused("cache_pass=True in its config", config=far, scene_cuts=(3,))
    student = TrainConfig(student=replace(TrainConfig().student, name="tiny"))
    plain = {"recompute": "false", "zero_step": "false", "cache_pass": "true"}
    for preset in ("krea", "streamdiffusionv2"):
        overrides = [f"rollout={preset}", *(f"rollout.{key}={value}" for key, value in plain.items())]
        assert with_overrides(student, overrides).rollout.window == RolloutConfig.preset(preset).window
    for key, value in plain.items():
        other = "true" if value == "false" else "false"
        with pytest.raises(ConfigError, match=f"rollout.{key}: for generation.*set rollout.{key}={value}"):
            with_overrides(
                student, ["rollout=krea", *(f"rollout.{k}={v}" for k, v in plain.items()), f"rollout.{key}={other}"]
            )

"""The public trainers whose loss block `afd_fast.dropin` replaces: where the block is, and the names it runs with.

A block is found by its structure: statements of one body, from the one that begins with `start` to the one that begins with
`end`. `edits` are what the trainer's page in docs/dropin/ deletes, in order. The trainers themselves are not part of this
repository.
"""

import ast
import re
import subprocess
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

SCALE = 2.0**15  # of the loss before backward, as a GradScaler does: a gradient in float16 would be subnormal
PAGES = Path(__file__).parents[1] / "docs/dropin"


class Trainer(NamedTuple):
    page: str  # docs/dropin/{page}.md
    repository: str
    commit: str
    file: str
    start: str
    end: str
    edits: tuple  # (first statement, last statement) of each
    shape: tuple
    env: object  # function of Data -> the names the block reads
    loss: str  # expression for the scalar that backward is called on
    terms: str  # expression for what is logged
    one_dtype: bool = False  # xt has the predictions' dtype; else float32
    wide_x0: bool = False  # x0 is float32


class Data:
    """Inputs of one step. float64 widens every tensor of the same, already rounded, numbers."""

    def __init__(self, trainer, dtype, wide=False):
        g = torch.Generator().manual_seed(0)
        shape, batch = trainer.shape, trainer.shape[0]
        n = lambda scale=1.0: scale * torch.randn(*shape, dtype=torch.float64, generator=g)
        low = lambda x, d=dtype: x.to(d).double() if wide else x.to(d)
        self.low = low
        middle = torch.promote_types(dtype, torch.float32)
        state = dtype if trainer.one_dtype else middle
        x0, noise = n(), n()
        old = noise - x0 + n(0.3)
        self.x0 = low(x0, middle if trainer.wide_x0 else dtype)
        levels = torch.tensor([0.75, 0.3, 0.9, 0.5, 0.1, 0.6, 0.95, 0.2], dtype=torch.float64)[:batch]
        self.t = low(levels if trainer.page != "unirl" else levels[:1].expand(batch), state)
        self.per = lambda x: x.view(-1, *[1] * (len(shape) - 1))
        self.xt = low((1 - self.per(levels)) * x0 + self.per(levels) * noise, state)
        if trainer.page == "unirl":
            self.xt = low((1 - levels[0]) * x0 + levels[0] * noise, state)
        self.old, self.ref = low(old), low(old + n(0.05))
        self.v = low(old + n(0.05))
        if trainer.page == "astrolabe":  # its networks return x0
            self.old, self.ref, self.v = (
                low(x0 + 0.5 * (x.double() - noise + x0)) for x in (self.old, self.ref, self.v)
            )
        self.v.requires_grad_()
        adv = torch.tensor([1.7, -3.9, 0.0, 6.0, -0.2, 2.5, -6.0, 0.7], dtype=torch.float64)[:batch]
        self.adv = adv.to(torch.float64 if wide else middle)
        self.adv64 = adv
        self.flags = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.float64)[:batch]
        self.batch = batch


def names(**values):
    return SimpleNamespace(**values)


def derived(d):
    """DiffusionNFT and the trainers that keep its names."""
    return dict(
        forward_prediction=d.v, old_prediction=d.old, ref_forward_prediction=d.ref, x0=d.x0, xt=d.xt,
        t_expanded=d.per(d.t), j_idx=0, loss_terms={},
        train_sample_batch={"advantages": d.adv64[:, None], "valid_mask": d.flags[:, None] > 0,
                            "reward_std": d.flags[:, None] - 0.5},
        config=names(beta=0.1, train=names(adv_clip_max=3.0, beta=1e-2, adv_mode="continuous")),
    )  # fmt: skip


def astrolabe(d, select=False):
    return dict(
        forward_pred_x0=d.v, old_pred=d.old, ref_pred_x0=d.ref, batch_latents_x0=d.x0, batch_advantages=d.adv64,
        batch_idx=slice(None), collated_samples={"reward_std": d.flags - 0.5}, xt=None, noise=None,
        scaler=names(scale=lambda loss: loss * SCALE), config=names(beta=0.1, use_select_kl=select, mixed_precision="fp16",
                     train=names(adv_clip_max=5.0, beta=1e-2, gradient_accumulation_steps=1)),
    )  # fmt: skip


def verl(d):
    loss = names(mix_beta=0.1, adv_clip_max=5.0, ref_kl_coef=1e-2, adaptive_weight_min=1e-5)
    r = (d.adv / 10 + 0.5).clamp(0, 1)
    return derived(d) | dict(reward_prob=torch.stack([r, r], 1), config=names(diffusion_loss=loss))


def fastvideo(d):
    self = names(_adv_clip_max=5.0, _adv_mode="continuous", _nft_beta=0.1, _kl_beta=1e-2)
    return derived(d) | dict(advantages=d.adv, self=self)


def flow_factory(d, kl=True):
    adapter = names(use_ref_parameters=nullcontext)
    self = names(
        nft_beta=0.1, enable_kl_loss=kl, training_args=names(kl_beta=1e-2, adv_clip_range=(-3.0, 5.0)), adapter=adapter,
        _compute_nft_output=lambda *_: {"noise_pred": d.ref},
    )  # fmt: skip
    return dict(
        new_v_pred=d.v, old_v_pred=d.old, clean_latents=d.x0, noised_latents=d.xt, sigma_broadcast=d.per(d.t),
        batch={"advantage": d.adv}, t_flat=1000 * d.t, self=self, loss_info=defaultdict(list),
    )  # fmt: skip


def cosmos(d, column=False):
    policy = names(advantage_low=-2.0, advantage_high=4.0, kl_beta=1e-2)
    config = names(train=names(train_policy=policy), policy=names(diffusers=names(nft_beta=0.1)))
    return derived(d) | dict(
        mini_batch={"advantages": d.adv[:, None] if column else d.adv}, self=names(config=config, num_train_timesteps=1),
        loss_scaling_factor=SCALE, Dict=dict,
    )  # fmt: skip


def unirl(d, adaptive=True):
    config = names(beta=0.1, adv_clip_max=5.0, use_adaptive_weight=adaptive)
    return dict(
        new_pred=d.v, old_pred=d.old, x0=d.x0, xt=d.xt, t_exp=d.per(d.t), t_scalar=d.t[0], B=d.batch, adv=d.adv,
        r=(d.adv.clamp(-5, 5) / 10 + 0.5), self=names(config=config),
    )  # fmt: skip


def rlinf(d, gather="action_level", weight="adaptive"):
    algorithm = dict(
        nft_loss_form="mse", nft_beta=0.1, adv_clip_max=5.0, nft_weight_mode=weight, nft_weight_scale=2.0,
        nft_target_space="x0", nft_gather_type=gather, nft_energy_reduction="mean", adv_type="grpo",
    )  # fmt: skip
    return dict(
        v_theta=d.v, v_old=d.old, x_t=d.xt, chunk=d.x0.shape[1], forward_inputs={
            "nft_x0": d.x0, "nft_noise_level": torch.zeros(d.batch, dtype=torch.float32)},
        schedule=d.low(torch.linspace(1, 0, 11, dtype=torch.float64)), step_indices=torch.arange(d.batch) + 1,
        batch={"loss_mask": (d.flags > 0)[:, None], "advantages": d.adv[:, None]}, batch_size=d.batch, target_space="x0",
        gather_type=gather, self=names(cfg=names(algorithm=algorithm)),
    )  # fmt: skip


SD3, TOKENS, BCF, BFC = (8, 16, 64, 64), (8, 1024, 64), (1, 16, 21, 60, 104), (1, 21, 16, 60, 104)
DERIVED = ("loss_terms['x0_norm'] =", "loss_terms['total_loss'] =")
TRAINERS = [
    Trainer("diffusionnft", "NVlabs/DiffusionNFT", "24af55554898d85e93efa492f42b5e9cdf4156e9b", "scripts/train_nft_sd3.py",
            "advantages_clip =", DERIVED[1], (DERIVED,), SD3, derived, "loss", "loss_terms"),
    Trainer("astrolabe", "franklinz233/Astrolabe", "35a5347ef2f0fdd748297b553425e823ed2da6da", "scripts/train_nft_wan.py",
            "adv =", "del old_pred", (("pos_pred_x0 =", "if getattr(config"), ("del old_pred", "del old_pred")), BFC,
            astrolabe, "scaled_loss", "loss_terms", one_dtype=True),
    Trainer("verl_omni", "verl-project/verl-omni", "a1139bafffb5b9711f0a6b6edff8ecaa60bfff30",
            "verl_omni/trainer/diffusion/diffusion_algos.py", "loss_cfg = config.diffusion_loss\nbeta = loss_cfg.mix_beta",
            "with torch.no_grad():\n    metrics", (("beta =", "with torch.no_grad():\n    metrics"),), TOKENS, verl, "loss",
            "metrics", wide_x0=True),
    Trainer("fastvideo", "hao-ai-lab/FastVideo", "2f3d4074064e4d86f99dc784ebbaa296e6f5925f",
            "fastvideo/train/methods/rl/diffusion_nft.py", "advantages_clip =", "losses =",
            (("positive_prediction =", "losses ="),), BCF, fastvideo, "losses['total_loss']", "losses", one_dtype=True),
    Trainer("flow_factory", "X-GenGroup/Flow-Factory", "a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c",
            "src/flow_factory/trainers/nft.py", "adv =", "loss_info['loss'].append",
            (("positive_pred =", "loss_info['loss'].append"),), SD3, flow_factory, "loss",
            "{k: v[0] for k, v in loss_info.items()}", one_dtype=True),
    Trainer("cosmos_rl", "nvidia-cosmos/cosmos-rl", "89f2e5b5c817d99a240f1194ce37239ceb6f058a",
            "cosmos_rl/policy/trainer/diffusers_trainer/nft_trainer.py", "advantages_clip =", "report_terms['old_kl'] =",
            (("positive_prediction =", "loss ="), ("unweighted_policy_loss =", "report_terms['old_kl'] =")), SD3, cosmos,
            "scaled_loss", "report_terms"),
    Trainer("edit_r1", "PKU-YuanGroup/Edit-R1", "4217f251a5abd3ca9ef2f9b4eee851a14f744f84",
            "scripts/train_nft_qwen_image_edit.py", "valid_mask =", DERIVED[1], (DERIVED,), TOKENS, derived, "loss",
            "loss_terms"),
    Trainer("gardo", "tinnerhrhe/GARDO", "1cc77fb341a8f84013cbb51e7685805acbef3425", "scripts/train_sd3_nft_gardo.py",
            "advantages_clip =", DERIVED[1], (DERIVED,), SD3, derived, "loss", "loss_terms"),
    Trainer("unirl", "Tencent-Hunyuan/UniRL", "1a7b501e8fe8517b432a130220d2ff462f9b5afa", "unirl/algorithms/diffusionnft.py",
            "beta = float", "metrics =", (("beta = float", "metrics ="),), SD3, unirl, "total", "metrics", one_dtype=True),
    Trainer("rlinf", "RLinf/RLinf", "e4d321ca0b0eb5a859132b8adb75eccc369ce900",
            "rlinf/workers/actor/fsdp_nft_policy_worker.py", "(delta_v, v_pos, v_neg) =", "with torch.no_grad():\n    delta_v_norm",
            (("(delta_v, v_pos, v_neg) =", "(delta_v, v_pos, v_neg) ="), ("(target, pred_pos) =", "with torch.no_grad():\n    delta_v_norm")), (8, 1, 16, 64, 64), rlinf, "loss", "metrics_data", one_dtype=True),
]  # fmt: skip


def source(trainer, folder, file=None):
    """The file's text at the trainer's commit: of a git checkout at any commit, or of a plain folder."""
    root = Path(folder) / trainer.repository.split("/")[1]
    file = file or trainer.file
    if (root / ".git").exists():
        command = ["git", "-C", root, "show", f"{trainer.commit}:{file}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return (root / file).read_text() if (root / file).exists() else None


def bodies(tree):
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            if isinstance(body := getattr(node, field, None), list):
                yield node, body


def find(body, text, last=False):
    """Index of the first (or last) run of statements that begins with text; None without one."""
    bare = lambda text: text.replace("(", "").replace(")", "")  # Python 3.10 writes tuples with parentheses
    found = [i for i in range(len(body)) if bare("\n".join(map(ast.unparse, body[i : i + 2]))).startswith(bare(text))]
    return None if not found else found[-1 if last else 0]


class Block(NamedTuple):
    body: list  # all statements of the body that holds the block
    first: int
    last: int
    spans: list  # (first, last) of each edit, absolute


def cut(trainer, text):
    """The trainer's block. Raises where its file no longer has that structure."""
    for _, body in bodies(ast.parse(text)):
        first, last = find(body, trainer.start), find(body, trainer.end, last=True)
        if first is not None and last is not None and first < last:
            spans = [(first + find(body[first:], a), find(body[: last + 1], b, last=True)) for a, b in trainer.edits]
            return Block(body, first, last, spans)
    raise AssertionError(f"{trainer.file} has no block from {trainer.start!r} to {trainer.end!r}")


class Edit(NamedTuple):
    first: int  # line
    last: int
    code: str


def page_edits(trainer):
    """What the page tells to delete and to write: "Delete line(s) A-B", then perhaps a block of Python."""
    text = (PAGES / f"{trainer.page}.md").read_text()
    found = []
    for piece in re.split(r"^(?=Delete lines? \d)", text, flags=re.M)[1:]:
        a, b = re.match(r"Delete lines? (\d+)(?:-(\d+))?", piece).groups()
        code = re.search(r"```python\n(.*?)```", piece, re.S)
        found.append(Edit(int(a), int(b or a), code[1] if code and "write" in piece.partition("```")[0] else ""))
    return found


def edited(trainer, text):
    """(the trainer's statements, the same with the page's edits)."""
    block, edits, out, i = cut(trainer, text), page_edits(trainer), [], 0
    theirs = block.body[block.first : block.last + 1]
    assert len(edits) == len(block.spans), f"docs/dropin/{trainer.page}.md must have {len(block.spans)} edits"
    i = block.first
    for (first, last), edit in zip(block.spans, edits):
        lines = block.body[first].lineno, block.body[last].end_lineno
        assert lines == (edit.first, edit.last), f"{trainer.page}.md: delete lines {lines[0]}-{lines[1]}"
        out += block.body[i:first] + ast.parse(edit.code).body
        i = last + 1
    return theirs, out + block.body[i : block.last + 1]


def rlinf_class(trainer, folder):
    """The methods that RLinf's block calls, as a class without its framework."""
    tree = ast.parse(source(trainer, folder))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef))
    cls.bases, keep = (
        [],
        ("_compute_", "_reduce_", "_get_nft", "_align", "_postprocess", "_slice_like", "_build_schedule_params"),
    )
    cls.body = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name.startswith(keep)]
    utils = ast.parse(source(trainer, folder, "rlinf/utils/utils.py"))
    helpers = [
        n
        for n in utils.body
        if isinstance(n, ast.FunctionDef) and n.name in ("masked_mean", "_reduce_mean", "_reduce_sum")
    ]
    space = {"torch": torch, "F": F, "np": np, "ListConfig": tuple}
    exec(compile(ast.Module(helpers + [cls], []), trainer.file, "exec"), space)
    space[cls.name]._get_current_nft_tau = lambda self: 0.5
    return space[cls.name], space["masked_mean"]

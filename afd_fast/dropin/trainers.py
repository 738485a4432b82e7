"""A function per public trainer: its names and shapes -> `nft_loss`, the statistics -> the numbers it logs.

Legend: B samples; v one prediction like x0 [B, ...]. Predictions of the old and the reference policy are constants, whether
detached or not. Every function returns (loss, terms): the loss is a scalar with a graph, in float32 (float64 for float64
predictions); the terms are detached scalars on its device, and nothing synchronises a GPU (`floats` does, once).
Every function raises ValueError or TypeError as `afd_fast.nft_loss` does, and for an r or a mask with several values per sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from afd_kernels.layout import Row
from torch import Tensor

from afd_fast.dropin.terms import Terms, checked, logged, per_sample, recipe
from afd_fast.ops.nft import nft_sums
from afd_fast.reference.nft_inputs import NFTInputs
from afd_fast.reference.recipes import NFTRecipe, Weighting
from afd_fast.reference.transforms import readable

POS_LOSS, NEG_LOSS, OLD_DEVIATION = int(Row.POS_LOSS), int(Row.NEG_LOSS), int(Row.OLD_DEVIATION)  # for torch.compile
LOGGED = dict(  # by DiffusionNFT and the trainers derived from it
    x0_norm="x0", x0_norm_max="x0_max", old_deviate="drift", old_deviate_max="drift_max", policy_loss="total",
    unweighted_policy_loss="unweighted", kl_div_loss="kl", kl_div="kl_all", old_kl_div="old_kl", total_loss="total",
)  # fmt: skip


def _loss(
    v: Tensor, old: Tensor, ref: Tensor | None, x0: Tensor, xt: Tensor | None, t: Tensor | float, r: Tensor,
    recipe: NFTRecipe, names: Mapping[str, str], sample_mask: Tensor | None = None, ref_mask: Tensor | None = None,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """names: of the terms, as for `logged`."""
    given: NFTInputs = {"x_t": xt, "v_old": old, "v_ref": ref, "sample_mask": sample_mask, "ref_mask": ref_mask}
    sums = nft_sums(v, x0, per_sample("r", r, v), t, given, recipe)
    scale = recipe.clip_range[1] if recipe.scale == "adv_clip" else 1.0
    return sums[0], logged(sums, scale, names, sample_mask)


def _names(true_policy_loss: bool) -> dict[str, str]:
    return LOGGED | ({"policy_loss": "policy"} if true_policy_loss else {})


@checked
def diffusionnft(
    forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor, xt: Tensor,
    t_expanded: Tensor, r: Tensor, *, beta: float, kl_beta: float, adv_clip_max: float, true_policy_loss: bool = False,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """NVlabs/DiffusionNFT, scripts/train_nft_sd3.py.

    Args:
        forward_prediction, old_prediction, ref_forward_prediction: [B, C, H, W] velocities; the first gets a gradient.
        x0, xt: [B, C, H, W]. t_expanded: [B, 1, 1, 1] in [0, 1]. r: [B] in [0, 1].
        beta: config.beta. kl_beta: config.train.beta. adv_clip_max: config.train.adv_clip_max.
        true_policy_loss: log the policy loss as policy_loss. The file logs the total there, because it adds the KL in
            place, and so does the default.
    """
    return _loss(
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, r,
        recipe("diffusionnft", beta=beta, ref_coef=kl_beta, adv_clip=adv_clip_max), _names(true_policy_loss),
    )  # fmt: skip


@checked
def gardo(
    forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor, xt: Tensor,
    t_expanded: Tensor, r: Tensor, reward_std: Tensor, *, beta: float, kl_beta: float, adv_clip_max: float,
    true_policy_loss: bool = False,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """tinnerhrhe/GARDO, scripts/train_sd3_nft_gardo.py: the KL runs over samples with reward_std > 0, over all if there is none.

    Args: as `diffusionnft`, and reward_std: [B] or [B, 1].
    """
    return _loss(
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, r,
        recipe("gardo", beta=beta, ref_coef=kl_beta, adv_clip=adv_clip_max), _names(true_policy_loss),
        ref_mask=per_sample("reward_std", reward_std, x0) > 0,
    )  # fmt: skip


@checked
def edit_r1(
    forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor, xt: Tensor,
    t_expanded: Tensor, r: Tensor, valid_mask: Tensor, *, beta: float, kl_beta: float, adv_clip_max: float,
    true_policy_loss: bool = False,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """PKU-YuanGroup/Edit-R1, scripts/train_nft_qwen_image_edit.py (and train_nft_kontext.py).

    Args: as `diffusionnft` with tokens [B, S, D], and valid_mask: [B], 0 or 1; loss and KL are means over the valid samples,
        0 where there is none.
    """
    valid = per_sample("valid_mask", valid_mask, x0) != 0
    return _loss(
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, r,
        recipe("edit_r1", beta=beta, ref_coef=kl_beta, adv_clip=adv_clip_max),
        _names(true_policy_loss) | {"kl_div": "kl"}, sample_mask=valid,
    )  # fmt: skip


@checked
def fastvideo(
    forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor, xt: Tensor,
    t_expanded: Tensor, r: Tensor, *, nft_beta: float, kl_beta: float, adv_clip_max: float,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """hao-ai-lab/FastVideo, fastvideo/train/methods/rl/diffusion_nft.py.

    Args: as `diffusionnft` with latents [B, F, C, H, W] or [B, C, F, H, W]; self._nft_beta, self._kl_beta, self._adv_clip_max.
    Returns: as all; terms["total_loss"] is the loss with its graph, on which the trainer's loop calls backward.
    """
    loss, terms = _loss(
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, r,
        recipe("fastvideo", beta=nft_beta, ref_coef=kl_beta, adv_clip=adv_clip_max),
        dict(policy_loss="policy", unweighted_policy_loss="unweighted", kl_div_loss="kl", old_deviate="drift",
             old_kl_div="old_kl", x0_norm="x0"),
    )  # fmt: skip
    return loss, {"total_loss": loss} | terms


@checked
def cosmos_rl(
    forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor, xt: Tensor,
    t_expanded: Tensor, r: Tensor, *, nft_beta: float, kl_beta: float, advantage_high: float,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """nvidia-cosmos/cosmos-rl, cosmos_rl/policy/trainer/diffusers_trainer/nft_trainer.py.

    Args: as `diffusionnft`; r: [B] or [B, 1], one value per sample. The trainer's lines broadcast a [B, 1] r to [B, B], by
        which every sample gets the mean r of the batch; here each keeps its r.
    """
    return _loss(
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, r,
        recipe("cosmos_rl", beta=nft_beta, ref_coef=kl_beta, adv_clip=advantage_high),
        dict(loss_contrib="total", policy_loss_contrib="policy", unweighted_policy_loss_contrib="unweighted",
             kl_loss_contrib="kl", x0_norm="x0", x0_norm_max="x0_max", old_deviation="drift",
             old_deviation_max="drift_max", old_kl="old_kl"),
    )  # fmt: skip


@checked
def verl_omni(
    forward_prediction: Tensor, old_prediction: Tensor, ref_forward_prediction: Tensor, x0: Tensor, xt: Tensor,
    t_expanded: Tensor, reward_prob: Tensor, *, mix_beta: float, ref_kl_coef: float, adv_clip_max: float,
    adaptive_weight_min: float,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """verl-project/verl-omni, verl_omni/trainer/diffusion/diffusion_algos.py.

    Args: as `diffusionnft` with packed latents [B, S, D]; t_expanded: [B, 1, 1] or like x0. reward_prob: [B, ...] in [0, 1],
        of which a sample takes the mean. Settings: those of config.diffusion_loss.
    """
    r = reward_prob.flatten(1).mean(1) if reward_prob.ndim > 1 else reward_prob
    names = dict(policy_loss="policy", positive_loss="positive", negative_loss="negative", ref_kl_loss="kl",
                 old_deviate="drift", reward_prob_mean="r", total_loss="total")  # fmt: skip
    return _loss(
        forward_prediction, old_prediction, ref_forward_prediction, x0, xt, t_expanded, r.to(x0.device, x0.dtype),
        recipe("verl_omni", beta=mix_beta, ref_coef=ref_kl_coef, adv_clip=adv_clip_max, weight_floor=adaptive_weight_min),
        {f"actor/{name}": ours for name, ours in names.items()},
    )  # fmt: skip


@checked
def flow_factory(
    new_v_pred: Tensor, old_v_pred: Tensor, ref_v_pred: Tensor | None, clean_latents: Tensor, noised_latents: Tensor,
    sigma_broadcast: Tensor, r: Tensor, *, nft_beta: float, kl_beta: float, adv_clip_range: Sequence[float],
) -> tuple[Tensor, Terms]:  # fmt: skip
    """X-GenGroup/Flow-Factory, src/flow_factory/trainers/nft.py.

    Args: as `diffusionnft`; ref_v_pred: the reference's velocity, or None where self.enable_kl_loss is False.
        sigma_broadcast: [B, 1, 1, 1] in [0, 1]. r: [B] or [B, 1, 1, 1].
    Returns: as all; the terms kl_div [B] and kl_loss are there with ref_v_pred only.
    """
    if not isinstance(adv_clip_range, Sequence) or len(adv_clip_range) != 2:
        raise ValueError(f"flow_factory: adv_clip_range must be (low, high), got {adv_clip_range!r}")
    low, high = adv_clip_range
    kl = {} if ref_v_pred is None else {"kl_div": "kl_each", "kl_loss": "kl"}
    loss, terms = _loss(
        new_v_pred, old_v_pred, ref_v_pred, clean_latents, noised_latents, sigma_broadcast, r,
        recipe("flow_factory", beta=nft_beta, ref_coef=kl_beta, adv_clip=(float(low), float(high))),
        dict(policy_loss="policy", unweighted_policy_loss="unweighted", loss="total") | kl,
    )  # fmt: skip
    if kl:
        terms["kl_loss"] = kl_beta * terms["kl_loss"]
    return loss, terms


@checked
def unirl(
    new_pred: Tensor, old_pred: Tensor, x0: Tensor, xt: Tensor, t_exp: Tensor, r: Tensor, adv: Tensor, *, beta: float,
    adv_clip_max: float, use_adaptive_weight: bool,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """Tencent-Hunyuan/UniRL, unirl/algorithms/diffusionnft.py; it has no KL.

    Args: as `diffusionnft`; t_exp: [B, 1, ...], the same for every sample. adv: [B], the advantages, which are logged.
    """
    weighting: Weighting = "adaptive" if use_adaptive_weight else "none"
    loss, terms = _loss(
        new_pred, old_pred, None, x0, xt, t_exp, r,
        recipe("unirl", beta=beta, adv_clip=adv_clip_max, weighting=weighting),
        dict(policy_loss="unweighted", pos_loss_mean="positive", neg_loss_mean="negative", r_mean="r",
             prediction_deviation="drift", x0_norm="x0"),
    )  # fmt: skip
    with torch.no_grad():
        spread, average = torch.std_mean(adv) if len(adv) > 1 else (adv.new_zeros(()), adv.mean())
    return loss, terms | {"advantage_mean": average, "advantage_std": spread, "t_value": t_exp.flatten()[0]}


@checked
def astrolabe(
    forward_pred_x0: Tensor, old_pred: Tensor, ref_pred_x0: Tensor, batch_latents_x0: Tensor, r: Tensor,
    reward_std: Tensor | None = None, *, beta: float, kl_beta: float,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """franklinz233/Astrolabe, scripts/train_nft_wan.py, whose networks return x0 and whose errors are those of x0.

    Args:
        forward_pred_x0, old_pred, ref_pred_x0: [B, F, C, H, W] predictions of x0. batch_latents_x0: like them. r: [B].
        reward_std: [B], with config.use_select_kl: the KL runs over samples with reward_std > 0, and is 0 without one.
        beta: config.beta. kl_beta: config.train.beta.
    """
    chosen = None if reward_std is None else per_sample("reward_std", reward_std, batch_latents_x0) > 0
    names = dict(total_loss="total", policy_loss="policy", kl_loss="kl", x0_norm="x0", old_deviate="drift",
                 old_kl_div="old_kl")  # fmt: skip
    return _loss(
        forward_pred_x0, old_pred, ref_pred_x0, batch_latents_x0, None, 1.0, r,
        recipe("astrolabe", beta=beta, ref_coef=kl_beta, space="clean", ref_space="v"),
        names if chosen is None else names | {"kl_div": "kl_all"}, ref_mask=chosen,
    )  # fmt: skip


@checked
def rlinf(
    v_theta: Tensor, v_old: Tensor, x0: Tensor, x_t: Tensor, t_bc: Tensor, advantages: Tensor, loss_mask: Tensor,
    algorithm: Mapping[str, Any], *, noise_level: Tensor | float = 0.0,
) -> tuple[Tensor, Terms]:  # fmt: skip
    """RLinf/RLinf, rlinf/workers/actor/fsdp_nft_policy_worker.py, with the settings of its SD3 and Wan configurations.

    Args:
        v_theta, v_old, x0, x_t: [B, F, C, ...]; F is 1 for SD3, the latent frames for Wan. t_bc: [B, 1, ...] in [0, 1].
        advantages: the optimality in [0, 1] (after self._postprocess_advantages). loss_mask: like it, [B], [B, 1] or [B, F].
        algorithm: self.cfg.algorithm. W and loss are per frame with nft_gather_type "action_level", else per sample.
        noise_level: forward_inputs["nft_noise_level"], zero for a deterministic sampler.
    Raises: ValueError for a setting that the trainer has and this call has not: nft_loss_form "dpo", nft_clip_ratio, other
        weights than adaptive and constant, the target "xnext", two weight scales, a stochastic sampler.
    """
    if not isinstance(algorithm, Mapping) or not isinstance(noise_level, (Tensor, int, float)):
        given = type(noise_level if isinstance(algorithm, Mapping) else algorithm).__name__
        raise TypeError(f"rlinf: algorithm must be a mapping and noise_level a tensor or a number, got a {given}")
    setting = algorithm.get
    for name, default, known in (
        ("nft_target_space", "xnext", ("x0",)), ("nft_loss_form", "dpo", ("mse",)), ("nft_clip_ratio", None, (None,)),
        ("nft_weight_mode", "auto", ("auto", "adaptive", "constant")),
        ("nft_gather_type", "action_level", ("action_level", "chunk_level")),
        ("nft_energy_reduction", "mean", ("mean", "sum")),
    ):  # fmt: skip
        if (given := setting(name, default)) not in known:
            raise ValueError(f"{name}={given!r} is not served here, only {known}: keep the trainer's own lines")
    weight = setting("nft_weight_scale", 1.0)
    if not isinstance(weight, (int, float)):
        raise ValueError(f"nft_weight_scale={weight!r}: one number is served here: keep the trainer's own lines")
    noise = torch.as_tensor(noise_level)
    if readable(noise) and bool(noise.any()):
        raise ValueError(
            "a noise level above 0 is not served here, only a deterministic sampler: keep the trainer's own lines"
        )
    axes = 2 if setting("nft_gather_type", "action_level") == "action_level" else 1
    each = tuple(x_t.shape[:axes])
    r, keep = _aligned("advantages", advantages, each), _aligned("loss_mask", loss_mask, each) != 0
    t = t_bc.expand(*each, *t_bc.shape[axes:])
    v, old, clean, noised, t = (x.flatten(0, axes - 1) for x in (v_theta, v_old, x0, x_t, t))
    loss, _, rows = nft_sums(
        v, clean, r, t, {"x_t": noised, "v_old": old, "sample_mask": keep},
        recipe("diffusionnft", beta=setting("nft_beta", 1.0),
               adv_clip=float(setting("adv_clip_max", 1.0)) * weight,
               sample_reduction=setting("nft_energy_reduction", "mean"),
               weighting="none" if setting("nft_weight_mode", "auto") == "constant" else "adaptive"),
    )  # fmt: skip
    with torch.no_grad():
        energies = rows[POS_LOSS : NEG_LOSS + 1]  # [2, B], of the positive and the negative branch
        chosen = torch.stack((r > 0.5, r < 0.5)) & keep
        of_chosen = (energies * chosen).sum(1) / chosen.sum(1).clamp(min=1)
        positive, negative, good, bad = (weight * torch.cat((energies.mean(1), of_chosen))).unbind()
        drift = (rows[OLD_DEVIATION] * noised[0].numel()).sqrt()
        return loss, {
            "actor/nft_loss": loss.detach(), "actor/delta_v_norm": drift.mean(),
            "actor/clip_frac": torch.zeros_like(positive), "actor/E_pos_mean": positive, "actor/E_neg_mean": negative,
            "actor/E_pos_mean_pos_only": good, "actor/E_neg_mean_neg_only": bad,
            "actor/delta_E_mean": positive - negative,
        }  # fmt: skip


def _aligned(name: str, x: Tensor, each: tuple[int, ...]) -> Tensor:
    """A value per sample or per frame -> one per entry of `each` [B] or [B, F], flat. ValueError for another number."""
    if x.shape == each:
        return x.reshape(-1)
    x = x.reshape(each[0], -1)
    if len(each) == 1:
        return x[:, 0]
    if x.shape[1] not in (1, each[1]):
        raise ValueError(f"{name} must have one value per sample or one per frame ({each[1]}), got {x.shape[1]}")
    return x.expand(each).reshape(-1)

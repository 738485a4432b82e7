"""A transformer's sizes, from its config.json or from its tensors' shapes."""

from dataclasses import fields
from typing import Any

from torch import Tensor

from afd_fast.errors import ConfigError
from afd_fast.students.wan.layers import CausalWanConfig
from afd_fast.students.wan.supported import check_channels


def config_from_json(settings: dict[str, Any]) -> CausalWanConfig:
    """From a diffusers (num_attention_heads ...) or an original Wan (dim, num_heads ...) config.json."""
    try:
        return _sizes(settings)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"config.json does not describe a Wan transformer ({error!r}): restore it, or pass config=CausalWanConfig(...)"
        ) from None


def _sizes(settings: dict[str, Any]) -> CausalWanConfig:
    if "num_attention_heads" in settings:
        heads = settings["num_attention_heads"]
        names = {"in_channels": "in_dim", "out_channels": "out_dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers",
                 "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps", "text_len": "text_len"}  # fmt: skip
        if tuple(settings.get("patch_size", (1, 2, 2))) != (1, 2, 2):
            raise ConfigError(
                f"patch_size is {settings['patch_size']}, CausalWan has (1, 2, 2): load a Wan 2.1 checkpoint"
            )
        sizes = {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
        return CausalWanConfig(dim=heads * settings["attention_head_dim"], num_heads=heads, **sizes)
    known = {f.name for f in fields(CausalWanConfig)}
    return CausalWanConfig(**{k: v for k, v in settings.items() if k in known})


def infer_config(state: dict[str, Tensor]) -> CausalWanConfig:
    """Sizes from the tensors' shapes, with the head width of 128 and text_len of 512 of every public Wan.

    Raises ValueError if the width is not a multiple of 128: the weights do not tell the number of heads.
    """
    try:
        dim, in_dim = state["patch_embedding.weight"].shape[:2]
        layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        sizes = {
            "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
            "text_dim": state["text_embedding.0.weight"].shape[1],
            "freq_dim": state["time_embedding.0.weight"].shape[1],
            "out_dim": state["head.head.weight"].shape[0] // 4,
        }
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"these are not a Wan transformer's weights: no {error}; first keys {sorted(state)[:4]}"
        ) from None
    check_channels(in_dim, sizes["out_dim"])
    if dim % 128:
        raise ConfigError(f"the weights have width {dim}, not a multiple of 128: pass config=CausalWanConfig(...)")
    return CausalWanConfig(dim=dim, num_heads=dim // 128, num_layers=layers, in_dim=in_dim, **sizes)

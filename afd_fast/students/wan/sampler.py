"""How public students are sampled: presets by name, and what a checkpoint's config.json says.

A `Sampler` holds fields of `afd_fast.rollout.RolloutConfig`. The numbers are those of each project's public configuration,
named beside them; fields that are left out are Self-Forcing's, which are RolloutConfig's defaults.
"""

from collections.abc import Mapping
from typing import Any

from afd_fast.errors import ConfigError

Sampler = dict[str, Any]  # fields of RolloutConfig

FOUR_STEPS = (1000, 750, 500, 250)
PRESETS: dict[str, Sampler] = {
    # guandeh17/Self-Forcing 33593df: configs/self_forcing_{dmd,sid}.yaml
    "self_forcing": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3},
    # thu-ml/Causal-Forcing 1fc7bbc: configs/causal_forcing_dmd_{chunkwise,framewise,framewise_2step,framewise_1step}.yaml
    "causal_forcing": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3},
    "causal_forcing_framewise": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 1},
    "causal_forcing_pp_2step": {"steps": (1000, 500), "first_chunk_steps": FOUR_STEPS, "shift": 5.0, "chunk": 1},
    "causal_forcing_pp_1step": {"steps": (1000,), "first_chunk_steps": FOUR_STEPS, "shift": 5.0, "chunk": 1},
    # NVlabs/LongLive, branch v1.0: configs/longlive_inference.yaml
    "longlive": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3, "window": 12, "sink": 3},
    # hao-ai-lab/FastVideo 2f3d407: SelfForcingWanT2V480PConfig in fastvideo/configs/pipelines/wan.py
    "fastvideo": {"steps": FOUR_STEPS, "shift": 5.0, "chunk": 3},
    # tianweiy/CausVid ca21150: configs/wan_causal_dmd.yaml, configs/wan_causal_dmd_warp_4step_cfg2.yaml
    "causvid": {"steps": (1000, 757, 522), "warp": False, "shift": 8.0, "chunk": 3},
    "causvid_4step": {"steps": FOUR_STEPS, "shift": 8.0, "chunk": 3},
    # chenfengxu714/StreamDiffusionV2 c5a0f20: configs/wan_causal_dmd_{t2v,v2v}.yaml; v2v starts from a video noised to 0.7
    "streamdiffusionv2": {"steps": FOUR_STEPS, "warp": False, "shift": 8.0, "chunk": 3, "window": 21},
    "streamdiffusionv2_v2v": {"steps": (700, 500, 400, 200), "warp": False, "shift": 8.0, "chunk": 1},
    # krea-ai/realtime-video acf4b7b: configs/self_forcing_server_14b.yaml; its server also computes the context again
    "krea": {"steps": (1000, 937, 833, 625), "warp": False, "shift": 5.0, "chunk": 3},
}
HOW_FAST = ("fuse_cache_pass", "merge_lora", "graphs")  # fields of RolloutConfig that do not belong to the student
KEY = "sampler"  # in the config.json that `save_student` writes
# FastVideo's names in its causal transformer's config.json (fastvideo/configs/models/dits/wanvideo.py); Self-Forcing's
# CausalWanModel writes the first two as well
_WINDOW, _SINK, _CHUNK, _ROPE = "local_attn_size", "sink_size", "num_frames_per_block", "rope_cache_policy"


def preset(name: str) -> Sampler:
    """A copy of the preset of this name. ConfigError that lists the names."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return dict(PRESETS[name])


def of_config(settings: Mapping[str, Any]) -> Sampler:
    """What a transformer's config.json says about sampling: of `save_student`, of FastVideo or of Self-Forcing's class. Empty
    where it says nothing. ConfigError for values of other types, and for a policy of positions that is not known."""
    if KEY in settings:
        if not isinstance(settings[KEY], dict):
            raise ConfigError(
                f"{KEY} in config.json must hold settings by name, got {settings[KEY]!r}: restore the file"
            )
        return {name: tuple(v) if isinstance(v, list) else v for name, v in settings[KEY].items()}
    found: Sampler = {}
    for name in (_WINDOW, _SINK, _CHUNK):
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{name} in config.json must be a whole number, got {value!r}: restore the file")
    if _CHUNK in settings:
        found["chunk"] = settings[_CHUNK]
    if settings.get(_WINDOW, -1) > 0:  # -1: everything
        found |= {"window": settings[_WINDOW], "sink": settings.get(_SINK) or 0}
    policy = settings.get(_ROPE, "absolute")
    if policy not in ("absolute", "relativistic"):
        raise ConfigError(f"{_ROPE}={policy!r} in config.json is not known here: absolute and relativistic are")
    if policy == "relativistic" and found.get("sink"):  # without a sink or a window it changes nothing
        found["rope"] = "relative"
    return found

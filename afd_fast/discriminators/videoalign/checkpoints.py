"""VideoAlign checkpoints in and out, strictly.

Published (KwaiVGI/VideoReward): `model_config.json`, `checkpoint-*/model.pth` with the whole PEFT-wrapped state dict
under the names of transformers 4.45, `checkpoint-*/tokenizer/`. `model.pth` holds everything, the 4.4 GB of
Qwen2-VL-2B are not needed. Old names: `visual.*`, `model.*` for the language model, `.base_layer.` under LoRA.
"""

import json
import logging
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig

from afd_fast.discriminators.videoalign.inputs import REWARD_TOKENS, read_template
from afd_fast.discriminators.videoalign.model import NAMES, RewardOptions, RewardSettings, VideoReward, qwen2_vl_2b
from afd_fast.students.lora import merge_lora_state

log = logging.getLogger("afd_fast")

_LORA = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")


def new_name(key: str) -> str:
    """An old key -> ours: `visual.*`, `language_model.*`, `lm_head.weight`, `rm_head.weight`."""
    key = key.removeprefix("base_model.model.")
    return re.sub(r"^model\.", "language_model.", key).replace(".base_layer.", ".")


def _find(folder: str | Path) -> tuple[Path, Path]:
    """(folder with model_config.json, folder with model.pth); downloads an owner/name repository."""
    root = Path(folder)
    if not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        from huggingface_hub import snapshot_download

        root = Path(snapshot_download(str(folder)))
    if not (root / "model_config.json").is_file():
        raise FileNotFoundError(f"{root} holds no model_config.json: it is not a VideoAlign checkpoint folder")
    step = lambda path: int(path.name.rpartition("-")[2])
    found = sorted((p for p in root.glob("checkpoint-*") if p.name[11:].isdigit()), key=step)
    if not found or not (found[-1] / "model.pth").is_file():
        raise FileNotFoundError(f"{found[-1] if found else root / 'checkpoint-*'}/model.pth is missing")
    return root, found[-1]


def _settings(saved: dict) -> tuple[RewardSettings, int, float]:
    """(settings, LoRA rank, alpha) of a model_config.json; ValueError for a model this is not."""
    data, model, lora = (saved[k] for k in ("data_config", "model_config", "peft_lora_config"))
    for name, found, wanted in (
        ("reward_token", model["reward_token"], "special"), ("eval_dim", list(data["eval_dim"]), list(NAMES)),
        ("prompt_template_type", data["prompt_template_type"], "detailed_special"),
        ("sample_type", data.get("sample_type", "uniform"), "uniform"), ("num_frames", data["num_frames"], None),
        ("use_rslora", lora.get("use_rslora", False), False), ("lora_enable", lora["lora_enable"], True),
        ("vision_lora", lora.get("vision_lora", False), False),
    ):  # fmt: skip
        if found != wanted:
            raise ValueError(f"model_config.json: {name} is {found!r}, only {wanted!r} is supported")
    norm = saved["inference_config"]
    settings = RewardSettings(
        fps=data["fps"], max_pixels=data["max_frame_pixels"], output_dim=model["output_dim"],
        mean=tuple(norm[f"{n}_mean"] for n in NAMES), std=tuple(norm[f"{n}_std"] for n in NAMES),
    )  # fmt: skip
    return settings, lora["lora_r"], lora["lora_alpha"]


def _check(expected: dict[str, torch.Size], given: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    misshapen = [f"{k} {tuple(given[k].shape)}, expected {tuple(s)}" for k, s in expected.items()
                 if k in given and given[k].shape != s]  # fmt: skip
    if missing or unexpected or misshapen:
        show = lambda names: (
            f"{len(names)}" + (f" ({', '.join(names[:3])}{', ...' if names[3:] else ''})" if names else "")
        )
        raise ValueError(
            f"the checkpoint belongs to another backbone: {show(missing)} tensors missing, {show(unexpected)} unexpected, "
            f"{show(misshapen)} of another shape. A folder's config.json says which backbone it has; without one it is "
            "taken to be Qwen2-VL-2B"
        )


def load_video_reward(
    folder: str | Path,
    *,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    template: str | None = None,
    tokenizer=None,
    options: RewardOptions = RewardOptions(),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> VideoReward:
    """A VideoReward with a published checkpoint's weights.

    Args:
        folder: a checkpoint folder or Hugging Face repository (KwaiVGI/VideoReward); with a config.json where the
            backbone is not Qwen2-VL-2B.
        lora_rank, lora_alpha: merge the published adapter (in float32) and put a new one, zero at first, in its
            place: D begins as VideoAlign and `frozen()` stays VideoAlign. alpha is rank if not given. None: the
            published adapter itself is what trains.
        template, tokenizer: None takes them from the folder (`read_template`, `tokenizer/`).
        dtype: of the trunk; head and adapters are float32.

    Raises: FileNotFoundError naming the file; ValueError naming missing, unexpected and misshapen tensors (another
    backbone), or a setting this class does not have.
    """
    root, step = _find(folder)
    settings, rank, alpha = _settings(json.loads((root / "model_config.json").read_text()))
    template = read_template(root) if template is None else template
    if tokenizer is None:
        if not (step / "tokenizer").is_dir():
            raise FileNotFoundError(f"{step / 'tokenizer'} is missing; hand one over with tokenizer=")
        tokenizer = AutoTokenizer.from_pretrained(step / "tokenizer")
    state, lora = {}, {}
    for key, value in torch.load(step / "model.pth", map_location="cpu", weights_only=True, mmap=True).items():
        (lora if _LORA.search(key) else state)[new_name(key)] = value
    lora = {_LORA.sub(r".lora_\1.weight", k): v for k, v in lora.items()}
    rows = state.get("language_model.embed_tokens.weight", torch.empty(0)).shape[0]
    config = qwen2_vl_2b()
    if (root / "config.json").is_file():
        config = Qwen2VLConfig(**json.loads((root / "config.json").read_text()))
    config.text_config.vocab_size = rows or config.text_config.vocab_size

    with torch.device("meta"):
        model = VideoReward(config, tokenizer, template, settings, options, dtype)
    shapes = {k: v.shape for k, v in model.backbone.state_dict().items()} | {
        "rm_head.weight": model.rm_head.weight.shape
    }
    targets = sorted(
        {k.removesuffix(".weight") for k in shapes if re.search(r"layers\.\d+\.(self_attn|mlp)\..*weight$", k)}
    )
    expected = shapes | {"lm_head.weight": shapes["language_model.embed_tokens.weight"]}
    for name in targets:
        out, into = shapes[f"{name}.weight"]
        expected |= {
            f"{name}.lora_A.weight": torch.Size((rank, into)),
            f"{name}.lora_B.weight": torch.Size((out, rank)),
        }
    _check(expected, state | lora)
    if model.prompts.reward_ids != [rows - 3, rows - 2, rows - 1]:
        raise ValueError(
            f"the tokenizer's {REWARD_TOKENS} are {model.prompts.reward_ids}, not the last 3 of {rows} rows"
        )

    head = state.pop("rm_head.weight").float()
    del state["lm_head.weight"]  # never used for a score
    state = {k: v.to(dtype) for k, v in state.items()}
    if lora_rank is not None:
        state = merge_lora_state(state, lora, alpha / rank)
    model.backbone.load_state_dict(state, strict=True, assign=True)
    model.backbone.requires_grad_(False)
    model.backbone.visual.requires_grad_(not options.freeze_vision)
    _rotary(model)
    model.rm_head.weight = nn.Parameter(head.clone())
    model.first_head = head.clone()
    model.to(device)
    model.add_lora(
        *((rank, alpha) if lora_rank is None else (lora_rank, lora_rank if lora_alpha is None else lora_alpha))
    )
    if lora_rank is None:
        named = dict(model.backbone.named_parameters())
        for key, value in lora.items():
            named[key.replace(".weight", ".default.weight")].data.copy_(value)
    log.info(
        "loaded %s: %d tensors, published adapter %s", step, len(expected), "trains" if lora_rank is None else "merged"
    )
    return model


def _rotary(model: VideoReward) -> None:
    """The rotary frequencies, which no checkpoint holds, in place of those without storage."""
    visual, lm = model.backbone.visual, model.backbone.language_model
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config)
    lm.rotary_emb = type(lm.rotary_emb)(lm.config)
    empty = [name for name, x in (*model.backbone.named_parameters(), *model.backbone.named_buffers()) if x.is_meta]
    if empty:
        raise RuntimeError(f"this transformers version has tensors the checkpoint does not: {empty[:3]}")


def save_video_reward(
    model: VideoReward, folder: str | Path, *, step: int = 1, dtype: torch.dtype = torch.bfloat16
) -> None:
    """The published format, under the old names: `load_video_reward` and VideoAlign's own code read it.

    lm_head, which VideoAlign's class has and never uses, is written as a copy of the embedding. dtype: of the tensors;
    torch.float32 keeps trained adapters and head exactly. Raises ValueError for a model without adapters.
    """
    if not model.lora:
        raise ValueError("the published format has a LoRA: call add_lora first")
    folder = Path(folder)
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True, exist_ok=True)
    old = lambda name: "base_model.model." + re.sub(r"^language_model\.", "model.", name)
    state = {old(name): value for name, value in model.backbone.state_dict().items()}
    state["base_model.model.lm_head.weight"] = state["base_model.model.model.embed_tokens.weight"]
    state["base_model.model.rm_head.weight"] = model.rm_head.weight
    torch.save({k: v.detach().to("cpu", dtype, copy=True) for k, v in state.items()}, target / "model.pth")
    s, (rank, alpha) = model.settings, model.lora
    saved = {
        "data_config": {"fps": s.fps, "num_frames": None, "max_frame_pixels": s.max_pixels, "sample_type": "uniform",
                        "eval_dim": list(NAMES), "prompt_template_type": "detailed_special", "meta_data": "",
                        "data_dir": ""},
        "model_config": {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "output_dim": s.output_dim,
                         "use_special_tokens": True, "reward_token": "special", "loss_type": "btt",
                         "torch_dtype": str(dtype).removeprefix("torch.")},
        "peft_lora_config": {"lora_enable": True, "vision_lora": False, "lora_r": rank, "lora_alpha": alpha,
                             "lora_dropout": 0.05, "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens"],
                             "lora_modules_to_save": None, "lora_task_type": "CAUSAL_LM", "use_rslora": False,
                             "num_lora_modules": -1},
        "inference_config": {f"{n}_{k}": v for k, values in (("mean", s.mean), ("std", s.std))
                             for n, v in zip(NAMES, values)},
    }  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(saved, indent=1) + "\n")
    (folder / "prompt_template.txt").write_bytes(model.prompts.template.encode())
    model.prompts.tokenizer.save_pretrained(target / "tokenizer")
    settings = model.backbone.config.to_dict()
    settings["text_config"].pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({k: settings[k] for k in _CONFIG}, indent=1) + "\n")


_CONFIG = ("text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id",
           "vision_end_token_id")  # fmt: skip

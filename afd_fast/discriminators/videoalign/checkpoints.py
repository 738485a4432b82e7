"""VideoAlign checkpoints in and out, strictly.

The published layout (KwaiVGI/VideoReward): `model_config.json`, `checkpoint-*/model.pth` with the whole PEFT-wrapped
state dict under the names of transformers 4.45, `checkpoint-*/tokenizer/`. `model.pth` holds everything; the 4.4 GB of
Qwen2-VL-2B are not needed. Old names: `visual.*`, `model.*` for the language model, `.base_layer.` under LoRA.
"""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from afd_fast.discriminators.videoalign.inputs import REWARD_TOKENS, read_template
from afd_fast.discriminators.videoalign.model import NAMES, RewardOptions, RewardSettings, VideoReward, qwen2_vl_2b
from afd_fast.errors import ConfigError, MissingFileError, extra
from afd_fast.files.text import read_json
from afd_fast.students.files import loading, local_copy, read_tensors
from afd_fast.students.lora import merge_lora_state

with extra("train"):
    from transformers import AutoTokenizer, Qwen2VLConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("afd_fast")

_LORA = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")


def new_name(key: str) -> str:
    """The old name of a tensor -> ours: `visual.*`, `language_model.*`, `lm_head.weight`, `rm_head.weight`."""
    key = key.removeprefix("base_model.model.")
    return re.sub(r"^model\.", "language_model.", key).replace(".base_layer.", ".")


def old_name(name: str) -> str:
    """The inverse of `new_name` for a model with adapters."""
    return "base_model.model." + re.sub(r"^language_model\.", "model.", name)


class Folders(NamedTuple):
    """The folder with model_config.json, and its checkpoint folder with model.pth."""

    root: Path
    step: Path


class Published(NamedTuple):
    """A model_config.json: the settings, and rank and alpha of the LoRA."""

    settings: RewardSettings
    rank: int
    alpha: float


class Tensors(NamedTuple):
    """A model.pth under our names: the network's tensors and the adapters'."""

    state: dict[str, Tensor]
    lora: dict[str, Tensor]


def _step(path: Path) -> int:
    """The number of a folder checkpoint-N."""
    return int(path.name.rpartition("-")[2])


def _find(folder: str | Path) -> Folders:
    """The folders of a checkpoint; downloads an owner/name repository."""
    root = local_copy(folder)
    if not (root / "model_config.json").is_file():
        raise MissingFileError(
            f"{root} holds no model_config.json: it is not a VideoAlign checkpoint folder, such as a clone of "
            "hf.co/KwaiVGI/VideoReward"
        )
    found = sorted((p for p in root.glob("checkpoint-*") if p.name[11:].isdigit()), key=_step)
    if not found or not (found[-1] / "model.pth").is_file():
        missing = (found[-1] if found else root / "checkpoint-*") / "model.pth"
        raise MissingFileError(f"{missing} is missing: download it from hf.co/KwaiVGI/VideoReward")
    return Folders(root, found[-1])


def _settings(file: Path) -> Published:
    """Reads a model_config.json. Raises ConfigError for a model that this class does not implement."""
    try:
        return _published(read_json(file))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not VideoAlign's ({error!r}): restore the file") from None


def _published(saved: dict[str, Any]) -> Published:
    data, model, lora = (saved[k] for k in ("data_config", "model_config", "peft_lora_config"))
    for name, found, wanted in (
        ("reward_token", model["reward_token"], "special"), ("eval_dim", list(data["eval_dim"]), list(NAMES)),
        ("prompt_template_type", data["prompt_template_type"], "detailed_special"),
        ("sample_type", data.get("sample_type", "uniform"), "uniform"), ("num_frames", data["num_frames"], None),
        ("use_rslora", lora.get("use_rslora", False), False), ("lora_enable", lora["lora_enable"], True),
        ("vision_lora", lora.get("vision_lora", False), False),
    ):  # fmt: skip
        if found != wanted:
            raise ConfigError(f"model_config.json: {name} is {found!r}, only {wanted!r} is supported")
    norm = saved["inference_config"]
    settings = RewardSettings(
        fps=data["fps"], max_pixels=data["max_frame_pixels"], output_dim=model["output_dim"],
        mean=tuple(norm[f"{n}_mean"] for n in NAMES), std=tuple(norm[f"{n}_std"] for n in NAMES),
    )  # fmt: skip
    return Published(settings, lora["lora_r"], lora["lora_alpha"])


def _tensors(file: Path) -> Tensors:
    """Reads a model.pth."""
    contents = read_tensors(file)
    if not isinstance(contents, dict) or not all(isinstance(value, Tensor) for value in contents.values()):
        raise ConfigError(f"{file} is not a state dict: download it again from hf.co/KwaiVGI/VideoReward")
    state: dict[str, Tensor] = {}
    lora: dict[str, Tensor] = {}
    for key, value in contents.items():
        if _LORA.search(key):
            lora[_LORA.sub(r".lora_\1.weight", new_name(key))] = value
        else:
            state[new_name(key)] = value
    return Tensors(state, lora)


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is missing; pass one with tokenizer=")
    with loading("tokenizer", folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _config(root: Path, rows: int) -> Qwen2VLConfig:
    """The backbone's config.json, else Qwen2-VL-2B's, with a vocabulary of `rows` (0: unchanged)."""
    config, file = qwen2_vl_2b(), root / "config.json"
    if file.is_file():
        contents = read_json(file)
        with loading("config.json", root):
            config = Qwen2VLConfig(**contents)
    text = config.text_config
    assert isinstance(text, Qwen2VLTextConfig)
    text.vocab_size = rows or text.vocab_size
    return config


def _expected(model: VideoReward, rank: int) -> dict[str, torch.Size]:
    """{our name: shape} of everything that a checkpoint of this model holds, with adapters of `rank`."""
    shapes = {k: v.shape for k, v in model.backbone.state_dict().items()}
    shapes["rm_head.weight"] = model.rm_head.weight.shape
    expected = shapes | {"lm_head.weight": shapes["language_model.embed_tokens.weight"]}
    for key in sorted(k for k in shapes if re.search(r"layers\.\d+\.(self_attn|mlp)\..*weight$", k)):
        name, (out, into) = key.removesuffix(".weight"), shapes[key]
        expected[f"{name}.lora_A.weight"] = torch.Size((rank, into))
        expected[f"{name}.lora_B.weight"] = torch.Size((out, rank))
    return expected


def _shown(names: list[str]) -> str:
    """The number of names and the first three."""
    return f"{len(names)}" + (f" ({', '.join(names[:3])}{', ...' if names[3:] else ''})" if names else "")


def _check(expected: dict[str, torch.Size], given: dict[str, Tensor], root: Path) -> None:
    """Raises ConfigError that names missing, unexpected and misshapen tensors."""
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    misshapen = [f"{k} {tuple(given[k].shape)}, expected {tuple(s)}" for k, s in expected.items()
                 if k in given and given[k].shape != s]  # fmt: skip
    if missing or unexpected or misshapen:
        raise ConfigError(
            f"the checkpoint {root} belongs to another backbone: {_shown(missing)} tensors missing, {_shown(unexpected)} "
            f"unexpected, {_shown(misshapen)} of another shape. The config.json of a checkpoint describes its backbone; "
            "without one it is taken for Qwen2-VL-2B: add the config.json"
        )


def load_video_reward(
    folder: str | Path,
    *,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    template: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    options: RewardOptions = RewardOptions(),
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> VideoReward:
    """A VideoReward with the weights of a published checkpoint.

    Args:
        folder: a checkpoint folder or Hugging Face repository (KwaiVGI/VideoReward); with a config.json if the
            backbone is not Qwen2-VL-2B.
        lora_rank, lora_alpha: merge the published adapter (in float32) and add a new one, initially zero, in its
            place: D begins as VideoAlign and `frozen()` remains VideoAlign. alpha defaults to the rank. None: the
            published adapter itself is trained.
        template, tokenizer: None takes them from the folder (`read_template`, `tokenizer/`).
        dtype: of the trunk; head and adapters are float32.

    Raises FileNotFoundError that names the file or repository, and ValueError that names missing, unexpected and
    misshapen tensors (another backbone) or a setting that this class does not implement. Both are ConfigErrors.
    """
    root, step = _find(folder)
    settings, rank, alpha = _settings(root / "model_config.json")
    template = read_template(root) if template is None else template
    tokenizer = _tokenizer(step / "tokenizer") if tokenizer is None else tokenizer
    state, lora = _tensors(step / "model.pth")
    rows = state.get("language_model.embed_tokens.weight", torch.empty(0, dtype=torch.float32)).shape[0]
    config = _config(root, rows)
    with torch.device("meta"):
        model = VideoReward(config, tokenizer, template, settings, options, dtype)
    expected = _expected(model, rank)
    _check(expected, state | lora, root)
    if model.prompts.reward_ids != [rows - 3, rows - 2, rows - 1]:
        raise ConfigError(
            f"the tokenizer's {REWARD_TOKENS} are {model.prompts.reward_ids}, not the last 3 of {rows} rows: use the one in "
            f"{step / 'tokenizer'}"
        )
    head = state.pop("rm_head.weight").float()
    del state["lm_head.weight"]  # never used for a score
    state = {k: v.to(dtype) for k, v in state.items()}
    _install(model, state if lora_rank is None else merge_lora_state(state, lora, alpha / rank), head)
    model.to(device)
    if lora_rank is None:
        model.add_lora(rank, alpha)
        named = dict(model.backbone.named_parameters())
        for key, value in lora.items():
            named[key.replace(".weight", ".default.weight")].data.copy_(value)
    else:
        model.add_lora(lora_rank, lora_rank if lora_alpha is None else lora_alpha)
    log.info(
        "loaded %s: %d tensors, published adapter %s", step, len(expected), "trains" if lora_rank is None else "merged"
    )
    return model


def _install(model: VideoReward, state: dict[str, Tensor], head: Tensor) -> None:
    """Puts the tensors into a model on the meta device: the trunk frozen, the head trained."""
    model.backbone.load_state_dict(state, strict=True, assign=True)
    model.backbone.requires_grad_(False)
    model.backbone.visual.requires_grad_(not model.options.freeze_vision)
    _rotary(model)
    model.rm_head.weight = nn.Parameter(head.clone())
    model.first_head = head.clone()


def _rotary(model: VideoReward) -> None:
    """Rotary frequencies, which no checkpoint holds, in place of those without storage."""
    visual, lm = model.backbone.visual, model.backbone.language_model
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config)
    lm.rotary_emb = type(lm.rotary_emb)(lm.config)
    empty = [name for name, x in (*model.backbone.named_parameters(), *model.backbone.named_buffers()) if x.is_meta]
    if empty:
        raise RuntimeError(
            f"this transformers version has tensors that the checkpoint does not have: {empty[:3]}; install the version in "
            "constraints.txt"
        )


def save_video_reward(
    model: VideoReward, folder: str | Path, *, step: int = 1, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the published format, under the old names: `load_video_reward` and VideoAlign's code read it.

    lm_head, which VideoAlign's class has and never uses, is written as a copy of the embedding. dtype: of the tensors;
    torch.float32 keeps trained adapters and head exactly. Raises ValueError for a model without adapters.
    """
    if not model.lora:
        raise ValueError("the model has no adapters, the published format has a LoRA: call add_lora first")
    folder = Path(folder)
    target = folder / f"checkpoint-{step}"
    target.mkdir(parents=True, exist_ok=True)
    state = {old_name(name): value for name, value in model.backbone.state_dict().items()}
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

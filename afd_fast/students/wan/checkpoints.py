"""Public checkpoints in and out: original Wan, Self-Forcing, Causal-Forcing, LongLive (base + LoRA), diffusers.

`load_student` reads a `.pt`, `.safetensors`, folder or Hugging Face repository, renames keys to the original Wan
layout and loads strictly: a missing, unexpected or misshapen tensor is an error that names it. Pickles are read
with weights_only=True, which refuses those that carry code.
"""

import contextlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from afd_fast.errors import ConfigError, MissingFileError
from afd_fast.files.text import read_json
from afd_fast.sampler import KEY as SAMPLER_KEY
from afd_fast.sampler import RolloutConfig, Sampler, of_config, preset
from afd_fast.students.files import local_copy, read_tensors
from afd_fast.students.lora import fitted, merge_products
from afd_fast.students.wan.adapters import Adapter, read_adapter
from afd_fast.students.wan.experts import TwoExperts, check_same
from afd_fast.students.wan.model import CausalWan, CausalWanConfig
from afd_fast.students.wan.sizes import config_from_json, infer_config
from afd_fast.students.wan.supported import (
    DIFFUSERS_EXPERTS,
    ExpertFolders,
    check_folder,
    check_settings,
    check_target,
    check_tensors,
)

log = logging.getLogger("afd_fast")
T = TypeVar("T")

# wrappers that add their name to keys: FSDP, activation checkpointing, torch.compile, DDP
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_ROOTS = (
    "base_model.model.",
    "generator.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "model.",
    "net.",
)
_OF_DIFFUSERS = re.compile(r"condition_embedder\.|blocks\.\d+\.(attn[12]|ffn\.net)\.")
_CONSTANTS = ("freqs", "rope.freqs", "rope.freqs_cos", "rope.freqs_sin")  # tables of RoPE, which are computed
_SHARED = ("generator_ema", "generator", "ema", "state_dict", "model", "module")

# original Wan name -> diffusers name; Wan's norm3 is diffusers' norm2, the other norms have no parameters
_DIFFUSERS = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("patch_embedding", "patch_embedding"),
)
_DIFFUSERS_BLOCK = (
    ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.o", "attn2.to_out.0"),
    *((f"{ours}.{p}", f"{theirs}.to_{p}") for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")) for p in "qkv"),
    *((f"{ours}.norm_{p}", f"{theirs}.norm_{p}") for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")) for p in "qk"),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)  # fmt: skip


_JSON = ["*.json"]  # in a repository's folders too
Names = Sequence[tuple[str, str]]  # (from, to)
Loras = str | Path | Sequence[str | Path | tuple[str | Path, float]]  # one, or several with or without weights


class Checkpoint(NamedTuple):
    """Contents of a checkpoint file or folder, and its config.json if it has one."""

    contents: Any
    config: dict[str, Any] | None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """ValueErrors inside the block become ConfigErrors that begin with the path."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _rename(key: str, table: Names, block_table: Names) -> str:
    match = re.match(r"(blocks\.\d+\.)(.*)", key)
    prefix, rest = match.groups() if match else ("", key)
    for source, target in block_table if match else table:
        if rest == source or rest.startswith(source + "."):
            return prefix + target + rest[len(source) :]
    raise ConfigError(f"no counterpart for the tensor {key!r}; expected the tensors of a text-to-video Wan transformer")


def to_diffusers(state: dict[str, T]) -> dict[str, T]:
    """Original Wan keys -> the keys of diffusers' WanTransformer3DModel; a bijection."""
    return {_rename(k, _DIFFUSERS, _DIFFUSERS_BLOCK): v for k, v in state.items()}


def from_diffusers(state: dict[str, T]) -> dict[str, T]:
    """The inverse of `to_diffusers`. Raises ValueError for tensors T2V Wan does not have (image conditioning)."""
    inverse = [[(b, a) for a, b in table] for table in (_DIFFUSERS, _DIFFUSERS_BLOCK)]
    return {_rename(k, *inverse): v for k, v in state.items()}


def clean_keys(state: dict[str, T]) -> dict[str, T]:
    """Any public layout of keys -> the original Wan layout, without tables of RoPE. Raises ValueError if two keys become one,
    and for the tensors of a model that is not supported."""
    stripped: dict[str, T] = {}
    for key, value in state.items():
        name, before = key, ""
        while name != before:
            before, name = name, _WRAPPERS.sub("", name)
            for root in _ROOTS:
                name = name.removeprefix(root)
        if name in _CONSTANTS:
            continue
        if name in stripped:
            raise ConfigError(f"the checkpoint holds {name} twice, once as {key}: remove one of them")
        stripped[name] = value
    check_tensors(stripped)
    return from_diffusers(stripped) if any(map(_OF_DIFFUSERS.match, stripped)) else stripped


def _select(contents: dict[str, Any], weights: str, path: Path) -> dict[str, Tensor]:
    """The requested state dict among those of a training checkpoint."""
    groups = [k for k, v in contents.items() if isinstance(v, dict) and v]
    chosen: str | None
    if weights != "auto":
        if weights not in groups:
            raise ConfigError(f"{path} has no {weights!r}; it holds {groups or 'a bare state dict'}")
        chosen = weights
    else:
        chosen = next((name for name in _SHARED if name in groups), None)
    if chosen is None:
        if groups or not contents or not all(isinstance(v, Tensor) for v in contents.values()):
            raise ConfigError(
                f"{path} holds no student: its entries are {sorted(map(str, contents))[:8]}, expected tensors or one of "
                f"{_SHARED}; name the entry with weights="
            )
        return contents
    if len(groups) > 1:
        log.info("%s: taking %r of %s", path, chosen, groups)
    inner = contents[chosen]
    return _select(inner, "auto", path) if not all(isinstance(v, Tensor) for v in inner.values()) else inner


def _config_file(folder: Path) -> Path:
    """Where the config.json of a folder's transformer is, if it has one."""
    inner = folder / "transformer" / "config.json"
    return inner if inner.exists() else folder / "config.json"


def _read_folder(folder: Path) -> Checkpoint:
    """A diffusers or original Wan folder, or one with a single checkpoint file."""
    config = _config_file(folder)
    folder = config.parent
    settings = read_json(config) if config.exists() else None
    for index in sorted(folder.glob("*.safetensors.index.json")):
        listed = read_json(index).get("weight_map")
        named = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        gone = [name for name in named if not (folder / name).is_file()]
        if 0 < len(gone) < len(named):  # where none is there, the index is an old one
            raise MissingFileError(
                f"{folder} lacks {len(gone)} of the {len(named)} files in {index.name}, such as {gone[0]}: download it again"
            )
    shards = sorted(p for p in folder.glob("*.safetensors") if "adapter" not in p.name)
    if shards:
        contents: dict[str, Tensor] = {}
        for shard in shards:
            part = read_tensors(shard)
            if twice := set(part) & set(contents):
                raise ConfigError(f"{folder}: several files hold {sorted(twice)[0]}; give the one to load")
            contents.update(part)
        return Checkpoint(contents, settings)
    files = sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")])
    if len(files) != 1:
        raise ConfigError(f"{folder} holds {len(files)} checkpoints and no safetensors; give the file to load")
    return Checkpoint(read_tensors(files[0]), settings)


def load_student(
    path_or_repo: str | Path,
    *,
    config: CausalWanConfig | None = None,
    weights: str = "auto",
    lora: Loras | None = None,
    lora_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> CausalWan | TwoExperts:
    """A CausalWan with a public checkpoint's weights, or the two of a Wan 2.2 folder (`TwoExperts`).

    Args:
        path_or_repo: `.pt` / `.pth` (original Wan, Self-Forcing, Causal-Forcing, LongLive: bare or under
            `generator`, `generator_ema`, with `model.`, FSDP, checkpoint or compile prefixes), `.safetensors`,
            a diffusers or original Wan folder, or `owner/name` of such a repository. Two experts: transformer and transformer_2 with
            boundary_ratio in model_index.json, or high_noise_model and low_noise_model.
        config: sizes; by default from config.json or the tensors' shapes.
        weights: which entry of a training checkpoint; "auto" takes generator_ema before generator and logs it.
        lora: a LoRA merged into the weights: of PEFT (LongLive's `generator_lora`, Astrolabe's, an adapter folder),
            diffusers (`attn1.to_q`) or ComfyUI and its trainers (`diffusion_model.`, lora_down / lora_up, alpha); or
            several, each a path or (path, weight).
        lora_scale: alpha / rank of files that do not say it; 1 for LongLive (256 / 256). What the files say
            (adapter_config.json, also beside them, diffusers' metadata, alpha tensors) takes precedence, layer by layer.
        dtype: of the weights; by default that of the checkpoint. options: of `CausalWan`.

    What config.json says about sampling (of `save_student`, FastVideo's window, sink and chunk) is in the model's `sampler`;
    `rollout` without a config follows it.
    Raises FileNotFoundError that names the path or repository, and ValueError that names missing, unexpected or
    misshapen tensors. Both are ConfigErrors of one line.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be a torch.dtype, such as torch.bfloat16, got {dtype!r}")
    adapters = [] if lora is None else _read_loras(lora, lora_scale)
    sampler = sampler_of(path_or_repo)  # what is not supported is named before gigabytes are read
    path = local_copy(path_or_repo, [*_JSON, "*.safetensors", "transformer/*"])
    found = experts_of(path)
    if found is not None and adapters:
        raise ConfigError(
            f"lora= is for one network, and {path} has two experts: load {found.high} and {found.low} each with its adapter, and "
            "join them with TwoExperts(high, low, boundary)"
        )
    parts = [_load(part, adapters, config, weights, dtype, device, options) for part in (found or (path,))[:2]]
    student = parts[0] if found is None else TwoExperts(parts[0], parts[1], found.boundary)
    student.sampler = sampler
    return student.eval()


def _load(
    path: Any, adapters: list[tuple[Path, Adapter]], config: CausalWanConfig | None, weights: str, dtype: torch.dtype | None,
    device: str | torch.device, options: dict[str, Any],
) -> CausalWan:  # fmt: skip
    """One network of `load_student`."""
    contents, settings = _read_folder(path) if path.is_dir() else Checkpoint(read_tensors(path), None)
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} holds a {type(contents).__name__}, not a state dict: give a checkpoint's file")
    selected = _select(contents, weights, path)
    with _naming(path):
        state = clean_keys(selected)
        if config is None:
            config = config_from_json(settings) if settings else infer_config(state)
    fitting = []
    for adapter_path, adapter in adapters:
        with _naming(adapter_path):  # and not the student's, which is sound
            fitting.append(fitted(state, adapter))
    if fitting:
        state = merge_products(state, fitting)
    with torch.device("meta"):
        model = CausalWan(config, **options)
    _check_state(model, state, path)
    dtype = dtype or state["patch_embedding.weight"].dtype
    state = {k: v.to(device, dtype, copy=True) for k, v in state.items()}  # a copy: the file is mapped
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True)


def sampler_of(path_or_repo: str | Path) -> Sampler:
    """What a checkpoint's config.json says about sampling, read without its weights; empty for a file and without any.
    Raises MissingFileError, and ConfigError for a checkpoint that is not supported."""
    path = local_copy(path_or_repo, _JSON)
    if not path.is_dir():
        return {}
    experts = experts_of(path)
    if experts is None:
        return _settings_of(_config_file(path))[1]
    (high, sampler), (low, other) = (_settings_of(expert / "config.json") for expert in experts[:2])
    if apart := [name for name in sampler.keys() & other.keys() if sampler[name] != other[name]]:
        raise ConfigError(
            f"{path}: the experts' config.json say {apart[0]}={sampler[apart[0]]} and {other[apart[0]]}, and a rollout has one: "
            "make them the same"
        )
    sampler = {**other, **sampler}
    if high and low:
        with _naming(path):
            check_same(*map(config_from_json, (high, low)))
    if experts.pipeline == "WanCausalDMDPipeline" and SAMPLER_KEY not in high:
        return {**preset("fastvideo_a14b"), **sampler}
    return sampler


def experts_of(path_or_repo: str | Path) -> ExpertFolders | None:
    """Where a checkpoint's two experts are, read without its weights; None for one network. Raises as `sampler_of`."""
    path = local_copy(path_or_repo, _JSON)
    return check_folder(path) if path.is_dir() else None


def _settings_of(config: Path) -> tuple[dict[str, Any], Sampler]:
    """A config.json and what it says about sampling; empty where there is none. ConfigError for what is not supported."""
    settings = read_json(config) if config.is_file() else {}
    with _naming(config.parent):
        check_settings(settings)
        return settings, of_config(settings)


def _read_loras(lora: Loras, scale: float) -> list[tuple[Path, Adapter]]:
    """The adapters of `load_student` with their paths, each with its weight in its scales. ConfigError for a weight that is no number."""
    found = []
    for item in [lora] if isinstance(lora, (str, Path)) else lora:
        path, weight = (item, 1.0) if isinstance(item, (str, Path)) else item
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"the weight of the LoRA {path} must be a finite number, got {weight!r}")
        adapter = read_adapter(Path(path), scale, clean_keys)
        found.append((Path(path), {name: p._replace(scale=p.scale * weight) for name, p in adapter.items()}))
    return found


def _check_state(model: CausalWan, state: dict[str, Tensor], path: Path) -> None:
    """Raises ConfigError that names the tensors in which the state differs from what the model needs."""
    expected = model.state_dict()

    def listed(found: Iterable[str]) -> str:
        names = sorted(found)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    problems = []
    if missing := set(expected) - set(state):
        problems.append(f"missing: {listed(missing)}")
    if extra := set(state) - set(expected):
        problems.append(f"unexpected: {listed(extra)}")
    wrong = [
        f"{k} {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        problems.append(f"of other shapes: {listed(wrong)}")
    if dtypes := {v.dtype for v in state.values() if not v.is_floating_point()}:
        problems.append(f"not floating point: {dtypes}")
    if problems:
        raise ConfigError(f"{path} does not fit {model.config}: " + "; ".join(problems))


def save_student(
    model: CausalWan | TwoExperts,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
    *,
    sampler: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights (or `state`, under the model's names) as a diffusers WanTransformer3DModel folder. sampler: how it
    is to be sampled (`RolloutConfig.sampler()`), which `load_student` reads; None: what the model's checkpoint said. Two experts
    are written as transformer and transformer_2, with boundary_ratio in model_index.json."""
    from afd_fast.files.tensors import save_tensors

    folder, c = Path(folder), model.config
    kept = dict(model.sampler if sampler is None else sampler)
    check_target(folder, isinstance(model, TwoExperts))
    if any(".base_layer." in name for name in state or model.state_dict()):
        raise ConfigError(
            "the student has adapters, which this layout cannot hold: merge them, or give state= with them merged"
        )
    if isinstance(model, TwoExperts):
        RolloutConfig.of(kept).boundary_level(model.boundary)
        if state is not None and set(state) != set(model.state_dict()):
            raise ConfigError(
                "state must hold both experts' tensors under the names of model.state_dict(): high.* and low.*"
            )
        for name, part, expert in zip(DIFFUSERS_EXPERTS, ("high.", "low."), (model.high, model.low)):
            of_part = {k.removeprefix(part): v for k, v in (state or {}).items() if k.startswith(part)}
            save_student(expert, folder / name, of_part, sampler=kept)
        kind, index = ["diffusers", "WanTransformer3DModel"], folder / "model_index.json"
        about = {
            "_class_name": "WanPipeline",
            "boundary_ratio": model.boundary / 1000,
            **dict.fromkeys(DIFFUSERS_EXPERTS, kind),
        }
        index.write_text(json.dumps({**(read_json(index) if index.is_file() else {}), **about}, indent=2) + "\n")
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": c.num_heads,
        "attention_head_dim": c.dim // c.num_heads, "in_channels": c.in_dim, "out_channels": c.out_dim,
        "text_dim": c.text_dim, "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": c.eps, "image_dim": None,
        "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None, "text_len": c.text_len,
    }  # fmt: skip
    if kept:
        settings[SAMPLER_KEY] = kept
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    state = {k: v.detach().cpu().contiguous() for k, v in to_diffusers(clean_keys(state or model.state_dict())).items()}
    save_tensors(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})

"""Public checkpoints in and out: original Wan, Self-Forcing, Causal-Forcing, LongLive (base + LoRA), diffusers.

`load_student` reads a `.pt`, `.safetensors`, folder or Hugging Face repository, renames keys to the original Wan
layout and loads strictly: a missing, unexpected or misshapen tensor is an error that names it. Pickles are read
with weights_only=True, so one that carries code is refused.
"""

import json
import logging
import pickle
import re
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from afd_fast.students.lora import merge_lora_state
from afd_fast.students.wan.model import CausalWan, CausalWanConfig

log = logging.getLogger("afd_fast")

# wrappers that put their name into keys: FSDP, activation checkpointing, torch.compile, DDP
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
_ROOTS = ("base_model.model.", "generator.", "model.diffusion_model.", "model.", "net.")
_SHARED = ("generator_ema", "generator", "ema", "state_dict", "model")

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


def _rename(key: str, table, block_table) -> str:
    match = re.match(r"(blocks\.\d+\.)(.*)", key)
    prefix, rest = match.groups() if match else ("", key)
    for source, target in block_table if match else table:
        if rest == source or rest.startswith(source + "."):
            return prefix + target + rest[len(source) :]
    raise ValueError(f"no counterpart for the tensor {key!r}")


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original Wan keys -> the keys of diffusers' WanTransformer3DModel; a bijection."""
    return {_rename(k, _DIFFUSERS, _DIFFUSERS_BLOCK): v for k, v in state.items()}


def from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`. Raises ValueError for tensors T2V Wan does not have (image conditioning)."""
    inverse = [tuple((b, a) for a, b in table) for table in (_DIFFUSERS, _DIFFUSERS_BLOCK)]
    return {_rename(k, *inverse): v for k, v in state.items()}


def clean_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any public layout of keys -> the original Wan layout. Raises ValueError when two keys become one."""
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        name, before = key, None
        while name != before:
            before, name = name, _WRAPPERS.sub("", name)
            for root in _ROOTS:
                name = name.removeprefix(root)
        if name in stripped:
            raise ValueError(f"the checkpoint holds {name} twice, once as {key}")
        stripped[name] = value
    return from_diffusers(stripped) if any(k.startswith("condition_embedder.") for k in stripped) else stripped


def _read(path: Path) -> dict:
    """A checkpoint file's contents, on the CPU."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old, not zipped format has no mmap
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"{path} is not a plain file of tensors: refused, since loading it could run code ({reason})"
        ) from None


def _select(contents: dict, weights: str, path: Path) -> dict[str, Tensor]:
    """The state dict asked for among those of a training checkpoint."""
    groups = [k for k, v in contents.items() if isinstance(v, dict) and v]
    if weights != "auto":
        if weights not in groups:
            raise ValueError(f"{path} has no {weights!r}; it holds {groups or 'a bare state dict'}")
        chosen = weights
    else:
        chosen = next((name for name in _SHARED if name in groups), None)
    if chosen is None:
        if groups or not contents or not all(isinstance(v, Tensor) for v in contents.values()):
            raise ValueError(f"{path} holds no student: its entries are {sorted(map(str, contents))[:8]}")
        return contents
    if len(groups) > 1:
        log.info("%s: taking %r of %s", path, chosen, groups)
    inner = contents[chosen]
    return _select(inner, "auto", path) if not all(isinstance(v, Tensor) for v in inner.values()) else inner


def _read_folder(folder: Path) -> tuple[dict, dict | None]:
    """(contents, config.json) of a diffusers or original Wan folder, or of one with a single checkpoint."""
    if (folder / "transformer" / "config.json").exists():
        folder = folder / "transformer"
    config = folder / "config.json"
    settings = json.loads(config.read_text()) if config.exists() else None
    shards = sorted(p for p in folder.glob("*.safetensors") if "adapter" not in p.name)
    if shards:
        contents: dict = {}
        for shard in shards:
            part = _read(shard)
            if twice := set(part) & set(contents):
                raise ValueError(f"{folder}: several files hold {sorted(twice)[0]}; give the one to load")
            contents.update(part)
        return contents, settings
    files = sorted([*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")])
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} checkpoints and no safetensors; give the file to load")
    return _read(files[0]), settings


def _config_from_json(settings: dict) -> CausalWanConfig:
    """From a diffusers (num_attention_heads ...) or an original Wan (dim, num_heads ...) config.json."""
    if "num_attention_heads" in settings:
        heads = settings["num_attention_heads"]
        names = {"in_channels": "in_dim", "out_channels": "out_dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers",
                 "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps", "text_len": "text_len"}  # fmt: skip
        if settings.get("image_dim") or settings.get("added_kv_proj_dim"):
            raise ValueError("this is an image-to-video Wan (image_dim is set); CausalWan has no image branch")
        if tuple(settings.get("patch_size", (1, 2, 2))) != (1, 2, 2):
            raise ValueError(f"patch_size must be (1, 2, 2), got {settings['patch_size']}")
        sizes = {ours: settings[theirs] for theirs, ours in names.items() if theirs in settings}
        return CausalWanConfig(dim=heads * settings["attention_head_dim"], num_heads=heads, **sizes)
    known = {f.name for f in fields(CausalWanConfig)}
    return CausalWanConfig(**{k: v for k, v in settings.items() if k in known})


def infer_config(state: dict[str, Tensor]) -> CausalWanConfig:
    """Sizes from the tensors' shapes; head width 128 and text_len 512, which every public Wan has.

    Raises ValueError when the width is not a multiple of 128: the number of heads is then not in the weights.
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
        raise ValueError(
            f"these are not a Wan transformer's weights: no {error}; first keys {sorted(state)[:4]}"
        ) from None
    if dim % 128:
        raise ValueError(f"the weights have width {dim}, not a multiple of 128: pass config=CausalWanConfig(...)")
    return CausalWanConfig(dim=dim, num_heads=dim // 128, num_layers=layers, in_dim=in_dim, **sizes)


def _local(source: str | Path) -> Path:
    path = Path(source)
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "transformer/*"]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    raise FileNotFoundError(f"{source} is neither a file, a folder nor an owner/name repository")


def load_student(
    path_or_repo: str | Path,
    *,
    config: CausalWanConfig | None = None,
    weights: str = "auto",
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **options,
) -> CausalWan:
    """A CausalWan with a public checkpoint's weights.

    Args:
        path_or_repo: `.pt` / `.pth` (original Wan, Self-Forcing, Causal-Forcing, LongLive: bare or under
            `generator`, `generator_ema`, with `model.`, FSDP, checkpoint or compile prefixes), `.safetensors`,
            a diffusers or original Wan folder, or `owner/name` of such a repository.
        config: sizes; by default from config.json or the tensors' shapes.
        weights: which entry of a training checkpoint; "auto" takes generator_ema before generator and logs it.
        lora: a PEFT LoRA (LongLive's `generator_lora`, Astrolabe's, an adapter folder's) merged into the weights.
        lora_scale: alpha / rank; 1 for LongLive (256 / 256). A folder's adapter_config.json is honoured instead.
        dtype: of the weights; by default the checkpoint's own. options: of `CausalWan`.

    Raises FileNotFoundError, and ValueError naming missing, unexpected or misshapen tensors.
    """
    path = _local(path_or_repo)
    contents, settings = _read_folder(path) if path.is_dir() else (_read(path), None)
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a state dict")
    state = clean_keys(_select(contents, weights, path))
    if config is None:
        config = _config_from_json(settings) if settings else infer_config(state)
    if lora is not None:
        state = merge_lora_state(state, *_read_lora(Path(lora), lora_scale))
    with torch.device("meta"):
        model = CausalWan(config, **options)
    _check_state(model, state, path)
    dtype = dtype or state["patch_embedding.weight"].dtype
    state = {k: v.to(device, dtype, copy=True) for k, v in state.items()}  # its own memory, not the mapped file
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)
    return model.eval()


def _read_lora(path: Path, scale: float) -> tuple[dict[str, Tensor], float]:
    if path.is_dir():
        settings = json.loads((path / "adapter_config.json").read_text())
        rank = settings["r"]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        files = [p for p in (path / "adapter_model.safetensors", path / "adapter_model.bin") if p.exists()]
        if not files:
            raise FileNotFoundError(f"{path} has no adapter_model.safetensors")
        path = files[0]
    contents = _read(path)
    lora = contents.get("generator_lora", contents)
    if not lora or not all(isinstance(v, Tensor) for v in lora.values()):
        raise ValueError(f"{path} is not a LoRA state dict; its entries are {sorted(map(str, contents))[:8]}")
    return {re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", k): v for k, v in clean_keys(lora).items()}, scale


def _check_state(model: CausalWan, state: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()

    def listed(names) -> str:
        names = sorted(names)
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
        raise ValueError(f"{path} does not fit {model.config}: " + "; ".join(problems))


def save_diffusers(model: CausalWan, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the weights (or `state`, under the model's names) as a diffusers WanTransformer3DModel folder."""
    from safetensors.torch import save_file

    folder, c = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": c.num_heads,
        "attention_head_dim": c.dim // c.num_heads, "in_channels": c.in_dim, "out_channels": c.out_dim,
        "text_dim": c.text_dim, "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": c.eps, "image_dim": None,
        "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None, "text_len": c.text_len,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    state = {k: v.detach().cpu().contiguous() for k, v in to_diffusers(clean_keys(state or model.state_dict())).items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

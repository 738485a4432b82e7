"""LoRA files of every public layout as products of the original Wan layers, each with its own scale.

Layouts: PEFT (a folder, or its file beside adapter_config.json), LongLive's `generator_lora`, diffusers (`attn1.to_q`, with
its settings in the file), ComfyUI and its trainers (`diffusion_model.`, `lora_unet_`, lora_down / lora_up, alpha). What an
adapter's settings say about ranks and scales holds layer by layer, as PEFT applies it; settings that change more than
W + scale B A are refused by name.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from afd_fast.errors import ConfigError, MissingFileError, extra
from afd_fast.files.text import read_json
from afd_fast.students.files import read_tensors
from afd_fast.students.lora import Product

Adapter = dict[str, Product]  # by the layer's name
Clean = Callable[[dict[str, Any]], dict[str, Any]]  # any layout's keys -> the original ones

_CONFIG = "adapter_config.json"
_NAMES = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_A.weight": "A", "lora_B.weight": "B"}
# settings of PEFT's LoraConfig with which the layer is no longer W + scale B A, or is another layer
_MORE = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters",
         "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "trainable_token_indices",
         "modules_to_save")  # fmt: skip
_KINDS = {  # in a tensor's key -> what the adapter is
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
    "lora_B.bias": "LoRA with trained biases", "lora_up.bias": "LoRA with trained biases", ".diff_b": "LoRA with differences of biases",
    ".diff": "LoRA with differences of whole weights", "vera_lambda_": "VeRA", "ia3_l": "IA3",
}  # fmt: skip
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave W as it is


def read_adapter(path: Path, scale: float, clean: Clean) -> Adapter:
    """The products of a LoRA file, or of a folder that PEFT saved. scale: of a file that says nothing about it.

    Raises MissingFileError for what is not there, and ConfigErrors that begin with the path."""
    settings: Mapping[str, Any] | None = None
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise MissingFileError(f"{path / _CONFIG} is missing: give a folder that PEFT saved, or the LoRA's file")
        files = [p for p in (path / "adapter_model.safetensors", path / "adapter_model.bin") if p.exists()]
        if not files:
            raise MissingFileError(f"{path} has no adapter_model.safetensors: give a folder that PEFT saved")
        path = files[0]
    if not path.is_file():
        raise MissingFileError(f"{path} is neither a LoRA's file nor a folder that PEFT saved: check the path")
    beside = path.with_name(_CONFIG)
    if beside.is_file():
        settings = read_json(beside)
    contents = read_tensors(path)
    lora = contents.get("generator_lora", contents) if isinstance(contents, dict) else None
    if not isinstance(lora, dict) or not lora or not all(isinstance(v, Tensor) for v in lora.values()):
        found = sorted(map(str, contents))[:8] if isinstance(contents, dict) else type(contents).__name__
        raise ConfigError(f"{path} is not a LoRA state dict; it holds {found}")
    try:
        if settings is None and path.suffix == ".safetensors":
            settings = _diffusers_metadata(path)
        return _products(lora, settings, scale, clean)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _products(lora: dict[str, Tensor], settings: Mapping[str, Any] | None, scale: float, clean: Clean) -> Adapter:
    """The tensors as products under the original layers' names. Raises ValueError for half pairs and other tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    if settings is not None:
        _check(settings)
    for key, value in lora.items():
        name, letter = _split(key)
        parts.setdefault(name, {})[letter] = value
    for name, pair in parts.items():
        if not {"A", "B"} & set(pair):
            raise ConfigError(f"{name}.alpha belongs to no LoRA layer: restore the file")
        if not {"A", "B"} <= set(pair):
            raise ConfigError(f"{name} has lora_{next(iter({'A', 'B'} & set(pair)))} only: restore the file")
    for name, pair in parts.items():
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ConfigError(
                f"{name} has A {tuple(a)} and B {tuple(b)}, expected [rank, in] and [out, rank] of a linear layer: restore the file, or "
                "merge the adapter with its own program"
            )
    any_alpha = any("alpha" in pair for pair in parts.values())
    original: dict[str, str] = clean({f"{name}.weight": name for name in parts})
    found = {}
    for key, name in original.items():
        pair = parts[name]
        rank = len(pair["A"])
        if "alpha" in pair:
            own = pair["alpha"].item() / rank
        elif settings is not None:
            own = _scale_of(name, rank, settings)
        else:
            own = 1.0 if any_alpha else scale  # a layer without alpha among others: alpha is its rank
        found[key.removesuffix(".weight")] = Product(pair["A"], pair["B"], own)
    return found


def _split(key: str) -> tuple[str, str]:
    """A tensor's key -> its layer and which part it is: A, B or alpha. ConfigError for another tensor."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    named = re.sub(r"(lora_[AB])\.[^.]+\.weight$", r"\1.weight", key)  # PEFT puts the adapter's name in
    for ending, letter in _NAMES.items():
        if named.endswith("." + ending):
            return named.removesuffix("." + ending), letter
    if kind := next((kind for part, kind in _KINDS.items() if part in key), None):
        raise ConfigError(
            f"the adapter is a {kind}, which is more than W + scale B A: merge it with the program that made it, and load the merged "
            f"weights (it has the tensor {key})"
        )
    raise ConfigError(
        f"not a LoRA weight: {key}; expected lora_A and lora_B, or lora_down, lora_up and alpha, of linear layers"
    )


def _check(settings: Mapping[str, Any]) -> None:
    """ConfigError for an adapter that is more than W + scale B A."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"the adapter is a {kind}, not a LORA: merge it with PEFT and load the merged weights")
    wrong = next((name for name in _MORE if settings.get(name)), None)
    if wrong is None and settings.get("bias", "none") != "none":
        wrong = "bias"
    start = settings.get("init_lora_weights")
    if wrong is None and not any(start is kept or start == kept for kept in _KEEPS_BASE):
        wrong = "init_lora_weights"  # PiSSA, OLoRA and others take a part of W away
    if wrong is not None:
        named = " (a DoRA)" if wrong == "use_dora" else ""
        raise ConfigError(
            f"the adapter has {wrong}={settings[wrong]!r}{named}, which is more than W + scale B A: merge it with PEFT and load "
            "the merged weights"
        )


def _scale_of(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """PEFT's scale of a layer: alpha / rank, with patterns' values where a pattern matches the end of its name."""
    module = name.removeprefix("base_model.model.").removeprefix("transformer.")
    try:
        r = _matching(settings.get("rank_pattern"), module, settings["r"])
        alpha = _matching(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        found = alpha / (r**0.5 if settings.get("use_rslora") else r)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, re.error) as error:
        raise ConfigError(f"its settings have no usable r and lora_alpha ({error!r}): restore the file") from None
    if r != rank:
        raise ConfigError(f"{name} has rank {rank}, its settings say {r}: restore the file")
    return float(found)


def _matching(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches, as PEFT's get_pattern_key decides."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _diffusers_metadata(path: Path) -> dict[str, Any] | None:
    """The settings that diffusers keeps in a safetensors file; None without any."""
    with extra("train"):
        from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"its LoRA metadata is damaged ({error}): restore the file") from None

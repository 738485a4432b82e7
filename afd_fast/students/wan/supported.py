"""Which checkpoints are a text-to-video Wan, the only family here, and the names of those that are not.

Everything is read from model_index.json, config.json or the tensors' names and shapes, before weights are.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from afd_fast.errors import ConfigError, extra
from afd_fast.files.text import read_json
from afd_fast.students.files import loading

EXPECTED = "expected a text-to-video Wan transformer"
# of transformers' config.json; FastVideo's and Self-Forcing's causal classes have the same weights
_CLASSES = ("WanTransformer3DModel", "WanModel", "CausalWanModel", "CausalWanTransformer3DModel")
_PIPELINES = ("WanPipeline", "WanDMDPipeline", "WanCausalPipeline", "WanCausalDMDPipeline")  # of model_index.json
_TYPES = ("t2v", "ti2v")  # model_type of original Wan; TI2V's image is a first latent frame
_MEANING = {"i2v": "image-to-video", "flf2v": "first-and-last-frame-to-video", "vace": "VACE", "s2v": "speech-to-video",
            "animate": "Animate"}  # fmt: skip
DIFFUSERS_EXPERTS = ("transformer", "transformer_2")  # high and low noise
_WAN_EXPERTS = ("high_noise_model", "low_noise_model")  # original Wan 2.2
_WAN_BOUNDARY = 0.875  # wan/configs/wan_t2v_A14B.py; the folder does not hold it
_TENSORS = {  # a tensor's name begins with -> what the checkpoint is
    "img_emb.": "an image-to-video Wan 2.1 (it has an image branch)",
    "condition_embedder.image_embedder.": "an image-to-video Wan 2.1 (it has an image branch)",
    "vace_": "a VACE Wan",
    "control_adapter.": "a Fun-Control Wan",
    "ref_conv.": "a Fun-Control Wan",
    "pose_patch_embedding.": "a Wan Animate",
    "casual_audio_encoder.": "a speech-to-video Wan",
    "double_blocks.": "a HunyuanVideo, or another model with double_blocks",
    "transformer_blocks.": "an LTX-Video, CogVideoX or another model with transformer_blocks",
}


ONE_EXPERT = (  # where a student is to be trained
    "a student of two experts is sampled and not trained: give the folder of one, such as student.name=FOLDER/transformer_2 or "
    "FOLDER/low_noise_model"
)


class ExpertFolders(NamedTuple):
    """Where the two experts of a folder are, the t that divides them, and the class of its pipeline where an index names it."""

    high: Path
    low: Path
    boundary: float
    pipeline: str | None


def check_folder(folder: Path) -> ExpertFolders | None:
    """The two experts of a Wan 2.2 folder, None where it has one transformer. ConfigError that names what the folder is, if it is no
    text-to-video Wan, and for one expert of two or no boundary."""
    index = folder / "model_index.json"
    settings = read_json(index) if index.is_file() else {}
    kind, ratio = settings.get("_class_name"), settings.get("boundary_ratio")
    if kind is not None and kind not in _PIPELINES:
        raise ConfigError(f"{folder} holds a {kind}, which is not supported; {EXPECTED}")
    named = ratio is not None or settings.get("transformer_2") not in (None, [None, None])
    if any((folder / name).is_dir() for name in _WAN_EXPERTS):
        names, said = _WAN_EXPERTS, "as Wan 2.2's folders"
        ratio = _WAN_BOUNDARY if ratio is None else ratio
    elif named or (folder / DIFFUSERS_EXPERTS[1]).is_dir():
        names, said = DIFFUSERS_EXPERTS, "in model_index.json" if named else "as diffusers' folders"
    else:
        return None
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        there = next((f", or give the folder of one, {folder / name}" for name in names if name not in missing), "")
        raise ConfigError(
            f"{folder} has two experts {said}, {names[0]} and {names[1]}, and {' and '.join(missing)} is missing: download "
            f"it{there}"
        )
    if ratio is None:
        raise ConfigError(
            f"{folder} has two experts ({names[0]} and {names[1]}) and no boundary_ratio in model_index.json: add it, such as "
            f"0.875 of Wan2.2-T2V-A14B, or give the folder of one, such as {folder / names[0]}"
        )
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ConfigError(
            f"boundary_ratio in {index} must be a number between 0 and 1, such as 0.875, got {ratio!r}: restore the file"
        )
    return ExpertFolders(folder / names[0], folder / names[1], 1000 * float(ratio), kind)


def check_target(folder: Path, two: bool) -> None:
    """ConfigError for a folder whose contents `load_student` would read instead of a student of one or two networks saved there."""
    before = _WAN_EXPERTS if two else (*_WAN_EXPERTS, *DIFFUSERS_EXPERTS)
    there = [name for name in before if (folder / name).is_dir()]
    if there:
        raise ConfigError(
            f"{folder} holds another student ({', '.join(there)}), which would be loaded instead: save into a new folder"
        )


def check_trained(student: str) -> None:
    """ConfigError for a folder of two experts, and for a repository that is named after them; nothing is downloaded."""
    folder = Path(student)
    named = "a14b" in student.lower() and not folder.exists() and folder.suffix not in (".pt", ".pth", ".safetensors")
    if named or (folder.is_dir() and check_folder(folder) is not None):
        raise ConfigError(ONE_EXPERT)


def check_file(path: Path) -> None:
    """ConfigError for the file of an embedded student, which says how it is given."""
    if path.suffix != ".safetensors" or not path.is_file():
        return
    with extra("eval"):
        from safetensors import safe_open
    with loading("checkpoint", path), safe_open(path, "pt") as file:
        about = file.metadata() or {}
    made = json.loads(about.get("config", "{}"))
    if "chunk" in made:
        kind = "pixel" if "made" in about else "lights" if made["chunk"] == 6 else "toy"
        raise ConfigError(f"{path} is an embedded student's file: give student={kind} student.base={path}")


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError that names what a transformer's config.json describes, if it is not a text-to-video Wan."""
    kind, task = settings.get("_class_name"), settings.get("model_type")
    if kind is not None and kind not in _CLASSES:
        raise ConfigError(f"its class is {kind}, which is not supported; {EXPECTED}")
    if task is not None and task not in _TYPES:
        raise ConfigError(
            f"this Wan is made for {_MEANING.get(task, task)} (model_type={task!r}), which is not supported; {EXPECTED}"
        )
    if settings.get("image_dim") or settings.get("added_kv_proj_dim"):
        raise ConfigError(
            f"this is an image-to-video Wan 2.1 (image_dim is set): its image branch is not supported; {EXPECTED}"
        )
    names = [pair for pair in (("in_channels", "out_channels"), ("in_dim", "out_dim")) if set(pair) <= set(settings)]
    for given, made in names:
        check_channels(settings[given], settings[made])


def check_channels(given: int, made: int) -> None:
    """ConfigError for a transformer that takes more channels than it makes: the rest are an image or a control video."""
    if given != made:
        raise ConfigError(
            f"this Wan takes {given} channels and makes {made}: an image-to-video (36) or Fun-Control (48) model, whose other "
            f"channels are not supported; {EXPECTED}"
        )


def check_tensors(names: Collection[str]) -> None:
    """ConfigError that names what the tensors belong to, if that is a known model of another family."""
    for start, meaning in _TENSORS.items():
        found = next((name for name in names if name.startswith(start)), None)
        if found is not None:
            raise ConfigError(f"this is {meaning}, which is not supported: it has the tensor {found}; {EXPECTED}")

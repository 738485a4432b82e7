"""Checkouts of public projects as `benchmarks.parity` imports them: theirs where it computes, stand-ins where it does not."""

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from afd_fast.students import CausalWanConfig
from benchmarks.peers import not_compiled, sdpa

HEIGHT, WIDTH = 4, 6  # latents; 6 tokens per frame
TOKENS = HEIGHT * WIDTH // 4
SIZES = CausalWanConfig.tiny()


class Replaced:
    """Imports modules of a checkout with the released sizes in their source replaced by the small ones."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        heads, width = SIZES.num_heads, SIZES.dim // SIZES.num_heads
        self.sizes = {
            "12, 128]": f"{heads}, {width}]", ", 512, ": f", {SIZES.text_len}, ", "num_transformer_blocks = 30": f"num_transformer_blocks = {SIZES.num_layers}",
            # float32 stays, float64 is not rounded to it
            "x.float()": "x",
            "32760": str(21 * TOKENS), "4680": str(3 * TOKENS), "3120": str(2 * TOKENS), "1560": str(TOKENS),
        }  # fmt: skip

        if importlib.util.find_spec("einops") is None:
            self.stand_in("einops", repeat=object)

    def package(self, name: str) -> None:
        """An empty package, so that its __init__ does not import all of it."""
        module = types.ModuleType(name)
        module.__path__ = [str(self.checkout / name.replace(".", "/"))]
        sys.modules[name] = module

    def stand_in(self, name: str, **members: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module

    def module(self, name: str) -> Any:
        path = self.checkout / (name.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8")
        for old, new in self.sizes.items():
            source = source.replace(old, new)
        module = types.ModuleType(name)
        module.__file__, module.__package__ = str(path), name.rpartition(".")[0]
        sys.modules[name] = module
        exec(compile(source, str(path), "exec"), module.__dict__)
        return module


@contextmanager
def uncompiled() -> Iterator[None]:
    """FlexAttention is compiled at import, and not used here."""
    compiled = torch.compile
    torch.compile = not_compiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled


def load(checkout: Path) -> Replaced:
    """Everything that the pipelines import, theirs where it computes and stand-ins where it does not."""
    theirs = Replaced(checkout)
    for name in ("wan", "wan.modules", "utils", "pipeline", "demo_utils"):
        theirs.package(name)
    nothing: Any = object
    memory = dict.fromkeys(
        ("gpu", "get_cuda_free_memory_gb", "DynamicSwapInstaller", "move_model_to_device_with_memory_preservation", "log_gpu_memory"), None
    )  # fmt: skip
    for name in ("demo_utils.memory", "utils.memory"):
        theirs.stand_in(name, **memory)
    theirs.stand_in("utils.debug_option", DEBUG=False)
    theirs.stand_in("wan.modules.tokenizers", HuggingfaceTokenizer=nothing)
    theirs.stand_in("wan.modules.vae", _video_vae=nothing)
    theirs.stand_in("wan.modules.t5", umt5_xxl=nothing)
    with uncompiled():
        attention = theirs.module("wan.modules.attention")
        attention.attention = attention.flash_attention = sdpa
        theirs.module("wan.modules.model")
        theirs.module("wan.modules.causal_model")
        if (checkout / "wan/modules/causal_model_infinity.py").exists():
            theirs.module("wan.modules.causal_model_infinity")
        theirs.module("utils.scheduler")
        theirs.module("utils.wan_wrapper")
        theirs.module("pipeline.causal_inference")
        if (checkout / "pipeline/causal_diffusion_inference.py").exists():
            theirs.package("wan.utils")
            theirs.module("wan.utils.fm_solvers")
            theirs.module("wan.utils.fm_solvers_unipc")
            theirs.module("pipeline.causal_diffusion_inference")
        if (checkout / "pipeline/interactive_causal_inference.py").exists():
            theirs.module("pipeline.interactive_causal_inference")
    return theirs


def load_longlive2(checkout: Path) -> None:
    """LongLive 2.0's causal model, wrapper and pipeline. Its Triton kernels, which the CPU cannot run, are switched off by its own
    variables."""
    os.environ |= {"LLV2_TRITON_ROPE": "0", "LLV2_TRITON_ADALN": "0"}
    theirs = Replaced(checkout)
    for name in ("wan_5b", "wan_5b.modules", "wan_5b.utils", "utils", "pipeline"):
        theirs.package(name)
    nothing: Any = object
    for module, name in (
        ("omegaconf", "OmegaConf"), ("transformers.models.x_clip.modeling_x_clip", "x_clip_loss"),
        ("wan_5b.modules.tokenizers", "HuggingfaceTokenizer"), ("wan_5b.modules.vae2_2", "_video_vae"), ("wan_5b.modules.t5", "umt5_xxl"),
    ):  # fmt: skip
        theirs.stand_in(module, **{name: nothing})
    theirs.stand_in("utils.dataset", DEFAULT_SCENE_CUT_PREFIX="The scene transitions. ")
    with uncompiled():
        attention = theirs.module("wan_5b.modules.attention")
        attention.attention = attention.flash_attention = sdpa
        for name in (
            "utils.config", "utils.position_embedding_utils", "utils.i2v_conditioning", "utils.prompt_conditioning", "utils.scheduler",
            "wan_5b.modules.model", "wan_5b.modules.causal_model", "wan_5b.utils.fm_solvers", "wan_5b.utils.fm_solvers_unipc",
            "utils.wan_5b_wrapper", "pipeline.causal_diffusion_inference",
        ):  # fmt: skip
            theirs.module(name)
    sizes = {
        "num_heads": SIZES.num_heads,
        "head_dim": SIZES.dim // SIZES.num_heads,
        "num_transformer_blocks": SIZES.num_layers,
    }
    sys.modules["utils.config"].wan_default_config["Wan2.2-TI2V-5B"] |= sizes


class _Blank(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Blank(metaclass=_Blank):
    """Stands in for any class of theirs that is imported and not used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    @staticmethod
    def register(_: str) -> Callable[[Any], Any]:
        return lambda decorated: decorated


class BlankModule(types.ModuleType):
    """A module of such classes, and of functions that return None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Blank if name[0].isupper() else lambda *_, **__: None


def load_fastvideo(checkout: Path) -> None:
    """FastVideo's causal model with its RoPE and positions, its scheduler and its stage for causal students; the rest of what they
    import is blank."""
    theirs = Replaced(checkout)
    theirs.sizes["torch.bfloat16"] = "DTYPE"  # set with each student
    ours = (
        "layers.rotary_embedding", "models.dits._relative_rope", "models.dits.causal_wanvideo", "models.utils",
        "models.schedulers.base",
        "models.schedulers.scheduling_self_forcing_flow_match", "pipelines.stages.causal_denoising",
    )  # fmt: skip
    for file in ours:
        path = checkout / f"fastvideo/{file.replace('.', '/')}.py"
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(("import fastvideo.", "from fastvideo")):
                parts = line.split()[1].split(".")
                for depth in range(1, len(parts) + 1):
                    name = ".".join(parts[:depth])
                    sys.modules.setdefault(name, BlankModule(name))
    sys.modules["fastvideo.layers.custom_op"] = BlankModule("fastvideo.layers.custom_op")
    sys.modules["fastvideo"].envs = None  # type: ignore[attr-defined]
    sys.modules["fastvideo.forward_context"].set_forward_context = lambda **_: nullcontext()  # type: ignore[attr-defined]
    sys.modules["fastvideo.distributed"].get_local_torch_device = lambda: "cpu"  # type: ignore[attr-defined]
    with uncompiled():
        for name in ours:
            theirs.module(f"fastvideo.{name}")

"""Checkouts of public projects as `benchmarks.parity` imports them: theirs where it computes, stand-ins where it does not."""

import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd_fast.reference.transformer import rms_norm
from afd_fast.rollout import RolloutConfig
from afd_fast.students import CausalWan, CausalWanConfig
from benchmarks.peers import not_compiled, sdpa

HEIGHT, WIDTH = 4, 6  # latents; 6 tokens per frame
TOKENS = HEIGHT * WIDTH // 4
SIZES = CausalWanConfig.tiny()


class TextStandIn(torch.nn.Module):
    """Prompts "0", "1", ... -> embeddings."""

    def __init__(self, embeddings: list[Tensor]) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.stack([self.embeddings[int(p)] for p in text_prompts])}


class VAEStandIn(torch.nn.Module):
    """Latents are the video."""

    def decode_to_pixel(self, latents: Tensor, **_: Any) -> Tensor:
        return latents

    decode_to_pixel_chunk = decode_to_pixel


class Pixels:
    """A VAE's shapes in two matrices: the first latent frame becomes one frame of video, later ones four, each also of the latent before;
    a frame of video alone becomes another latent."""

    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(1)
        mixed, back = (torch.randn(n, 3, SIZES.in_dim, generator=g, dtype=torch.float64).to(dtype) for n in (4, 1))
        self.mixed, self.back, self.past = mixed, back[0], torch.zeros(())

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, H, W] to pixels [B, 3, 4 f, 8 H, 8 W] in [-1, 1], of the first call 4 f - 3."""
        first = self.past.ndim == 0
        before = torch.cat([torch.zeros_like(latents[:, :, :1]) if first else self.past, latents[:, :, :-1]], 2)
        self.past = latents[:, :, -1:]
        video = torch.einsum("kdc,bcfhw->bdfkhw", self.mixed, latents + before / 2).div(4).tanh().flatten(2, 3)
        return video[:, :, 3 * first :].repeat_interleave(8, 3).repeat_interleave(8, 4)

    def encode(self, frame: Tensor) -> Tensor:
        """Pixels [B, 3, 1, 8 H, 8 W] to a latent [B, C, 1, H, W]."""
        return torch.einsum("dc,bdfhw->bcfhw", self.back, frame[..., ::8, ::8])

    def first_frame(self, latents: Tensor) -> Tensor:
        """`WanDecoder.reencode`."""
        return self.encode(self.decode(latents)[:, :, -4 * latents.shape[2] + 3 :][:, :, :1])


@contextmanager
def drawn(noise: Iterable[Tensor]) -> Iterator[None]:
    """`torch.randn_like` [B * f, ...], `torch.randn(B * f, ...)` and `torch.randn((B, f, ...))` give these draws in order; smaller ones
    are cut."""
    draws, like, of = iter(noise), torch.randn_like, torch.randn

    def randn(*shape: Any, **_: Any) -> Tensor:
        if isinstance(shape[0], int):
            return next(draws)
        return next(draws).unflatten(0, (shape[0][0], -1))[:, : shape[0][1]]

    torch.randn_like = lambda like, **_: next(draws)[: like.shape[0]].to(like)  # type: ignore[assignment]
    torch.randn = randn
    try:
        yield
    finally:
        torch.randn_like, torch.randn = like, of


class Options(dict[str, Any]):
    """Their configuration: keys as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Replaced:
    """Imports modules of a checkout with the released sizes in their source replaced by the small ones."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        heads, width = SIZES.num_heads, SIZES.dim // SIZES.num_heads
        self.sizes = {
            "12, 128]": f"{heads}, {width}]", ", 512, ": f", {SIZES.text_len}, ", "num_transformer_blocks = 30": f"num_transformer_blocks = {SIZES.num_layers}",
            # float32 stays, float64 is not rounded to it
            "x.float()": "x",
            "torch.cuda.current_device()": "'cpu'",
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

    def module(self, name: str, replaced: Mapping[str, str] = {}, until: str = "\0") -> Any:
        """replaced: more of the source; until: where it is cut off."""
        path = self.checkout / (name.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8").partition(until)[0]
        for old, new in (self.sizes | dict(replaced)).items():
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
    theirs.stand_in("wan.modules.sage", sageattn_func=None, SAGEATTN_AVAILABLE=False)
    theirs.stand_in("settings", MODEL_FOLDER="")
    theirs.stand_in("wan.modules.tokenizers", HuggingfaceTokenizer=nothing)
    theirs.stand_in("wan.modules.vae", _video_vae=nothing, WanVAE=nothing)
    theirs.stand_in("wan.modules.t5", umt5_xxl=nothing)
    with uncompiled():
        attention = theirs.module("wan.modules.attention")
        attention.attention = attention.flash_attention = sdpa
        attention.FLASH_ATTN_2_AVAILABLE = True  # else Krea's cross-attention rounds to bfloat16
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


def _load_in_wan(checkout: Path, models: str, pipeline: str, replaced: Mapping[str, str]) -> None:
    """A project whose modules lie below `models`.wan, as CausVid's do: its causal model, wrapper and pipeline."""
    theirs, wan, nothing = Replaced(checkout), f"{models}.wan", object
    for name in (*itertools.accumulate(wan.split("."), "{}.{}".format), f"{wan}.wan_base", f"{wan}.wan_base.modules"):
        theirs.package(name)
    for name in ("get_diffusion_wrapper", "get_text_encoder_wrapper", "get_vae_wrapper"):
        setattr(sys.modules[models], name, nothing)
    for name, member in (("tokenizers", "HuggingfaceTokenizer"), ("vae", "_video_vae"), ("t5", "umt5_xxl")):
        theirs.stand_in(f"{wan}.wan_base.modules.{name}", **{member: nothing})
    theirs.stand_in(f"{wan}.taehv_wrapper", TAEHVWanVAEWrapper=nothing)
    scheduler = f"{wan.partition('.')[0]}.scheduler"
    with uncompiled():
        attention = theirs.module(f"{wan}.wan_base.modules.attention")
        attention.attention = attention.flash_attention = sdpa
        for name in ("wan_base.modules.model", "causal_model"):
            theirs.module(f"{wan}.{name}")
        theirs.module(scheduler)
        theirs.module(f"{models}.model_interface")
        for name in ("flow_match", "wan_wrapper"):
            theirs.module(f"{wan}.{name}")
        theirs.module(f"{wan}.{pipeline}", replaced)


def load_causvid(checkout: Path) -> None:
    """CausVid's causal model, wrapper and pipeline."""
    replaced = {".cuda()": "", 'device="cuda"': 'device="cpu"'}
    _load_in_wan(checkout, "causvid.models", "causal_inference", replaced)


def load_streamdiffusionv2(checkout: Path) -> None:
    """StreamDiffusionV2's causal model, wrapper and pipeline."""
    heads, width = SIZES.num_heads, SIZES.dim // SIZES.num_heads
    replaced = {"self.num_heads = 12": f"self.num_heads = {heads}", "self.num_heads, 128]": f"self.num_heads, {width}]"}
    _load_in_wan(checkout, "models", "causal_stream_inference", replaced)


class Parameters:
    """pydantic's BaseModel as Krea's server uses it: values by name, defaults of the class."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


def load_krea(checkout: Path) -> None:
    """What `load` does, and Krea's server: its session and schedule, on the CPU and in the dtype `release_server.DTYPE`. What it
    imports for HTTP, video files and images is left out."""
    theirs = load(checkout)
    theirs.stand_in("omegaconf", OmegaConf=object)
    theirs.module("utils.misc")
    imports = {
        line: "" for line in ("import cv2\n", "import requests\n", "import torchvision.transforms.functional as TF\n")
    }
    theirs.module("v2v", imports | {".cuda()": "", ".to(dtype)": ""})
    gone = {
        "from fastapi": "# ", "from msgpack": "# ", "from pydantic import BaseModel, ValidationError": "from benchmarks.checkouts import Parameters as BaseModel",
        "torch.set_grad_enabled(False)": "", "torch.cuda.Stream(device=gpu)": "None", ".half()": "", "torch.bfloat16": "DTYPE",
        "torch.cuda.Event()": "None", "event.record()": "", "height=480, width=832": f"height={8 * HEIGHT}, width={8 * WIDTH}",
    }  # fmt: skip
    theirs.module("release_server", imports | gone, until="# SECTION - SERVER")


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


class FastVideo:
    """A student whose self-attention, cache and positions are FastVideo's; the rest of the model is ours."""

    def __init__(self, model: CausalWan, config: RolloutConfig, batch: int) -> None:
        module: Any = sys.modules["fastvideo.models.dits.causal_wanvideo"]
        self.model, self.window, heads = model, config.window, SIZES.num_heads
        self.relative = config.rope == "relative"
        self.layers = [
            module.CausalWanSelfAttention(
                SIZES.dim, heads, config.window or -1, config.sink,
                rope_cache_policy="relativistic" if self.relative else "absolute",
            )
            for _ in range(SIZES.num_layers)
        ]  # fmt: skip
        shape = (
            batch,
            (config.window or module.GLOBAL_ATTN_COMPAT_MAX_LATENT_FRAMES) * TOKENS,
            heads,
            SIZES.dim // heads,
        )
        self.caches = [
            {name: torch.zeros(shape, dtype=model.dtype) for name in ("k", "v")}
            | {name: torch.zeros(1, dtype=torch.long) for name in ("global_end_index", "local_end_index")}
            for _ in self.layers
        ]
        self.tables = module.get_rotary_pos_embed
        for layer in self.layers:
            layer.attn = sdpa

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def new_cache(self, *_: Any, **__: Any) -> None:
        """They are made with the student."""

    def __call__(self, x: Tensor, t: Any, text: Any, *, cache: Any, start_frame: int = 0) -> Tensor:
        d = SIZES.dim // SIZES.num_heads
        first, frames = (0, self.window) if self.relative else (start_frame, x.shape[2])
        sizes = [d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)]
        table = self.tables(
            (frames, HEIGHT // 2, WIDTH // 2), SIZES.dim, SIZES.num_heads, sizes, dtype=torch.float64, rope_theta=10000,
            start_frame=first,
        )  # fmt: skip

        def pattern(layer: int, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (rms_norm(a, norm.weight) for a, norm in ((q, attn.norm_q), (k, attn.norm_k)))
            return self.layers[layer](
                *(a.unflatten(-1, (attn.heads, -1)) for a in (q, k, v)), table, None, kv_cache=self.caches[layer],
                current_start=start_frame * TOKENS, frame_seqlen=TOKENS,
            )  # fmt: skip

        return self.model._unpatchify(self.model._transform(self.model._patchify(x), t, text, pattern), x)

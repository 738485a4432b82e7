"""Bad values for everything public: each must raise one clear error, from this library, that names what is wrong.

The cases are made from the signatures and dataclasses themselves, so a new field or argument is tried without a new test.
"""

import math
import os
import re
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

import afd_fast
from afd_fast.cli.main import main
from afd_fast.config import TrainConfig, keys, with_overrides
from afd_fast.discriminators import load_video_reward
from afd_fast.errors import AFDError, field_types
from afd_fast.evaluation import folder as evaluation_folder
from afd_fast.evaluation import vbench
from afd_fast.generate import GenerateOptions
from afd_fast.reference import nft as reference
from afd_fast.reports.run import write_report
from afd_fast.students import CausalWan, CausalWanConfig, load_student, save_student
from afd_fast.students.toy import shipped
from afd_fast.students.toy.model import ToyConfig
from afd_fast.teachers.dataset import open_teacher
from afd_fast.teachers.folder import FolderTeacher
from afd_fast.training import runs, train
from afd_fast.video_io import VideoFormat, read_video

ROOT = Path(__file__).parent.parent
HERE = [str(ROOT / "afd_fast"), str(ROOT / "kernels")]


class Case(NamedTuple):
    """A call that must fail with an error that holds `name`."""

    name: str
    call: Callable[[], Any]
    value: Any

    def __str__(self) -> str:
        shown = (
            f"{type(self.value).__name__}{tuple(self.value.shape)}"
            if hasattr(self.value, "shape")
            else repr(self.value)
        )
        return f"{self.name}={shown[:40]}"


def fault_of(case: Case) -> str:
    """What is wrong with how the call fails; empty where nothing is."""
    try:
        case.call()
    except (ValueError, TypeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        text = str(error)
        if not where.startswith(tuple(HERE)):
            return f"raised by {where}: {text}"
        if case.name.rpartition(".")[2] not in text or "\n" in text:
            return f"not one line that names it: {text}"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def options(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


NEVER = [{}, b"x", object, 1j]  # no setting has such a value


def bad_values(kind: Any) -> Iterator[Any]:
    """Values that no field of this type may have."""
    kinds = options(kind)
    yield from NEVER
    if types.NoneType not in kinds:
        yield None
    if int in kinds or float in kinds:
        yield from (math.nan, math.inf, -math.inf, -1, np.float32("nan"))
    if int in kinds:
        yield from (0.5, 1e300)
    if bool not in kinds and (int in kinds or float in kinds):
        yield True
    if str not in kinds:
        yield from ("nonesuch", "", "3")
    if bool in kinds:
        yield from (1, 0, "true")
    if any(typing.get_origin(k) is tuple for k in kinds):
        yield from ((), (math.nan,), ("a",), (1, math.inf), [None], (-1, -2))
    if str in kinds or any(typing.get_origin(k) is typing.Literal for k in kinds):
        yield from (3, 1.5, ("a",))


SETTINGS = [
    TrainConfig(), *(getattr(TrainConfig(), f.name) for f in fields(TrainConfig) if is_dataclass(getattr(TrainConfig(), f.name))),
    afd_fast.nft_recipe("afd"), GenerateOptions(), CausalWanConfig.tiny(), ToyConfig(),
]  # fmt: skip
ALLOWED = {("name", "")}  # (field, value) that look bad and are not


def settings() -> Iterator[Case]:
    for part in SETTINGS:
        for name, kind in field_types(type(part)).items():
            for value in bad_values(kind):
                yield Case(name, partial(replace, part, **{name: value}), value)


TEXTS = ["nan", "inf", "-inf", "-1", "", "abc", "1e999", "1,2,x", "none", "true", "0x10"]


def overrides() -> Iterator[Case]:
    """`key=text` for every key and text that its type does not allow."""
    for config in (runs.get("demo"), runs.get("afd_table3")):
        for key in keys(config):
            kinds = options(key.kind)
            if str in kinds:
                continue
            for text in TEXTS:
                literals = [choice for k in kinds for choice in typing.get_args(k)]
                if (
                    (text == "none" and types.NoneType in kinds)
                    or (text == "true" and bool in kinds)
                    or text in literals
                ):
                    continue
                yield Case(key.name, partial(with_overrides, config, [f"{key.name}={text}"]), text)


def arguments() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x = lambda: torch.randn(3, 2, 4, generator=g)
    return {"v": x(), "x0": x(), "r": torch.rand(3, generator=g), "t": torch.rand(3, generator=g), "noise": x()}


def tensors() -> Iterator[Case]:
    """Every tensor argument of the loss and of forward_noise as another type, shape, dtype and device."""
    like = torch.zeros(3, 2, 4)
    wrong = {
        "sample": [1.0, "x", [1.0], like.numpy(), like.int(), like[:2], like[..., :3], like[None], like.to("meta"), like + 0j],
        "row": ["x", [1.0], like[:, 0, 0].numpy(), torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, device="meta"),
                torch.zeros(3).int(), torch.full((3,), math.nan), torch.full((3,), 1.5), torch.full((3,), -0.1), torch.zeros(3) + 0j],
        "level": ["x", {}, torch.zeros(2), torch.zeros(3, 2), torch.full((3,), math.nan), torch.full((3,), 1.1), -0.1, 2.0,
                  math.nan, torch.zeros(3, 2, 5), torch.zeros(3) + 0j],
        "mask": ["x", 3, [True] * 3, torch.ones(2) > 0, torch.ones(3, 1) > 0, (torch.ones(3) > 0).to("meta")],
        "elements": ["x", 3, torch.ones(2, 2, 4) > 0, torch.ones(3, 2, 5) > 0, torch.ones(3) > 0, (like > 0).to("meta")],
        "seed": ["x", 1.5, True, like, None],
        "offsets": ["x", [0, 3], torch.tensor([0.0, 3.0]), torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0, 4]),
                    torch.tensor([3]), torch.tensor([[0, 3]]), torch.tensor([0, 2, 1, 3]), torch.tensor([0, -1, 3])],
        "recipe": ["x", "", None, 3, {}],
        "axis": ["x", 1.5, True, 0, 7, -9],
        "out": ["x", like[:2], like.double(), like.to("meta"), like.int(), like.clone().requires_grad_()],
    }  # fmt: skip
    loss = {"v": "sample", "x0": "sample", "r": "row", "t": "level", "noise": "sample", "x_t": "sample", "v_old": "sample",
            "v_ref": "sample", "sigma": "level", "sample_mask": "mask", "ref_mask": "mask", "element_mask": "elements",
            "seed": "seed", "cu_seqlens": "offsets", "recipe": "recipe", "frame_dim": "axis", "out": "out"}  # fmt: skip
    large = [x for x in wrong["level"] if isinstance(x, (float, torch.Tensor)) and torch.as_tensor(x).real.max() > 1]
    for name, kind in loss.items():
        for value in wrong[kind]:
            given = arguments()
            if name in ("seed", "x_t"):
                del given["noise"]
            if name == "frame_dim":
                given["t"] = torch.rand(3, 2)
            if name == "cu_seqlens":
                given["r"], given["t"] = torch.rand(1), 0.5
            if name == "sigma" and any(value is x for x in large):  # its range is the scheduler's
                continue
            space = "astrolabe" if name in ("sigma", "x_t") else "afd"
            call = partial(afd_fast.nft_loss, **{"recipe": space} | given | {name: value})
            yield Case({"seed": "seed" if value is not None else "noise"}.get(name, name), call, value)
    for name, kind in {"x0": "sample", "t": "level", "noise": "sample", "seed": "seed"}.items():
        for value in wrong[kind]:
            given = {k: x for k, x in arguments().items() if k in ("x0", "t", "noise")}
            if name == "seed":
                del given["noise"]
            yield Case(name, partial(afd_fast.forward_noise, **given | {name: value}), value)


def scores() -> Iterator[Case]:
    bad = ["x", [1.0], torch.zeros(2, 2), torch.zeros(3).int(), np.zeros(3), torch.zeros(0)]
    for value in bad:
        yield Case("score", partial(afd_fast.bt_loss, value, torch.zeros(3)), value)
        yield Case("score", partial(afd_fast.bt_loss, torch.zeros(3), value), value)
    for value in (-0.1, 0.5, math.nan, "x"):
        yield Case("smoothing", partial(afd_fast.bt_loss, torch.zeros(3), torch.zeros(3), smoothing=value), value)
    for value in ("x", None, [0.1], torch.tensor([math.nan, 0.0]), np.array([math.nan])):
        yield Case("advantage", partial(afd_fast.reward_to_r, value), value)
    for value in (0, -1.0, math.nan, math.inf, "x", (1, 2), (1, 2, 3)):
        yield Case("clip", partial(afd_fast.reward_to_r, torch.zeros(3), clip=value), value)


def test_an_array_or_a_list_is_told_the_way_to_a_tensor():
    """Every tensor argument of the losses, and NumPy's scalars stay numbers."""
    given, row = arguments(), torch.rand(3)
    tensors = {**given, "x_t": given["v"], "v_old": given["v"], "v_ref": given["v"], "sigma": row, "element_mask": given["v"].abs(),
               "sample_mask": row, "ref_mask": row, "policy_weight": row, "prior_weight": row, "out": given["v"]}  # fmt: skip
    for name, x in tensors.items():
        for wrong, way in (
            (x.numpy(), f"a NumPy array: give torch.from_numpy({name})"),
            (x.tolist(), f"a list: give torch.tensor({name})"),
        ):
            with pytest.raises(TypeError, match=rf"^{name} must be .* got {re.escape(way)}$"):
                afd_fast.nft_loss(**given | {name: wrong}, recipe="astrolabe" if name == "sigma" else "afd")
    for name in ("score_teacher", "score_student"):
        with pytest.raises(TypeError, match=f"{name} .* torch.from_numpy"):
            afd_fast.bt_loss(**{"score_teacher": row, "score_student": row} | {name: row.numpy()})
    assert afd_fast.nft_loss(**given | {"t": np.float32(0.5)}).isfinite()
    with pytest.raises(TypeError, match="prompts must be a list"):
        afd_fast.PerPromptStatTracker().update("a cat", row)


@pytest.mark.parametrize("loss", [afd_fast.nft_loss, afd_fast.nft_terms, afd_fast.NFTLoss(), reference.nft_loss])
def test_an_argument_that_the_loss_has_not_is_refused(loss):
    """nft_terms took any keyword and computed the loss without it."""
    with pytest.raises(
        TypeError, match=r'no form=: it is a field of the recipe, .*nft_recipe\("afd", form=...\), "mse" or "dpo"'
    ):
        loss(**arguments(), form="dpo")
    with pytest.raises(TypeError, match="no samplemask=, did you mean sample_mask=?"):
        loss(**arguments(), samplemask=None)


@pytest.mark.parametrize("cases", [settings, overrides, tensors, scores])
def test_every_bad_value_is_refused(cases):
    tried = list(cases())
    faults = [f"{case}: {fault}" for case in tried if (fault := fault_of(case))]
    assert not faults, f"{len(faults)} of {len(tried)}\n" + "\n".join(faults)


# -- the command -----------------------------------------------------------------------------------------------

BAD = {
    "demo": ["--teacher ''", "--teacher folder:nowhere", "--teacher folder:", "--teacher api:nowhere.json", "--teacher http://x",
             "--teacher physics:moon", "--out p.txt", "--out p.txt/run", "--out /proc/x", "--resume", "--resume --overwrite",
             "--resume --out d", "--out d", "--out d --overwrite", "iterations", "nonesuch=1", "=1", "iterations=", "--nonesuch",
             "seed=1 seed=x", "[/x]", "[bold]=1", "name=a/b --resume", "name=..", "student=nowhere/x.pt",
             "discriminator=nowhere/x", "discriminator=nofolder", "--from-scratch student=lights", "--from-scratch student.base=nowhere"],
    "train": ["", "nonesuch", "demo --out p.txt", "demo teacher=folder:d", "'[/x]'", "demo --dry-run iterations=0",
              "demo --dry-run teacher=folder:nowhere", "afd_table3 --dry-run student=nowhere/x.safetensors",
              "afd_table3 --dry-run student=./nope.pt teacher=folder:nowhere", "demo --resume"],
    "compare": ["", "nonesuch", "demo --methods ppo", "demo --methods ''", "demo --seeds 0", "demo --seeds x", "demo --jobs 0",
                "demo --jobs -1", "demo --out p.txt", "demo --out d"],
    "ablate": ["", "nonesuch demo", "v_old nonesuch", "v_old demo --seeds 0", "v_old demo --jobs 0", "k demo --out d"],
    "estimate": ["", "nonesuch", "demo --gpu v100", "demo --gpu ''", "demo iterations=x", "demo student.frames=0"],
    "distill": ["", "--videos nowhere", "--videos d", "--videos p.txt", "--videos d --size 1", "--videos d --frames x", "--videos d --steps 0",
                "--videos d --fps inf", "--videos d student=toy", "--videos d --out p.txt"],
    "doctor": ["nonesuch", "demo nonesuch=1", "demo iterations=0", "demo iterations"],
    "keys": ["nonesuch", "''", "a b"],
    "pretrain": ["--seed x", "--frames 0", "--frames 3", "--frames 13", "--frames -3", "--out p.txt/x", "--out d", "--world moon",
                 "--world lights --frames 20", "--distill nowhere.safetensors", "--distill garbage.safetensors", "--distill d",
                 "--distill garbage.safetensors --world lights", "--distill garbage.safetensors --frames 18"],
    "report": ["", "nowhere", "d", "p.txt"],
    "rollout --config tiny --prompts p.txt --out o":
             ["--frames 20", "--frames 0", "--frames -3", "--frames x", "--shift 0", "--shift nan", "--shift -1", "--shift inf",
              "--rope rel --window 6", "--rope relative", "--sink-ema 0.9", "--sink-ema x", "--sink-ema 2 --rope relative --window 6 --sink 3",
              "--chunk 0", "--chunk -1", "--batch 0", "--batch -1", "--prompts nowhere.txt", "--prompts d", "--prompts empty.txt",
              "--prompts latin.txt", "--out d", "--out p.txt", "--config nonesuch", "--student nowhere/x.pt", "--student ./no.pt",
              "--student d", "--student garbage.pt", "--student garbage.safetensors", "--graphs", "--seed x",
              "--seed 99999999999999999999999"],
    "eval export o": ["", "--prompts p.txt --vbench v.json", "--vbench nowhere.json", "--vbench p.txt", "--vbench list.json",
                      "--prompts nowhere.txt", "--prompts empty.txt", "--prompts p.txt --n 0", "--prompts p.txt --n x",
                      "--prompts p.txt --student tiny --frames 20", "--prompts p.txt --student nowhere/x.pt",
                      "--prompts p.txt --steps 1000", "--prompts p.txt --student tiny --batch 0", "--prompts p.txt --student tiny --shift nan"],
    "eval export d": ["--prompts p.txt"],
    "eval run": ["", "vbench nowhere", "nonesuch d", "vbench d", "flickering d", "flickering nowhere", "videoalign d --env nowhere",
                 "videophy2 d --env nowhere --repo nowhere --checkpoint nowhere"],
    "eval collect": ["", "nowhere", "d", "p.txt"],
    "eval compare": ["", "nowhere d", "d nowhere", "d d", "d"],
    "nonesuch": [""],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run: a prompt file, files that are not what they are called, a folder of somebody's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, data in {"p.txt": b"a ball\n", "empty.txt": b"\n \n", "latin.txt": b"caf\xe9\n", "garbage.pt": b"no weights",
                       "garbage.safetensors": b"\xff" * 64, "list.json": b"[1]", "d/config.json": b"{}", "d/model.bin": b"x"}.items():  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    return tmp_path


def hang(number, frame):
    raise RuntimeError("no error after 20 s")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("command", BAD)
def test_every_bad_command_is_one_line_and_leaves_nothing(command, folder, capsys, monkeypatch):
    before, faults = files(folder), []
    signal.signal(signal.SIGALRM, hang)
    for bad in BAD[command]:
        words = shlex.split(f"{command} {bad}")
        monkeypatch.setattr(sys, "argv", ["afd-fast", *words])
        signal.alarm(20)
        try:
            main()
            fault = "accepted"
        except SystemExit as stop:
            said = capsys.readouterr().err.strip()
            usage = "Usage:" in said and "Error" in said
            one = said.startswith("error: ") and "\n" not in said
            fault = "" if stop.code in (1, 2) and (usage or one) else f"exit {stop.code}: {said}"
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        capsys.readouterr()
        if left := files(folder).keys() ^ before.keys():
            fault += f" left {sorted(left)}"
            for name in sorted(left, reverse=True):
                (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
        if fault:
            faults.append(f"{shlex.join(words)}: {fault}")
    assert not faults, "\n".join(faults)
    assert files(folder) == before


# -- files -----------------------------------------------------------------------------------------------------

CONTENTS = {
    "empty": b"", "bytes": bytes(range(256)) * 8, "latin": b"caf\xe9\n", "list": b"[1]", "object": b"{}", "null": b"null",
    "deep": b"[" * 100_000, "torn": b'{"prompt": "a b', "text": b"prompt,video\n", "zip": b"PK\x03\x04" + b"x" * 64,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00.", "mp4": b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 64, "nul": b"a\0b\n",
}  # fmt: skip


def readers() -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """What reads a file, and the name of the file in a folder of its own."""
    fit = {"frames": 9, "size": (16, 16), "fps": 8}
    video = VideoFormat(9, 16, 16, 8)
    return {
        "read_video": ("a.mp4", read_video),
        "manifest.csv": ("manifest.csv", lambda path: FolderTeacher(path.parent, **fit)),
        "manifest.jsonl": ("manifest.jsonl", lambda path: FolderTeacher(path.parent, **fit)),
        "api": ("api.json", lambda path: open_teacher(f"api:{path}", video, path.parent / "cache")),
        "student.pt": ("a.pt", lambda path: load_student(path)),
        "student.safetensors": ("a.safetensors", lambda path: load_student(path)),
        "student folder": ("config.json", lambda path: load_student(path.parent)),
        "lora": ("a.safetensors", lambda path: load_student(tiny_student(path.parent.parent), lora=path)),
        "reward": ("model_config.json", lambda path: load_video_reward(path.parent)),
        "toy": ("toy.safetensors", lambda path: shipped.load(path)),
        "suite": ("full.json", lambda path: vbench.suite(path)),
        "export": ("export.json", lambda path: evaluation_folder.read_settings(path.parent)),
        "evaluation manifest": ("manifest.csv", lambda path: evaluation_folder.read_manifest(path.parent)),
        "report": ("result.json", lambda path: write_report(path.parent)),
        "resume": ("config.json", lambda path: train(TrainConfig(), out=path.parent, resume=True, console=Console(quiet=True))),
    }  # fmt: skip


def tiny_student(folder: Path) -> Path:
    if not (folder / "tiny").exists():
        save_student(CausalWan(CausalWanConfig.tiny()), folder / "tiny")
    return folder / "tiny"


@pytest.mark.parametrize("reader", readers())
def test_every_bad_file_is_refused_by_name(reader, tmp_path):
    """Also a folder, a pipe that nobody writes, and no file."""
    name, read = readers()[reader]
    faults = []
    signal.signal(signal.SIGALRM, hang)
    for kind in (*CONTENTS, "folder", "pipe", "missing"):
        path = tmp_path / kind / name
        path.parent.mkdir()
        if kind in CONTENTS:
            path.write_bytes(CONTENTS[kind])
        elif kind != "missing":
            path.mkdir() if kind == "folder" else os.mkfifo(path)
        signal.alarm(20)
        try:
            read(path)
            fault = "accepted"
        except AFDError as error:
            fault = "" if kind in str(error) and "\n" not in str(error) else f"not one line that names it: {error}"
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
        if fault:
            faults.append(f"{kind}: {fault}"[:300])
    assert not faults, "\n".join(faults)

"""What README and the documentation show: its code runs, its picture comes from a command."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import afd_fast
from afd_fast.errors import ConfigError
from afd_fast.reference.recipes import RECIPES
from afd_fast.reports.picture import GAP, LABEL, write_picture
from tests.test_examples import FEW

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.strip().splitlines()[-1][:30] for block in BLOCKS])
def test_a_block_of_the_readme_runs_in_an_empty_folder(tmp_path, block):
    block = block.replace('["iterations=300"]', repr(FEW))  # which takes minutes
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def table(page, heading):
    """The rows of the first table under a heading of a page, as lists of cells."""
    part = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|\n").split("|") for line in part.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_arguments_of_the_loss_are_those_of_its_page():
    rows = table("nft.md", "The arguments")
    listed = {name: row[2] for row in rows for name in re.findall("`([a-z_0-9]+)`", row[0])}
    real = {n: p for n, p in inspect.signature(afd_fast.nft_loss).parameters.items() if p.kind != p.VAR_KEYWORD}
    assert list(listed) == list(real)
    for name, parameter in real.items():
        said = listed[name]
        if parameter.default is parameter.empty:
            assert said == "required", name
        else:
            assert said == "one is needed" or said.startswith(f"`{parameter.default!r}`".replace("'", '"')), name


def test_the_recipes_are_those_of_their_table():
    rows = table("nft.md", "The recipes")
    assert [row[0].strip("`") for row in rows] == list(RECIPES)
    for row, r in zip(rows, RECIPES.values()):
        more = "" if r.name != "gardo" else f'`ref_coef` {r.ref_coef:g}, `ref_empty="{r.ref_empty}"`'
        written = [f"{r.beta:g}", r.space, r.weighting, f"{r.factor:g}", f"{r.sample_reduction}, {r.batch_reduction}",
                   f"{r.ref_space}, {r.ref_weight}", more]  # fmt: skip
        assert row[1:] == written and r.adv_clip == 5 and (more or (r.ref_coef, r.ref_empty) == (1e-4, "zero"))


@pytest.fixture
def run(tmp_path):
    """A finished run with two prompts of which base, student and teacher are red, green and blue, brighter each frame."""
    clips = {}
    for channel, name in enumerate(("base", "student", "teacher")):
        clips[name] = torch.zeros(1, 2, 3, 4, 16, 24, dtype=torch.uint8)
        clips[name][:, :, channel] = torch.tensor([60, 120, 180, 240], dtype=torch.uint8)[:, None, None]
    prompts = ["a ball", "another ball " * 20]
    save_file(clips, tmp_path / "samples.safetensors", {"prompts": json.dumps(prompts), "fps": "10"})
    (tmp_path / "result.json").write_text(json.dumps({"config": {"method": "sft"}, "rows": {}}))
    return tmp_path


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_the_picture_shows_every_frame_of_every_clip(run, tmp_path, suffix):
    image = Image.open(write_picture(run, tmp_path / "new" / f"x{suffix}"))
    wide, high = 96, 64  # 24x16 px four times
    assert image.n_frames == 4 and image.width == LABEL + 2 * (wide + GAP)
    for frame in range(4):
        image.seek(frame)
        for row in range(3):
            for column in range(2):
                at = (LABEL + column * (wide + GAP) + wide // 2, row * (high + GAP) + high // 2)
                pixel = torch.tensor(image.convert("RGB").getpixel(at))
                assert pixel.argmax() == row and abs(pixel[row] - 60 * (frame + 1)) < 24


def test_a_picture_of_another_kind_is_refused(run):
    with pytest.raises(ConfigError, match=r"x.png is no animated picture: expected a name that ends in .webp or .gif"):
        write_picture(run, Path("x.png"))

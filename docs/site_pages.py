"""A hook of mkdocs: pages made of the code, and of files outside docs/ that the pages link to."""

import re
from pathlib import Path

from mkdocs.structure.files import File

from afd_fast.config import TrainConfig, keys

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    r"examples/(\w+)\.py": r"examples/\1.md",
    r"CHANGELOG\.md": "CHANGELOG.md",
    r"README\.md(#[\w-]*)?": "index.md",
}
SETTINGS = """# Settings of a run

`afd-fast train RUN key=value ...`, or fields of `TrainConfig`; the defaults are those of `TrainConfig()`. `afd-fast train RUN --help-keys`
has the values of a named run.

| key | default | meaning |
|---|---|---|
"""


def on_files(files, config):
    def add(name, content):
        files.append(File.generated(config, name, content=content))

    for path in sorted((ROOT / "examples").glob("*.py")):
        add(f"examples/{path.stem}.md", f"# examples/{path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    add("CHANGELOG.md", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    rows = [(f"`{key.name}`", f"`{key.value}`", key.meaning) for key in keys(TrainConfig())]
    add(
        "settings.md",
        SETTINGS + "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows),
    )
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as on a git host, out of docs/, become links inside the site."""
    up = "../" * page.file.src_uri.count("/")
    for outside, inside in OUTSIDE.items():
        markdown = re.sub(rf"\]\({re.escape(up)}\.\./{outside}", rf"]({up}{inside}", markdown)
    return markdown

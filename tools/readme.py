"""Render README.md from nbs/index.ipynb, so that the front page and the first chapter never disagree.

    python tools/readme.py            write README.md
    python tools/readme.py --check    fail when README.md is out of date
"""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

ROOT = Path(__file__).resolve().parent.parent


class ForReaders(Preprocessor):
    "Drop hidden cells and directive lines; keep what a reader of the front page wants to see."

    def preprocess(self, notebook, resources):
        kept = []
        for cell in notebook.cells:
            directives = re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.M)
            if "hide" in directives:
                continue
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            kept.append(cell)
        notebook.cells = kept
        notebook.metadata["language_info"] = {"name": "python"}  # cleaned notebooks do not say it, and code would stay uncoloured
        return notebook, resources


def render() -> str:
    "The text of README.md."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    exporter = MarkdownExporter()
    exporter.register_preprocessor(ForReaders, enabled=True)
    text, resources = exporter.from_notebook_node(notebook)
    if resources.get("outputs"):
        raise SystemExit("nbs/index.ipynb shows pictures: the README can hold text output only")
    # links that are relative to nbs/ must work from the root
    text = re.sub(r"\]\((?!https?:|#|mailto:)\.\./", "](", text)
    text = re.sub(r"\]\(([\w.]+\.ipynb)", r"](nbs/\1", text)
    note = "<!-- Rendered from nbs/index.ipynb by tools/readme.py: edit the notebook, then `make readme`. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    target = ROOT / "README.md"
    text = render()
    if "--check" in sys.argv:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            print("README.md is out of date: run `make readme` and commit")
            return 1
        print("README.md is in step with nbs/index.ipynb")
        return 0
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

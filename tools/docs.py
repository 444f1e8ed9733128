"""Build the site in _docs/: nbdev adds the API tables to the notebooks, Sphinx with myst-nb makes the pages. Warnings are errors."""
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/mits-nb/mits_nb/blob/main/"
PARTS = [("Foundations", range(0, 7)), ("The attacker", range(7, 10)), ("The protector", range(10, 14)),
         ("The detector", range(14, 19)), ("Evidence and tools", range(19, 99))]


def allow_lazy_annotations() -> None:
    "Let nbdev document functions whose annotations name a library that the module imports only where it is used."
    from fastcore import docments

    strict = docments.signature

    def signature(function, **options):
        try:
            return strict(function, **options)
        except NameError:
            return strict(function)

    docments.signature = signature


def definitions(notebook) -> dict[str, str]:
    "Name of each exported function and class -> the source of its cell, without directives."
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*export", cell.source, flags=re.M):
            source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            for name in re.findall(r"^(?:def|class)\s+(\w+)", source, flags=re.M):
                found[name] = source
    return found


def without_lessons(original: Path):
    "A chapter in which nbdev runs only what it needs for the API tables, the exported cells: lessons keep the outputs that they have."
    notebook = nbformat.read(original, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and not re.search(r"^#\|\s*(export|default_exp|hide)", cell.source, flags=re.M):
            cell.source = "#| eval: false\n" + cell.source
    return notebook


def page(processed: Path, original: Path):
    "A chapter as a page: the title back in place, the source of every definition, and its API table folded below it."
    notebook, sources = nbformat.read(processed, as_version=4), definitions(nbformat.read(original, as_version=4))
    cells, shown = [], set()
    for cell in notebook.cells:
        if cell.cell_type == "raw":
            # nbdev moves title and subtitle into front matter for another site builder
            front = yaml.safe_load(cell.source.strip().strip("-")) or {}
            text = f"# {front['title']}\n\n> {front.get('description', '')}" if "title" in front else ""
            cell = nbformat.v4.new_markdown_cell(text)
        elif documented := re.search(r"^show_doc\((\w+)\)", cell.source, flags=re.M):
            name = documented[1]
            if name not in sources:
                continue
            if sources[name] not in shown:
                shown.add(sources[name])
                cells.append(nbformat.v4.new_code_cell(sources[name]))
            table = "".join(cell.outputs[0]["data"].get("text/markdown", "")) if cell.outputs else ""
            rows = [line for line in table.splitlines() if line.startswith("|")]
            if not rows:
                continue
            fold = ["```{admonition} Arguments of `" + name + "`", ":class: dropdown", "", *rows, "```"]
            cell = nbformat.v4.new_markdown_cell("\n".join(fold))
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(\.\./", f"]({REPOSITORY}", cell.source)
        if cell.source.strip():
            cells.append(cell)
    notebook.cells = cells
    return notebook


def process(target: Path) -> list[str]:
    "Write every chapter, processed, to `target`; returns their names in reading order."
    from nbdev.serve import proc_nbs

    allow_lazy_annotations()
    warnings.filterwarnings("ignore", message="Found cells containing imports and other code")
    names = []
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(folder)
        for original in (ROOT / "nbs").glob("*.ipynb"):
            nbformat.write(without_lessons(original), copies / original.name)
        processed = proc_nbs(path=str(copies), n_workers=0, force=True)
    for source in sorted(processed.glob("*.ipynb")):
        nbformat.write(page(source, ROOT / "nbs" / source.name), target / source.name)
        names.append(source.stem)
    return names


def contents(names: list[str]) -> str:
    "The root page: a table of contents in parts."
    lines = ["# mits_nb", "", "```{toctree}", ":maxdepth: 1", "", "index", "```", ""]
    for title, numbers in PARTS:
        chapters = [name for name in names if name[:2].isdigit() and int(name[:2]) in numbers]
        if chapters:
            lines += ["```{toctree}", f":caption: {title}", ":maxdepth: 1", "", *chapters, "```", ""]
    return "\n".join(lines)


def main() -> int:
    work, pages, site = ROOT / "_proc", ROOT / "_proc" / "site", ROOT / "_docs" / "html"
    for folder in (work, site):
        shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        names = process(Path(folder))
        shutil.copytree(folder, pages)
    shutil.copy(ROOT / "docs" / "conf.py", pages)
    (pages / "contents.md").write_text(contents(names), encoding="utf-8")
    result = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", pages, site])
    if result.returncode == 0:
        print(f"docs: {len(names)} chapters in {site.relative_to(ROOT)}/")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())

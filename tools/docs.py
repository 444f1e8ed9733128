"""Build the site in _docs/: chapters as they are committed, a page for each module from docments, results, house rules. Warnings and broken links are errors."""
import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
REPOSITORY = "https://github.com/mits-nb/mits_nb"
PARTS = [("Foundations", range(0, 7)), ("The attacker", range(7, 10)), ("The protector", range(10, 14)),
         ("The detector", range(14, 20)), ("Evidence and tools", range(20, 99))]
# other files of the repository that are pages of the site, and their names in its side bar
PAGES = {"docs/results.md": ("results.md", "Results"), "benchmarks/README.md": ("benchmarks.md", "Benchmarks"),
         "ETHICS.md": ("ethics.md", "Ethics"), "CONTRIBUTING.md": ("contributing.md", "Contributing")}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


# ---- names of the library

@cache
def modules() -> dict[str, str]:
    "Dotted module, without the package -> chapter that exports it, in reading order."
    found = {}
    for chapter in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if (ROOT / "mits_nb" / (chapter.stem[3:].replace(".", "/") + ".py")).is_file():
            found[chapter.stem[3:]] = chapter.stem
    return found


def public(module: str) -> list[str]:
    "What a module offers, in the order of its chapter."
    return list(importlib.import_module(f"mits_nb.{module}").__all__)


@cache
def homes() -> dict[str, str]:
    "Public function or class -> its module, for names that only one module has."
    found: dict[str, list[str]] = {}
    for module in modules():
        for name in public(module):
            found.setdefault(name, []).append(module)
    return {name: homes[0] for name, homes in found.items() if len(homes) == 1 and is_entry(homes[0], name)}


def is_entry(module: str, name: str) -> bool:
    "True for functions and classes: constants have no entry of their own."
    thing = getattr(importlib.import_module(f"mits_nb.{module}"), name)
    return inspect.isroutine(thing) or isinstance(thing, type)


def label(kind: str, module: str, name: str) -> str:
    "Target of an entry: labels know no upper case, so names with capitals are marked."
    return f"{kind}-{module}-{name}{'-class' if name != name.lower() else ''}".lower().replace(".", "-").replace("_", "-")


# ---- Markdown

def relink(text: str, folder: str) -> str:
    "Links between files become links between pages, or to the repository. Raises `SystemExit` for a link to nothing."
    def replace(match):
        target, anchor = unquote(match[1]), match[2] or ""
        file = (ROOT / folder / target).resolve()
        if not file.exists():
            raise SystemExit(f"docs: a page in {folder or 'the root'}/ links to {target}, which does not exist")
        path = file.relative_to(ROOT).as_posix()
        if path in PAGES:
            return f"]({PAGES[path][0]}{anchor})"
        if file.parent == ROOT / "nbs" and file.suffix == ".ipynb":
            return f"]({file.name}{anchor})"
        return f"]({REPOSITORY}/{'tree' if file.is_dir() else 'blob'}/main/{path}{anchor})"

    return LINK.sub(replace, text)


def link_names(text: str, here: str) -> str:
    "`Name` in the prose leads to its entry, the first time in a cell, unless this very chapter makes it."
    seen = set()

    def replace(match):
        name = match[2]
        home = homes().get(name)
        if home is None or home == here or name in seen or len(name) < 4:
            return match[0]
        seen.add(name)
        return f"[{match[1]}](#{label('api', home, name)})"

    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        lines.append(line if fenced or line.startswith(("#", "    ")) else re.sub(r"(?<![\[`\w])(`(\w+)(?:\(\))?`)(?![\]`])", replace, line))
    return "\n".join(lines)


def plain(text: str) -> str:
    "A docstring as Markdown: code spans stay, nothing else is markup."
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_$<>\[\]{}|\\])", r"\\\1", p) for p in pieces)


def first_line(text: str | None) -> str:
    "The first paragraph of a docstring, on one line."
    return " ".join((text or "").strip().split("\n\n")[0].split())


# ---- chapters

def defined(source: str) -> list[str]:
    "Names that a cell makes at its top level."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]
    return names


def only_imports(source: str) -> bool:
    "True for a cell that imports, and does nothing else."
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def description(heading: str, text: str) -> str:
    "Words for a picture, for those who do not see it: its section, and the sentence that leads to it."
    words = re.sub(r"[`*$]|\[(?=[^]]*\]\()|\]\([^)]*\)", "", text.strip().split("\n\n")[-1].replace("\n", " "))
    sentence = re.split(r"(?<=[.:?!])\s", words.strip())[-1]
    return f"Figure: {heading}" + (f". {sentence}" if 0 < len(sentence) < 200 and not sentence.startswith(("#", "|", "<")) else "")


def page(path: Path):
    "A chapter as a page: hidden cells and directives gone, a target at every public name, links that lead somewhere, words for pictures."
    notebook = nbformat.read(path, as_version=4)
    module = path.stem[3:] if path.stem[3:] in modules() else ""
    names = set(public(module)) if module else set()
    cells, heading, before, marked = [], "", "", set()
    for cell in notebook.cells:
        directives = set(re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.M))
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        if directives & {"hide", "default_exp"} or not cell.source.strip():
            continue
        cell.metadata = {}
        if cell.cell_type == "markdown":
            heading, before = (re.findall(r"^#+ (.+)$", cell.source, flags=re.M) or [heading])[-1], cell.source
            cell.source = link_names(relink(cell.source, "nbs"), module)
        else:
            if directives & {"export", "exporti"}:
                if only_imports(cell.source):
                    continue
                new = [name for name in defined(cell.source) if name in names - marked]
                marked |= set(new)
                targets = [f"({label('code', module, name)})=" for name in new]
                if targets:
                    cells.append(nbformat.v4.new_markdown_cell("\n".join(targets)))
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                cell.metadata = {"mystnb": {"image": {"alt": description(heading, before)}}}
        cells.append(cell)
    notebook.cells = cells
    return notebook


def short_titles() -> dict[str, str]:
    "Chapter -> its name in the chapter map, for the side bar."
    text = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    return {name: re.sub(r"^(\d+) ", r"\1 · ", title) for title, name in re.findall(r"\| \[([^]]+)\]\((\d\d_[\w.]+)\.ipynb\)", text)}


def contents(names: list[str]) -> str:
    "The table of contents in parts, for the first page."
    titles, lines = short_titles(), []
    for title, numbers in PARTS:
        chapters = [name for name in names if name[:2].isdigit() and int(name[:2]) in numbers]
        if chapters:
            entries = [f"{titles[name]} <{name}>" if name in titles else name for name in chapters]
            lines += ["```{toctree}", f":caption: {title}", ":hidden:", ":maxdepth: 1", "", *entries, "```", ""]
    entries = ["Modules <api/index>", *(f"{title} <{name.removesuffix('.md')}>" for name, title in PAGES.values())]
    return "\n".join([*lines, "```{toctree}", ":caption: Reference", ":hidden:", ":maxdepth: 1", "", *entries, "```"])


# ---- modules

def prepare_docments() -> None:
    "Let docments describe functions whose annotations name a library that the module imports only where it is used, and look up a source once."
    from fastcore import docments

    strict, docments.getsource = docments.signature, cache(docments.getsource)

    def signature(function, **options):
        try:
            return strict(function, **options)
        except NameError:
            return strict(function)

    docments.signature = signature


def signature_of(thing, name: str) -> str:
    "Name and parameters on one line, without annotations: those are in the table."
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return name
    return f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters if p.name != 'self')})"


def constants(module: str) -> dict[str, str]:
    "Name of each constant of a module -> what its comment says."
    text = (ROOT / "mits_nb" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            comment = re.search(r"\s# (.+)$", lines[node.end_lineno - 1])
            for name in defined("\n".join(lines[node.lineno - 1:node.end_lineno])):
                found[name] = comment[1] if comment else ""
    return found


def entry(module: str, name: str, thing) -> list[str]:
    "A function or a class: signature, docstring, arguments, methods, and the way to its source."
    from nbdev.showdoc import DocmentTbl

    text = inspect.cleandoc(thing.__doc__ or "")
    lines = [f"({label('api', module, name)})=", f"## `{name}`", "", "```python", signature_of(thing, name), "```", ""]
    if isinstance(thing, type) and text.startswith(f"{name}("):
        text = ""  # what dataclasses write where the author wrote nothing
    lines += [plain(text), ""] if text else []
    rows = [line for line in (DocmentTbl(thing)._repr_markdown_() or "").splitlines() if line.startswith("|")]
    lines += [*rows, ""] if rows else []
    if isinstance(thing, type):
        methods = [(n, m) for n, m in vars(thing).items() if not n.startswith("_") and (inspect.isfunction(m) or isinstance(m, (classmethod, staticmethod, property))) and getattr(m, "__doc__", None)]
        for n, m in methods:
            inner = m.fget if isinstance(m, property) else getattr(m, "__func__", m)
            shown = n if isinstance(m, property) else signature_of(inner, n)
            lines.append(f"- `{shown}`: {plain(first_line(inner.__doc__))}")
        lines += [""] if methods else []
    return [*lines, f"Source: [chapter {int(modules()[module][:2])}](#{label('code', module, name)}).", ""]


def module_page(module: str, chapter: str) -> str:
    "Everything that a module offers."
    loaded, comments = importlib.import_module(f"mits_nb.{module}"), constants(module)
    lines = [f"# `mits_nb.{module}`", "", plain(first_line(loaded.__doc__)), "", f"Made in [{short_titles().get(chapter, chapter)}](../{chapter}.ipynb).", ""]
    values, things = [], []
    for name in public(module):
        (things if is_entry(module, name) else values).append((name, getattr(loaded, name)))
    for name, thing in things:
        lines += entry(module, name, thing)
    if values:
        lines += ["## Constants", "", "| name | |", "|---|---|"]
        lines += [f"| [`{name}`](#{label('code', module, name)}) | {plain(comments.get(name, ''))} |" for name, _ in values]
    return "\n".join(lines) + "\n"


def index_of_names() -> str:
    "Every public name with one line, module by module."
    lines = ["# Modules", "", "> Every public name of the package, with one line on each; a name leads to its arguments, and from there to its source in a chapter.", ""]
    for module, chapter in modules().items():
        loaded, comments = importlib.import_module(f"mits_nb.{module}"), constants(module)
        lines += [f"## [`mits_nb.{module}`]({module}.md)", "", "| name | |", "|---|---|"]
        for name in public(module):
            kind = "api" if is_entry(module, name) else "code"
            what = first_line(getattr(loaded, name).__doc__) if kind == "api" else comments.get(name, "")
            lines.append(f"| [`{name}`](#{label(kind, module, name)}) | {plain('' if what.startswith(f'{name}(') else what)} |")
        lines.append("")
    return "\n".join([*lines, "```{toctree}", ":hidden:", ":maxdepth: 1", "", *modules(), "```"]) + "\n"


# ---- the site

def write_pages(target: Path) -> int:
    "Everything that Sphinx reads; returns the number of chapters."
    import results

    names = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))
    for name in names:
        notebook = page(ROOT / "nbs" / f"{name}.ipynb")
        if name == "index":
            notebook.cells.append(nbformat.v4.new_markdown_cell(contents(names)))
        nbformat.write(notebook, target / f"{name}.ipynb")
    for source, (name, _) in PAGES.items():
        text = results.render() if name == "results.md" else (ROOT / source).read_text(encoding="utf-8")
        (target / name).write_text(relink(text, str(Path(source).parent)), encoding="utf-8")
    (target / "api").mkdir()
    (target / "api" / "index.md").write_text(index_of_names(), encoding="utf-8")
    for module, chapter in modules().items():
        (target / "api" / f"{module}.md").write_text(module_page(module, chapter), encoding="utf-8")
    return len(names)


def copy_assets(target: Path) -> None:
    "The style sheet, and a MathJax of our own: formulas are readable without internet."
    shutil.copytree(ROOT / "docs" / "static", target / "_static")
    mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    (target / "_static" / "mathjax").mkdir()
    shutil.copy(mathjax / "tex-chtml.js", target / "_static" / "mathjax")
    shutil.copytree(mathjax / "output" / "chtml" / "fonts", target / "_static" / "mathjax" / "output" / "chtml" / "fonts")


class Links(HTMLParser):
    "Where a page leads to, and where it can be entered."

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.targets, self.anchors = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name") if tag == "a" else None}
        self.targets |= {attributes.get(key) for key in ("href", "src")} - {None, ""}


def broken_links(site: Path) -> list[str]:
    "Every link within the site that leads to no file or to no anchor, and every link to a file of the repository that is not there."
    pages = {file.resolve(): Links(file.read_text(encoding="utf-8")) for file in site.rglob("*.html") if "_static" not in file.parts}  # templates of the theme lie there
    wrong = []
    for file, links in pages.items():
        for link in sorted(links.targets):
            where, _, anchor = link.partition("#")
            if match := re.match(rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([^?#]+)", link):
                found = (ROOT / unquote(match[1])).exists()
            elif re.match(r"\w+:|//", link):
                continue
            else:
                target = (file.parent / unquote(where.split("?")[0])).resolve() if where else file
                found = target.is_file() and (not anchor or target not in pages or unquote(anchor) in pages[target].anchors)
            if not found:
                wrong.append(f"{file.relative_to(site.resolve())}: {link}")
    return wrong


def main() -> int:
    started = time.perf_counter()
    work, site = ROOT / "_proc" / "site", ROOT / "_docs" / "html"
    for folder in (work, site):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    prepare_docments()
    chapters = write_pages(work)
    copy_assets(work)
    shutil.copy(ROOT / "docs" / "conf.py", work)
    written = time.perf_counter()
    built = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", work, site])
    if built.returncode:
        return built.returncode
    wrong = broken_links(site)
    print(*(f"broken link in {line}" for line in wrong), sep="\n")
    print(f"docs: {chapters} chapters and {len(modules())} modules in {site.relative_to(ROOT)}/, {len(wrong)} broken links; pages {written - started:.0f} s, Sphinx {time.perf_counter() - written:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

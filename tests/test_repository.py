"""The house rules that a machine can check: hygiene of notebooks, order of chapters, light imports, README in step."""
import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def settings():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def module_of(path):
    "Dotted module that a chapter exports, or None."
    for cell in load(path)["cells"]:
        if match := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), flags=re.M):
            return match[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = load(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"], "widget state must not be saved"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids)), "cell ids must be unique"
    assert path.stat().st_size <= 1_000_000, "a notebook holds at most 1 MB"
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            assert picture is None or len("".join(picture)) * 3 / 4 <= 100_000, "a figure holds at most 100 kB"
            assert output["output_type"] != "error", "a committed chapter shows no error"
            assert picture is None or not source.startswith("#| data") or not any(word in source for word in ("show_slices(", "imshow(", "still(")), f"no picture of a patient is stored: clear the output of {cell['id']}"
            assert output.get("name") != "stderr", f"a committed chapter shows no warnings: {''.join(output['text'])[:200]}"


WITHOUT_PAPER = {"00_core", "22_playground"}  # no paper reports anything about their matter


def prose_of(path):
    "All Markdown of a notebook, without the insides of code fences."
    text = "\n\n".join("".join(cell["source"]) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.S)


def part(prose, head):
    "What stands below a heading, to the next one of the same rank."
    found = re.search(rf"^## {head}.*?$(.*?)(?=^## |\Z)", prose, flags=re.M | re.S)
    return found and found[1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_form(path):
    prose, number = prose_of(path), int(path.stem[:2])
    assert re.match(rf"# {number} · \S.*\n\n> \S", prose), "first the numbered title, then the subtitle"
    assert len(re.findall(r"^# \S", prose, flags=re.M)) == 1, "exactly one title"
    where = re.search(r"^\*\*Where you are\.\*\* (.*?)^\*\*After this chapter you can\*\*\n\n(.*?)\n\n", prose + "\n\n", flags=re.M | re.S)
    assert where, "missing: **Where you are.** and **After this chapter you can**, each on a line"
    assert re.search(r"About \d+ minutes to read", where[1]) and "GPU" in where[1], "say how long it takes, and whether a GPU is needed"
    assert len(re.findall(r"^(?:-|\d+\.) ", where[2], flags=re.M)) >= 3, "at least three objectives"
    places = [prose.find(f"\n## {head}") for head in ("Pitfalls", "Questionnaire", "Exercises", "Further reading")]
    assert -1 not in places and places == sorted(places), "Pitfalls, Questionnaire, Exercises, Further reading, in this order"
    questions, _, answers = part(prose, "Questionnaire").partition("<details>")
    asked = len(re.findall(r"^\d+\. ", questions, flags=re.M))
    assert 8 <= asked <= 15, f"8 to 15 questions, not {asked}"
    assert all(f"{i}. " in answers for i in range(1, asked + 1)), "a short answer for each question, folded away"
    for head, marker in (("Pitfalls", r"- "), ("Exercises", r"\d+\. "), ("Further reading", r"- ")):
        assert len(re.findall(rf"^{marker}", part(prose, head), flags=re.M)) >= 3, f"{head}: at least three"
    assert path.stem in WITHOUT_PAPER or re.search(r"^## What the papers?('s)? ", prose, flags=re.M), "what the paper reports beside what we measured"
    assert any(cell["outputs"] for cell in load(path)["cells"] if cell["cell_type"] == "code"), "chapters are committed executed"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbered_formulas_have_one_line(path):
    "The site sets a formula with a line break in an environment that allows no number: MathJax then prints an error in its place."
    for formula in re.findall(r"\$\$(.+?)\$\$", prose_of(path), flags=re.S):
        assert not (r"\tag" in formula and "\\\\" in formula), formula


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_badges_open_this_chapter(path):
    head = "".join(load(path)["cells"][0]["source"])
    git_url = settings()["git_url"]
    owner_name = git_url.removeprefix("https://github.com/")
    file = f"nbs/{path.name}"
    assert f"https://colab.research.google.com/github/{owner_name}/blob/{settings()['branch']}/{file})" in head
    assert f"https://mybinder.org/v2/gh/{owner_name}/HEAD?labpath={file})" in head


def test_badges_point_at_files_that_exist():
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        for file in re.findall(r"colab\.research\.google\.com/github/[\w-]+/[\w-]+/blob/\w+/([^)\s\"\\]+)", text) + re.findall(r"mybinder\.org/v2/gh/[^?\s]+\?labpath=([^)\s\"\\]+)", text):
            assert (ROOT / file).is_file(), f"{path.name} has a badge for {file}"


def test_first_cell_installs_on_colab_only_and_is_the_same_everywhere():
    first = {next("".join(cell["source"]) for cell in load(path)["cells"] if cell["cell_type"] == "code") for path in CHAPTERS}
    (source,) = first
    assert source.startswith("#| hide") and '"google.colab" in sys.modules and importlib.util.find_spec("mits_nb") is None' in source
    assert f"git+{settings()['git_url']}" in source, "the name on the package index is not ours: install from the repository"


def test_binder_takes_its_versions_from_the_constraints():
    lines = [line.split("#")[0].strip() for line in (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    assert "-c ../constraints.txt" in lines and "-e ." in lines
    assert not any("=" in line for line in lines), "versions live in constraints.txt alone"
    tested = re.search(r"Python (\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))[1]
    assert (ROOT / "binder" / "runtime.txt").read_text(encoding="utf-8").strip() == f"python-{tested}"


def chapter_map():
    "Rows of the table in nbs/index.ipynb: name of the notebook -> (label, module, needs, minutes)."
    rows = re.findall(r"^\| \[([^]]+)\]\((\S+)\.ipynb\) \| (\S+) \| [^|]+ \| ([^|]+) \| (\d+) \|$", prose_of(ROOT / "nbs" / "index.ipynb"), flags=re.M)
    return {name: (label, module.strip("`"), [int(n) for n in re.findall(r"\d+", needs)], int(minutes)) for label, name, module, needs, minutes in rows}


def test_chapter_map_is_complete():
    rows = chapter_map()
    assert list(rows) == [path.stem for path in CHAPTERS]
    for path in CHAPTERS:
        label, module, needs, minutes = rows[path.stem]
        assert label.startswith(f"{int(path.stem[:2])} ")
        assert module == (module_of(path) or "-")
        assert f"About {minutes} minutes to read" in prose_of(path), f"{path.stem}: its own minutes and those of the map differ"
        assert all(n < int(path.stem[:2]) for n in needs)


def test_chapter_map_names_what_a_module_imports():
    needs = {int(name[:2]): set(row[2]) for name, row in chapter_map().items()}

    def before(number):
        return set().union(needs[number], *(before(n) for n in needs[number]))

    for number, imported in imports_of_modules().items():
        assert imported <= before(number), f"chapter {number} imports from {sorted(imported - before(number))}, which its row does not lead to"


def test_minutes_of_a_chapter_are_believable():
    for name, (_, _, _, minutes) in chapter_map().items():
        path = ROOT / "nbs" / f"{name}.ipynb"
        prose = re.sub(r"<details>.*?</details>", "", prose_of(path), flags=re.S).split("## Further reading")[0]
        code = [line for cell in load(path)["cells"] if cell["cell_type"] == "code" and "#| hide" not in "".join(cell["source"])
                for line in "".join(cell["source"]).splitlines() if line.strip() and not line.startswith(("import", "from", "#|"))]
        guess = len(prose.split()) / 220 + len(code) / 30
        assert 0.6 * guess - 5 <= minutes <= 1.6 * guess + 5, f"{name}: {minutes} minutes where 220 words and 30 lines a minute take {guess:.0f}"


def test_paths_through_the_book_name_sections_that_exist():
    prose = prose_of(ROOT / "nbs" / "index.ipynb")
    rows = [line for head in ("A first hour", "One lecture") for line in part(prose, head).splitlines() if line.startswith("|") and ".ipynb)" in line]
    assert len(rows) >= 8
    for row in rows:
        for link in re.split(r"(?=\[[^\]]+\]\(\S+\.ipynb\))", row)[1:]: # what follows a link names its sections
            name = re.search(r"\((\S+)\.ipynb\)", link)[1]
            headings = re.findall(r"^#+ (.+)$", prose_of(ROOT / "nbs" / f"{name}.ipynb"), flags=re.M)
            sections = re.findall(r"(?<!\*)\*([A-Z0-9][^*]+)\*(?!\*)", link)
            assert sections, row
            for section in sections:
                assert section in headings, f"{name} has no section {section!r}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exported_cells_are_short(path):
    for cell in load(path)["cells"]:
        source = "".join(cell["source"])
        if re.search(r"^#\|\s*exporti?\b", source, flags=re.M):
            assert len(source.splitlines()) <= 75, f"an exported cell of {len(source.splitlines())} lines: {source.splitlines()[1]}"


def test_chapter_and_module_names_agree():
    modules = {path: module_of(path) for path in CHAPTERS}
    named = [module for module in modules.values() if module]
    assert len(named) == len(set(named)), "two notebooks with one default_exp overwrite each other"
    for path, module in modules.items():
        if module:
            assert path.stem[3:] == module
            assert (ROOT / "mits_nb" / (module.replace(".", "/") + ".py")).is_file()


def imports_of_modules():
    "Number of each chapter with a module -> numbers of the chapters that this module imports anywhere."
    order, found = {module_of(path): int(path.stem[:2]) for path in CHAPTERS if module_of(path)}, {}
    for module, number in order.items():
        file = ROOT / "mits_nb" / (module.replace(".", "/") + ".py")
        package = ["mits_nb", *module.split(".")[:-1]]
        found[number] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                name = ".".join([*base, *(node.module or "").split(".")]).strip(".").removeprefix("mits_nb.")
                if name in order:
                    found[number].add(order[name])
    return found


def test_chapters_import_only_earlier_chapters():
    for number, imported in imports_of_modules().items():
        assert all(other < number for other in imported), f"chapter {number} imports from {sorted(imported)}"


def test_generated_modules_say_so():
    for file in (ROOT / "mits_nb").rglob("*.py"):
        if file.name not in ("__init__.py",):
            assert "AUTOGENERATED" in file.read_text(encoding="utf-8")[:300] or file.name == "_modidx.py", file


def test_no_pickle():
    for file in (ROOT / "mits_nb").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert "pickle" not in names and "joblib" not in names, file
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "torch.save", file


def test_import_is_light():
    code = "import time; s=time.perf_counter(); import mits_nb, sys; print(time.perf_counter()-s, 'torch' in sys.modules)"
    seconds, torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert torch == "False"
    assert float(seconds) < 1


def test_readme_is_in_step():
    result = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_results_page_is_in_step():
    result = subprocess.run([sys.executable, ROOT / "tools" / "results.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_requirement_is_pinned():
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for key in ("requirements", "dev_requirements", "docs_requirements"):
        for item in settings()[key].split():
            name = re.sub(r"[-_.]+", "-", re.split(r"[<>=!]", item)[0]).lower()
            assert name in pinned, f"{name} has no tested version in constraints.txt"


def test_nothing_unexpected_at_the_top():
    expected = {"nbs", "mits_nb", "settings.ini", "setup.py", "data_manifests", "tests", "README.md", "tools", "docs", "benchmarks", "binder",
                "Makefile", "constraints.txt", "LICENSE", "ETHICS.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    found = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert not {name for name in found - expected if not name.startswith(".")}


def test_readme_shows_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([\w-]+)", readme, flags=re.M))
    assert {"demo", "test", "lab"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target

"""The tools that make the site: pages from notebooks, links, the results page."""
import importlib.util
import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs():
    before = list(sys.path)
    yield tool("docs")
    sys.path[:] = before


@pytest.fixture
def results():
    return tool("results")


def test_relink_leads_to_pages_or_to_the_repository(docs):
    assert docs.relink("[a](00_core.ipynb)", "nbs") == "[a](00_core.ipynb)"
    assert docs.relink("[a](../ETHICS.md)", "nbs") == "[a](ethics.md)"
    assert docs.relink("[a](../nbs/01_scan.ipynb#reader)", "docs") == "[a](01_scan.ipynb#reader)"
    assert docs.relink("[a](../CITATION.cff)", "nbs") == f"[a]({docs.REPOSITORY}/blob/main/CITATION.cff)"
    assert docs.relink("[a](../tests)", "nbs") == f"[a]({docs.REPOSITORY}/tree/main/tests)"
    for kept in ("[a](https://example.org/x.ipynb)", "[a](#here)"):
        assert docs.relink(kept, "nbs") == kept


def test_relink_refuses_a_link_to_nothing(docs):
    with pytest.raises(SystemExit, match="99_nothing.ipynb"):
        docs.relink("see [there](99_nothing.ipynb)", "nbs")


def test_names_lead_to_their_entries_once_and_not_at_home(docs, monkeypatch):
    monkeypatch.setattr(docs, "homes", lambda: {"read_scan": "scan", "fit": "gan"})
    text = docs.link_names("`read_scan` and `read_scan()`, `fit`, `other`, [`read_scan`](x)\n# `read_scan`\n```\n`read_scan`\n```", "gan")
    assert text.count("(#api-scan-read-scan)") == 1 and text.startswith("[`read_scan`](#api-scan-read-scan) and `read_scan()`")
    assert docs.link_names("`read_scan`", "scan") == "`read_scan`"


def test_page_hides_marks_and_describes(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "modules", lambda: {"toy": "00_toy"})
    monkeypatch.setattr(docs, "public", lambda module: ["shown", "LEVEL"])
    monkeypatch.setattr(docs, "homes", dict)
    picture = new_output("display_data", {"image/png": "aGk="})
    cells = [new_markdown_cell("## A part\n\nSome words. Look at *this* `scan`:"), new_code_cell("#| hide\nsecret = 1"), new_code_cell("#| default_exp toy"), new_code_cell("#| export\nimport os"),
             new_code_cell("#| export\nLEVEL = 3 # the level\ndef shown(): pass"), new_code_cell("#| exporti\ndef _inner(): pass"), new_code_cell("#| data\nshown()", outputs=[picture]), new_code_cell("")]
    file = tmp_path / "00_toy.ipynb"
    nbformat.write(new_notebook(cells=cells), file)
    shown = docs.page(file).cells
    assert [c.source for c in shown] == ["## A part\n\nSome words. Look at *this* `scan`:", "(code-toy-level-class)=\n(code-toy-shown)=", "LEVEL = 3 # the level\ndef shown(): pass", "def _inner(): pass", "shown()"]
    assert shown[-1].metadata["mystnb"]["image"]["alt"] == "Figure: A part. Look at this scan:"


def test_docstrings_are_not_markup(docs):
    assert docs.plain("a * b_c | `d * e` <f> $g$") == r"a \* b\_c \| `d * e` \<f\> \$g\$"


def test_broken_links_are_found(docs, tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="api/b.html#here">ok</a><a href="#top">ok</a><a href="https://example.org">out</a>'
                                     f'<a href="{docs.REPOSITORY}/blob/main/README.md">ok</a><img src="data:image/png;base64,x">', encoding="utf-8")
    (tmp_path / "api" / "b.html").write_text('<p id="here"></p><a href="../a.html">ok</a>', encoding="utf-8")
    assert docs.broken_links(tmp_path) == []
    (tmp_path / "c.html").write_text(f'<a href="a.html#bottom">1</a><a href="gone.html">2</a><img src="gone.png"><a href="#gone">3</a><a href="{docs.REPOSITORY}/blob/main/gone.md">4</a>', encoding="utf-8")
    assert len(docs.broken_links(tmp_path)) == 5


def test_every_chapter_has_a_place_in_the_contents(docs):
    names = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))
    text = docs.contents(names)
    for name in names:
        assert name == "index" or f" <{name}>\n" in text, f"{name} has no row in the chapter map, or no part"


def test_results_say_what_is_not_measured(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "WEIGHTS", tmp_path)
    text = results.render()
    assert text.count("*Not measured yet.*") >= 5 and text.count("not shipped yet") == len(results.SHIPPED)
    assert results.DETECT in text


def test_results_are_read_and_not_typed(results, tmp_path, monkeypatch):
    folder = tmp_path / "cascade-tiny"
    folder.mkdir()
    rows = [{"group": "real", "condition": "aligned", "accuracy": 0.98765, "auc": 0.5, "slices": 12}]
    stored = {"slices": rows, "regions": [{"group": "real", "places": 4, "region_f1": 0.75}], "controls": [{"group": "real", "kind": "shift", "mean": 0.5, "size": 8}], "scans": []}
    (folder / "detection.json").write_text(json.dumps(stored), encoding="utf-8")
    monkeypatch.setattr(results, "WEIGHTS", tmp_path)
    text = results.detection()
    assert "| real, aligned | 0.988 | 0.500 | 12 |" in text and "| real | 4 | 0.750 |" in text
    assert "| real, shift | 50 % (22 to 78) | 8 |" in text


@pytest.mark.parametrize("role, name", [("cascade", "cascade-tiny"), ("mitsgan:robust", "mitsgan-robust-tiny"), ("ctgan-tiny", "ctgan-tiny")])
def test_results_of_earlier_weights_are_called_so(results, role, name):
    from mits_nb.evaluate import weights_digest
    def text(digest): return results.published({"about": {"weights": {role: digest}, "scans": {}}, "tables": []})
    assert f"**Measured with earlier weights** ({name})" in text("00") and "earlier weights" not in text(weights_digest(name))


def test_results_intervals_are_over_scans(results):
    mean, interval, low, high = results.over_scans([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and (low, high) == ("1.000", "4.0")
    a, b = (float(v) for v in interval.split(" to "))
    assert 1 <= a < 2.5 < b <= 4

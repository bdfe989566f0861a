"The shape of a lesson and what its file may hold."
import ast
import base64
import re
from copy import deepcopy

import pytest
from tree import NAME, NBS, directives, notebooks, owner, read_nb, source

FIGURE, NOTEBOOK = 60_000, 300_000
PATH = re.compile(r"(?<![\w.:/~-])/(?:wo" r"rk|root|home|tmp|Users|opt|mnt|content)/\w")
BAR = re.compile(r"\d+%\|[ #\u2580-\u259f]|\bit/s\b|\bs/it\b|[\u2588\u2589\u258a-\u258f]{2}")
HEADINGS = ("What we now know", "Differences from the paper", "Exercise")


def size(mime, data):
    "Bytes of one part of an output, pictures decoded."
    if mime.startswith("image/") and mime != "image/svg+xml": return len(base64.b64decode("".join(data)))
    return len(str("".join(data) if isinstance(data, (str, list)) else data))


def faults(nb):
    "What a notebook's file must not hold."
    out = []
    for i, c in enumerate(nb["cells"]):
        if PATH.search(source(c)): out.append(f"cell {i}: absolute path in the source")
        for o in c.get("outputs", []):
            if o["output_type"] == "error": out.append(f"cell {i}: stored error")
            for mime, d in o.get("data", {}).items():
                if size(mime, d) > FIGURE: out.append(f"cell {i}: {mime} of {size(mime, d)} bytes")
                if mime.startswith("image/"): continue
                t = "".join(d) if isinstance(d, (str, list)) else str(d)
                if PATH.search(t): out.append(f"cell {i}: absolute path in the output")
                if BAR.search(t): out.append(f"cell {i}: progress bar")
            t = "".join(o.get("text", ""))
            if PATH.search(t): out.append(f"cell {i}: absolute path in the output")
            if BAR.search(t): out.append(f"cell {i}: progress bar")
    if "widgets" in nb["metadata"]: out.append("widget states")
    return out


def parse(src):
    "A cell's syntax tree; lines for the shell or for IPython count as nothing."
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", src))


def only_imports(src): return all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Try)) for n in parse(src).body)


def shown(cell):
    "Whether a reader sees this cell run: code that is neither exported nor hidden nor left out."
    return cell["cell_type"] == "code" and not directives(cell) & {"export", "exporti", "exports", "hide", "eval", "default_exp"}


def rhythm(nb):
    "Exported cells that follow one another with nothing shown between them."
    out, last = [], None
    for i, c in enumerate(nb["cells"]):
        if directives(c) & {"export", "exports"} and not only_imports(source(c)):
            if last is not None: out.append(f"nothing is shown between cells {last} and {i}")
            last = i
        elif shown(c): last = None
    return out


def mixed(nb):
    """Cells that import and do something else: nbdev runs every cell with an import while it builds the site, and no other lesson
    cell, so the names that such a cell needs would be missing there."""
    def has_import(src): return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(parse(src)))
    left_out = {"export", "exports", "exporti", "eval"}
    return [f"cell {i} imports and does something else" for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code"
            and not directives(c) & left_out and has_import(source(c)) and not only_imports(source(c))]


def badge(name):
    at = f"https://colab.research.google.com/github/{owner()}/{NAME}/blob/main/nbs/{name}"
    return f"[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({at})"


def form(nb, name):
    "What is amiss with title, badge and closing headings."
    cells, out = nb["cells"], []
    if cells[0]["cell_type"] != "markdown" or not re.fullmatch(r"# [^\n]+\n+> [^\n]+\n*", source(cells[0])):
        out.append("title cell: `# Title` and one line `> claim`, nothing else")
    if name != "index.ipynb" and badge(name) not in source(cells[1]): out.append("cell 1 lacks the badge of this notebook")
    if re.match(r"0|1\d|2\d", name):
        heads = re.findall(r"(?m)^#{2,4} +(.*)$", "\n".join(source(c) for c in cells if c["cell_type"] == "markdown"))
        out += [f"no heading {h!r}" for h in HEADINGS if not any(x.startswith(h) for x in heads)]
    if any("nbdev_export" in source(c) for c in cells): out.append("a lesson does not export itself")
    exports = [m[1] for c in cells if (m := re.search(r"#\| *default_exp +(\w+)", source(c)))]
    if exports and exports != [re.sub(r"^\d+[a-z]?_|\.ipynb$", "", name)]: out.append(f"exports to {exports}")
    return out


def without_alt(nb, name):
    "Figures of a lesson that say nothing to those who cannot see them."
    if not re.match(r"0|1\d|2\d", name): return []
    return [f"cell {i}: a figure without fig-alt" for i, c in enumerate(nb["cells"]) if "fig-alt" not in source(c)
            and any(m.startswith("image/") for o in c.get("outputs", []) for m in o.get("data", {}))]


def installs(nb):
    "Lesson cells that reach outside: any shell or pip line but the one install line."
    line = re.compile(rf"(?m)^\s*[%!](?!(?:pip install -q {NAME}|matplotlib inline|config InlineBackend.*|time|timeit)\b).*$")
    return [m[0].strip() for c in nb["cells"] if c["cell_type"] == "code" for m in line.finditer(source(c))]


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.name)
class TestNotebook:
    def test_size(self, path): assert path.stat().st_size <= NOTEBOOK

    def test_file_is_clean(self, path): assert not faults(read_nb(path))

    def test_imports_stand_alone(self, path): assert not mixed(read_nb(path))

    def test_rhythm(self, path): assert not rhythm(read_nb(path))

    def test_form(self, path): assert not form(read_nb(path), path.name)

    def test_reaches_for_nothing(self, path): assert not installs(read_nb(path))

    def test_figures_have_words(self, path): assert not without_alt(read_nb(path), path.name)


def test_notebooks_use_lower_numbers_only():
    order = {re.sub(r"^\d+[a-z]?_", "", p.stem): p.name.split("_")[0] for p in notebooks() if p.name[:2].isdigit()}
    for p in notebooks():
        if not p.name[:2].isdigit(): continue
        src = "\n".join(source(c) for c in read_nb(p)["cells"] if c["cell_type"] == "code")
        used, here = set(re.findall(rf"{NAME}\.(\w+)", src)) & set(order), p.name.split("_")[0]
        assert all(order[m] < here or p.stem == f"{here}_{m}" for m in used), f"{p.name} uses {sorted(used)}"


def md(s): return dict(cell_type="markdown", source=s, metadata={})


def code(s, *outputs): return dict(cell_type="code", source=s, metadata={}, outputs=list(outputs))


def out(mime, data): return dict(output_type="display_data", data={mime: data}, metadata={})


def stream(text): return dict(output_type="stream", name="stdout", text=text)


GOOD = dict(metadata={}, cells=[
    md("# A title\n\n> A claim."), md(badge("00_core.ipynb")), code("#| default_exp core"), code("#| export\nimport os"),
    code("#| export\ndef f(): return 1"), code("f()", out("text/plain", "1")), code("#| export\ndef g(): return 2"), code("g()"),
    md("## Exercise 1 (5 minutes)"), md("## What we now know"), md("## Differences from the paper")])


def complaints(nb):
    return faults(nb) + mixed(nb) + rhythm(nb) + form(nb, "00_core.ipynb") + installs(nb) + without_alt(nb, "00_core.ipynb")


def test_a_good_notebook_passes(): assert not complaints(GOOD)


@pytest.mark.parametrize("at,cell", [
    (0, md("# A title\n\n> A claim.\n\n[badge](x)")), (0, md("# A title")), (0, code("# A title")),
    (1, md(badge("01_tasks.ipynb"))),
    (1, md(badge("00_core.ipynb").replace(owner() + "/", "else/"))),
    (2, code("#| default_exp tasks")),
    (5, md("only words")), (5, code("#| hide\nf()")), (5, code("#| eval: false\nf()")),
    (8, md("nothing")), (9, md("nothing")), (10, md("nothing")),
    (5, code('#| fig-alt: "x"\nf()', out("image/png", base64.b64encode(bytes(60_001)).decode()))),
    (5, code("f()", out("image/png", base64.b64encode(bytes(60)).decode()))),
    (5, code("f()", out("text/html", "x"*60_001))),
    (5, code("f()", stream("saved in /" + "tmp/x.png"))), (5, code("f()", out("text/plain", "/" + "home/me/x"))),
    (5, code("import math\nmath.pi")), (5, code("def f():\n    import math\n    return math.pi\nf()")),
    (5, code("open('/" + "root/x')")), (5, code("f()", stream(" 50%|#####     | 5/10 [00:01<00:01, 5.00it/s]"))),
    (5, code("f()", out("text/html", "\u2588\u2588\u258e"))),
    (5, code("f()", dict(output_type="error", ename="E", evalue="", traceback=[]))),
    (7, code("nbdev_export()")), (7, code("%pip install torch")), (7, code("!ls"))])
def test_a_fault_is_seen(at, cell):
    nb = deepcopy(GOOD)
    nb["cells"][at] = cell
    assert len(complaints(nb)) == 1


def test_widget_states_are_seen(): assert faults({**GOOD, "metadata": {"widgets": {}}})


def test_there_are_notebooks(): assert [p for p in notebooks() if p.parent == NBS]

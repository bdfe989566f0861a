"README.md is what nbs/index.ipynb gives, its code runs, its links lead somewhere."
import re
import subprocess
import sys
import time

import pytest
import yaml
from make_readme import readme, relink
from tree import NBS, ROOT, clean_env, read_nb, source

INDEX, README = NBS/"index.ipynb", ROOT/"README.md"
written = pytest.mark.skipif(not INDEX.exists(), reason="nbs/index.ipynb is not written yet")


def python(text): return "\n\n".join(re.findall(r"(?ms)^```python\n(.*?)^```", text))


def run(code): return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(IN_TEST="1"), capture_output=True, text=True)


@written
def test_readme_is_in_step(): assert README.read_text(encoding="utf-8") == readme(read_nb(INDEX)), "run `make readme`"


@written
def test_code_runs(record):
    "Every ```python block, in order, in one process at the root, offline (the weights that ship are needed)."
    code, start = python(README.read_text(encoding="utf-8")), time.perf_counter()
    assert code.strip(), "the README shows no code"
    r = run(code)
    record("the README's code", f"{time.perf_counter() - start:.1f} s")
    assert r.returncode == 0, r.stderr[-3000:]


@written
def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8"))
    assert not [t for t in targets if not re.match(r"[a-z]+:", t) and not (ROOT/t).exists()]


def minutes(path):
    "What a notebook says of its length: to read, and for the exercises; - where it says nothing."
    said = re.search(r"\*Time: ([^*]*?)(?:\. |\*)", "\n".join(source(c) for c in read_nb(path)["cells"][:4]))
    return " + ".join(re.findall(r"\b\d+\b", said[1])) if said else "-"


@written
def test_the_course_map_is_the_sidebar_with_times():
    rows = re.findall(r"(?m)^\| ([^|]*) ?\| \[(\w+)\]\((\w+\.ipynb)\) \| [^|]+ \| ([^|]+) \|", "\n".join(source(c) for c in read_nb(INDEX)["cells"]))
    sections = [s for s in yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]["contents"] if isinstance(s, dict)]
    assert [file for _, _, file, _ in rows] == [f for s in sections for f in s["contents"]]
    assert [part.strip() for part, *_ in rows if part.strip()] == [s["section"] for s in sections]
    for _, name, file, said in rows: assert file == f"{name}.ipynb" and said == minutes(NBS/file), f"{file}: {said}, expected {minutes(NBS/file)}"


@written
def test_both_commands_are_there_and_their_plain_lines():
    text = README.read_text(encoding="utf-8")
    for line in ("make demo", "make test", "python3 -m venv .venv", "-c constraints.txt"): assert line in text, line


def test_broken_code_is_seen():
    assert run(python("words\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")).returncode
    assert not run(python("```python\nx = 1\n```\n```py\nbroken(\n```\n```text\n1/0\n```\n")).returncode


def cell(kind, src, **more): return dict(cell_type=kind, source=src, **more)


def test_cells_become_markdown():
    stored = dict(output_type="execute_result", data={"text/plain": ["3"]})
    nb = dict(cells=[cell("markdown", "# T\n\n> c"), cell("code", "#| hide\nimport x"), cell("code", "1 + 2", outputs=[stored]),
                     cell("code", "#| eval: false\nlong()", outputs=[])])
    assert readme(nb).endswith("# T\n\n> c\n\n```python\n1 + 2\n```\n\n```text\n3\n```\n\n```py\nlong()\n```\n")


def test_a_stored_picture_is_refused():
    picture = dict(output_type="display_data", data={"image/png": "aaaa"})
    with pytest.raises(ValueError, match="link a picture"): readme(dict(cells=[cell("code", "show()", outputs=[picture])]))


@pytest.mark.parametrize("src,want", [
    ("[a](00_core.ipynb)", "[a](nbs/00_core.ipynb)"), ("![f](images/f.png)", "![f](nbs/images/f.png)"),
    ("[r](../results/a.csv)", "[r](results/a.csv)"), ("[w](https://x.org/y)", "[w](https://x.org/y)"), ("[h](#here)", "[h](#here)"),
    ('<img width="9" src="f.png">', '<img width="9" src="nbs/f.png">')])
def test_links_are_moved(src, want): assert relink(src) == want

"Docments are complete, functions are short, names are ASCII."
import ast
import importlib
import inspect
import io
import statistics
import tokenize

import pytest
from fastcore.docments import docments
from tree import NAME, modules

FUNCS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(name): return not name.startswith("_") or name in ("__init__", "__call__")


def comments(src):
    return {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(src).readline)
            if t.type == tokenize.COMMENT}


def own(f):
    "The nodes of `f` itself, not of the functions inside it."
    todo = list(f.body)
    while todo:
        n = todo.pop()
        yield n
        if not isinstance(n, (*FUNCS, ast.Lambda, ast.ClassDef)): todo += ast.iter_child_nodes(n)


def gives_back(f):
    if isinstance(f.returns, ast.Constant) and f.returns.value is None: return False
    found = any(isinstance(n, (ast.Yield, ast.YieldFrom)) or isinstance(n, ast.Return) and n.value for n in own(f))
    return f.returns is not None or found


def undocumented(f, said, where, is_method=False):
    "What lacks a docment in the function `f`; `said` has the comments by line."
    out = []
    if not ast.get_docstring(f) and f.name != "__init__": out.append(f"{where}: no docstring")
    a = f.args
    args = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    if is_method and args and args[0].arg in ("self", "cls"): args = args[1:]
    lines = {g.lineno: g.arg for g in args}  # as fastcore reads it: one line, one name, and the return's line is the return's
    if f.returns is not None: lines[f.returns.lineno] = "return"
    have = {name for line, name in lines.items() if said.get(line) or said.get(line - 1) and (line - 1) not in lines}
    if gives_back(f) and f.returns is None:
        last = max([f.lineno, *lines])
        if any(last < line < f.body[0].lineno for line in said): have.add("return")
    out += [f"{where}: no comment on `{g.arg}`" for g in args if g.arg not in have]
    if gives_back(f) and "return" not in have: out.append(f"{where}: no comment on what is returned")
    return out


def missing(src):
    "Every gap in the docs of a module's source; a field that a class above has explained need not be explained again."
    said, out, known = comments(src), [], set()
    for n in ast.parse(src).body:
        if isinstance(n, FUNCS):
            patch = any("patch" in ast.unparse(d) for d in n.decorator_list)
            if public(n.name): out += undocumented(n, said, n.name, is_method=patch)
        if isinstance(n, ast.ClassDef) and public(n.name):
            if not ast.get_docstring(n): out.append(f"{n.name}: no docstring")
            for m in n.body:
                if isinstance(m, FUNCS) and public(m.name): out += undocumented(m, said, f"{n.name}.{m.name}", is_method=True)
                if not isinstance(m, ast.AnnAssign) or not public(m.target.id): continue
                if said.get(m.lineno) or said.get(m.end_lineno): known |= {(n.name, m.target.id)}
                elif not {(b.id, m.target.id) for b in n.bases if isinstance(b, ast.Name)} & known:
                    out.append(f"{n.name}: no comment on `{m.target.id}`")
    return out


@pytest.mark.parametrize("module", modules())
def test_docments_are_complete(module): assert not missing(modules()[module].read_text())


@pytest.mark.parametrize("module", [m for m in modules() if m != "cli"])
def test_fastcore_reads_the_same(module):
    "What the reader of the site sees is fastcore's reading: no parameter of a function in `__all__` is blank there."
    mod, blank = importlib.import_module(f"{NAME}.{module}"), []
    for name in mod.__all__:
        f = getattr(mod, name)
        if inspect.isfunction(f): blank += [f"{name}: {k}" for k, v in docments(f, returns=False, args_kwargs=True).items() if not v]
    assert not blank


@pytest.mark.parametrize("gap,src", [
    ("no docstring", "def f(): pass"), ("no docstring", "class A:\n    x = 1"),
    ("no docstring", "class A:\n    'a'\n    def f(self): pass"), ("`x`", "def f(\n    x,\n):\n    'd'"),
    ("`x`", "def f(x)->int: # the result\n    'd'\n    return 1"), ("`x`", "def f(x, y): # y\n    'd'"),
    ("returned", "def f(\n    x, # it\n)->int:\n    'd'"), ("returned", "def f():\n    'd'\n    return 1"),
    ("returned", "def f(\n    x, # it\n):\n    'd'\n    yield x"), ("`x`", "class A(NamedTuple):\n    'd'\n    x:int"),
    ("`x`", "class A:\n    'd'\n    def __init__(self, x): self.x = x"), ("`n`", "@patch\ndef f(self:A, n): 'd'"),
    ("`k`", "def f(\n    *,\n    k,\n):\n    'd'"), ("`kw`", "def f(\n    **kw,\n):\n    'd'")])
def test_a_gap_is_seen(gap, src):
    assert len(missing(src + "\n")) == 1 and gap in missing(src + "\n")[0]


def test_full_docs_have_no_gap():
    assert not missing("def f(\n    x:int, # it\n    y=1, # that\n)->int: # both\n    'd'\n    return x + y\n"
                       "@patch\ndef g(self:A): 'd'\ndef h(\n    x, # it\n): # again\n    'd'\n    return x\n"
                       "class A(NamedTuple):\n    'd'\n    x:int # it\ndef _private(x): return x\n")


def body_lines(f):
    body = f.body[1:] if ast.get_docstring(f) and len(f.body) > 1 else f.body
    return body[-1].end_lineno - body[0].lineno + 1


def lengths(src): return {f.name: body_lines(f) for f in ast.walk(ast.parse(src)) if isinstance(f, FUNCS)}


def test_functions_are_short(record):
    found = {f"{m}.{k}": v for m, p in modules().items() for k, v in lengths(p.read_text()).items()}
    record("lines per function, median and longest", (statistics.median(found.values()), max(found.values())))
    assert not {k: v for k, v in found.items() if v > 30}


def test_length_counts_the_body_alone():
    assert lengths("def f(\n    x,\n):\n    'one\\n two'\n    a = 1\n\n    return a\n") == {"f": 3}


def foreign(src):
    names = {n for t in ast.walk(ast.parse(src)) for k in ("id", "arg", "name", "attr") if isinstance(n := getattr(t, k, None), str)}
    return {n for n in names if not n.isascii()}


@pytest.mark.parametrize("module", modules())
def test_names_are_ascii(module): assert not foreign(modules()[module].read_text())


@pytest.mark.parametrize("src", ["\u03b2 = 1", "def \u03c3(): pass", "def f(\u03b5): pass", "x.\u03b1 = 1"])
def test_a_greek_name_is_seen(src): assert foreign(src)

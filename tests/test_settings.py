"One set of settings: pyproject.toml, settings.ini, constraints.txt, CITATION.cff, the site and every URL agree."
import configparser
import re

import pytest
from packaging.requirements import Requirement
from tree import NAME, NBS, ROOT, owner, text_files, toml


def ini_text(): return (ROOT/"settings.ini").read_text()


def ini(text=None):
    c = configparser.ConfigParser(interpolation=None)
    c.read_string(text or ini_text())
    return c["DEFAULT"]


def version(): return re.search(r'__version__ = "([^"]+)"', (ROOT/NAME/"__init__.py").read_text())[1]


def wanted(t):
    "settings.ini as it follows from pyproject.toml."
    p, nb = t["project"], t["tool"]["nbdev"]
    host, base = re.fullmatch(r"(https://[^/]+)(/.*?)/?", p["urls"]["Documentation"]).groups()
    return dict(
        repo=p["urls"]["Repository"].rsplit("/", 1)[1], lib_name=p["name"], version=version(), lib_path=NAME, nbs_path="nbs",
        min_python=p["requires-python"].removeprefix(">="), license={"Apache-2.0": "apache2"}[p["license"]],
        title=nb["title"], tst_flags=nb["tst_flags"], doc_path="_docs", branch="main", recursive="True", readme_nb="index.ipynb",
        custom_sidebar=str(nb["custom_sidebar"]), jupyter_hooks=str(nb["jupyter_hooks"]), clean_ids="True", clear_all="False",
        put_version_in_init="True", doc_host=host, doc_baseurl=base, git_url=p["urls"]["Repository"], user=owner(),
        author=p["authors"][0]["name"], description=p["description"], keywords=" ".join(k.replace(" ", "-") for k in p["keywords"]),
        requirements=" ".join(p["dependencies"]), dev_requirements=" ".join(p["optional-dependencies"]["dev"]),
        console_scripts=" ".join(f"{k}={v}" for k, v in p["scripts"].items()),
        allowed_metadata_keys=" ".join(nb["allowed_metadata_keys"]),
        allowed_cell_metadata_keys=" ".join(nb["allowed_cell_metadata_keys"]))


def differences(t, settings):
    return [f"{k}: pyproject.toml says {v!r}, settings.ini {settings.get(k)!r}" for k, v in wanted(t).items() if settings.get(k) != v]


def test_settings_agree(): assert not differences(toml(), ini())


@pytest.mark.parametrize("line", [f"{k} = " for k in wanted(toml())])
def test_every_change_in_settings_is_seen(line):
    text, n = re.subn(rf"(?m)^{line}.*$", line + "another", ini_text())
    assert n == 1 and len(differences(toml(), ini(text))) == 1


def test_nothing_in_pyproject_is_unknown_to_settings():
    "A key added to [tool.nbdev] must be added to settings.ini and to `wanted`."
    assert set(toml()["tool"]["nbdev"]) <= set(wanted(toml()))


URL = re.compile(rf"(?:github\.com/([\w.-]+)/{NAME}|([\w-]+)\.github\.io/{NAME}|colab\.research\.google\.com/github/([\w.-]+)/)")


def foreign_urls(text, who): return [m[0] for m in URL.finditer(text) if {g for g in m.groups() if g} != {who}]


def test_every_url_has_the_owner():
    wrong = {str(p.relative_to(ROOT)): u for p in text_files() if p.name != "test_settings.py"
             if (u := foreign_urls(p.read_text(encoding="utf-8"), owner()))}
    assert not wrong, f"the owner is {owner()!r} (pyproject.toml)"


@pytest.mark.parametrize("url", [f"https://github.com/else/{NAME}/x", f"https://else.github.io/{NAME}/",
                                 f"https://colab.research.google.com/github/else/{NAME}/blob/main/nbs/00_core.ipynb",
                                 f"https://img.shields.io/github/stars?u=github.com/else/{NAME}"])
def test_foreign_owner_is_seen(url):
    assert foreign_urls(url, owner()) and not foreign_urls(url.replace("else", owner()), owner())


def pins(text):
    return dict(re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.]+)", s).groups() for s in text.splitlines() if s and s[0] != "#")


def canonical(name): return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_what_is_required():
    p = toml()["project"]
    have = {canonical(k): v for k, v in pins((ROOT/"constraints.txt").read_text()).items()}
    for r in map(Requirement, p["dependencies"] + p["optional-dependencies"]["dev"]):
        assert r.specifier.contains(have[canonical(r.name)]), f"{r} against {have[canonical(r.name)]}"


@pytest.mark.parametrize("line", ["torch==2.13.0+cpu", "torch>=2.13", "torch @ file:///somewhere/torch.whl", "--find-links x"])
def test_constraints_admit_only_exact_public_versions(line):
    with pytest.raises(AttributeError): pins(line)


@pytest.mark.parametrize("dep", toml()["project"]["dependencies"])
def test_runtime_dependencies_carry_a_lower_bound_only(dep): assert [s.operator for s in Requirement(dep).specifier] == [">="]


def test_torch_2_11_is_admitted():
    torch, = [r for r in map(Requirement, toml()["project"]["dependencies"]) if r.name == "torch"]
    assert torch.specifier.contains("2.11.0")


def test_citation_and_changelog_know_the_version():
    assert f"\nversion: {version()}\n" in (ROOT/"CITATION.cff").read_text()
    assert f"## {version()}" in (ROOT/"CHANGELOG.md").read_text()


def test_site_lists_every_notebook():
    assert (NBS/"_quarto.yml").read_text() == (ROOT/"_quarto.yml").read_text()
    listed = re.findall(r"[\w-]+\.ipynb", (ROOT/"_quarto.yml").read_text())
    assert sorted(listed) == sorted(set(listed))
    assert {p.name for p in NBS.glob("*.ipynb")} <= set(listed)

"What no file of the repository says: package registries' hosts, paths of one machine, tools of the writers."
import pytest
from tree import ROOT, text_files

HOSTS = ["py" + "pi.org", "pythonhost" + "ed.org", "download.py" + "torch.org", "ana" + "conda.org", "download-r2.py" + "torch.org"]
PLACES = ["/wo" + "rk/", "/ro" + "ot/", "/home/us" + "er", "/op" + "t/", "/Us" + "ers/"]
WRITERS = ["issues sh" + "ow", "shared/DES" + "IGN", "shared/ST" + "YLE", "TASKS" + ".md", "STYLE" + ".md", "DESIGN" + ".md"]


def said(text): return [w for w in HOSTS + PLACES + WRITERS if w in text]


def test_no_file_says_it():
    assert not {str(p.relative_to(ROOT)): w for p in text_files() if (w := said(p.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("word", HOSTS + PLACES + WRITERS)
def test_each_is_seen(word): assert said(f"see {word}x for more") == [word]


def test_no_text_file_is_large():
    assert not [str(p.relative_to(ROOT)) for p in text_files() if p.stat().st_size > 2_000_000]

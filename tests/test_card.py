"A card says what the files say: each gap is named, each planted fault is seen, nothing is rewritten."
import dataclasses
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from test_notebooks import PATH
from tree import NBS, ROOT, clean_env, read_nb, source

from rulediff_nb import card as module
from rulediff_nb import cli
from rulediff_nb.card import (
    ALGORITHMS,
    INDEX,
    PAPER_CARD,
    VARIABLES,
    Card,
    Entry,
    affiliation_entry,
    card,
    cards,
    code_entry,
    compare,
    package_facts,
    pseudocode_entry,
    seeds_per_setting,
    settings_chosen,
    source_cell,
    splits_entry,
    study_entries,
    study_more,
    study_seeds,
    subjects,
    symbol_of,
    train_command,
    trains,
)
from rulediff_nb.classifier import CLASSIFIER_WEIGHTS
from rulediff_nb.metrics import FLOOR_SEED
from rulediff_nb.sample import WEIGHTS, load_pretrained
from rulediff_nb.store import StoreError, list_releases, load_manifest, load_release, save_release, write_atomic
from rulediff_nb.table import RESULTS, STUDIES, find_study, provenance, results, table_names
from rulediff_nb.tasks import get_task
from rulediff_nb.unet import recipe

NAME = "two_squares-fixed"
FULL = provenance(torch.device("cpu")) | dict(revision="a"*40, dirty=False)   # what a manifest of today takes over
SHIPPED = [s.name for s in subjects() if s.kind != "study"]


def changed(folder, drop=(), **more):
    "Weights of the package in another folder, their manifest changed and sealed again; the path of the manifest."
    tensors, m = load_release(WEIGHTS, NAME)
    save_release(folder, NAME, tensors, {k: v for k, v in (m | more).items() if k not in drop})
    return folder/f"{NAME}.json"


def result(c, variable): return c.entries[VARIABLES.index(variable)]


def test_a_manifest_of_today_lacks_the_affiliation_alone(tmp_path):
    c = card(changed(tmp_path, **FULL))
    assert c.missing == ("affiliation",) and c.partial == ()


@pytest.mark.parametrize("variable,want,said,more", [
    ("software versions", "partial", "missing: torch", dict(torch=None, versions={k: v for k, v in FULL["versions"].items() if k != "torch"})),
    ("software versions", "partial", "missing: torch", dict(torch=None, versions=FULL["versions"] | dict(torch="missing"))),
    ("software versions", "partial", "missing: python", dict(python=None)),
    ("software versions", "partial", "missing: cuda", dict(device="cuda")),
    ("software versions", "no", "missing: python", dict(python=None, system=None, versions={}, torch=None, diffusers=None)),
    ("open code", "no", "missing: git checkout", dict(revision="not a git checkout")),
    ("open code", "partial", "missing: clean tree", dict(dirty=True)),
    ("open code", "partial", "missing: dirty", dict(dirty=None)),
    ("open code", "no", "missing: revision", dict(revision=None)),
    ("open code", "partial", "missing: revision", dict(revision=None, stored_by="b"*40)),
    ("hardware", "partial", "missing: device", dict(device=None)),
    ("hardware", "no", "missing: hardware", dict(hardware=None, device=None, threads=None, seconds=None)),
    ("open data", "partial", "missing: images_sha256", dict(images_sha256=None)),
    ("open data", "partial", "missing: seed", dict(set_seed=None)),
    ("setup", "partial", "missing: set_seed", dict(set_seed=None)),
    ("research type", "no", "0 measured", dict(report={}))])
def test_a_gap_is_named(variable, want, said, more, tmp_path):
    good, bad = card(changed(tmp_path/"good", **FULL)), card(changed(tmp_path/"bad", **FULL | more))
    assert result(good, variable).result == "yes" and "missing" not in result(good, variable).evidence
    assert result(bad, variable).result == want and said in result(bad, variable).evidence


def test_a_field_of_the_recipe_that_is_missing_is_named(tmp_path):
    m = load_manifest(WEIGHTS, NAME)
    c = card(changed(tmp_path, recipe={k: v for k, v in m["recipe"].items() if k != "ema"}))
    assert result(c, "setup").result == "partial" and "recipe.ema" in result(c, "setup").evidence


@pytest.mark.parametrize("seed,want", [(777, "yes"), (0, "no"), (FLOOR_SEED, "no"), (None, "partial")])
def test_an_evaluation_on_the_training_seed_is_seen(seed, want, tmp_path):
    report = load_manifest(WEIGHTS, NAME)["report"]
    assert result(card(changed(tmp_path, report=report | dict(seed=seed))), "splits").result == want


def test_seeds_of_several_sets():
    assert splits_entry([0, 1], [2, 3], "x").result == "yes" and splits_entry([0, 1], [1, 2], "x").result == "no"
    assert splits_entry([0], None, "x").result == "partial" and "training 0," in splits_entry([0], [1], "x").evidence


def test_a_renamed_function_is_seen(monkeypatch):
    assert result(card(NAME), "pseudocode").result == "yes"
    monkeypatch.delitem(INDEX["syms"]["rulediff_nb.train"], "rulediff_nb.train.train_steps")
    entry = result(card(NAME), "pseudocode")
    assert entry.result == "no" and entry.evidence.endswith("missing: train.train_steps")


def test_a_function_that_the_module_no_longer_has_is_seen(monkeypatch):
    monkeypatch.setitem(INDEX["syms"]["rulediff_nb.train"], "rulediff_nb.train.gone", ("train.html#gone", "rulediff_nb/train.py"))
    assert source_cell("train.gone") is None and source_cell("nowhere.train") is None


def private(row, work): return {}


def test_a_study_that_measures_outside_of_the_package_is_seen():
    s = find_study("curves")
    def entry(study): return entries(results("curves"), {}, study)["pseudocode"]
    assert entry(s).result == "yes" and entry(dataclasses.replace(s, measure=private)).result == "no" and entry(None).result == "no"


@pytest.mark.parametrize("symbol", sorted({s for v in ALGORITHMS.values() for s in v}))
def test_a_cell_defines_what_the_card_says(symbol):
    at = source_cell(symbol)
    cell = next(c for c in read_nb(NBS/at.notebook)["cells"] if c["id"] == at.cell)
    assert re.search(rf"(?m)^(def|class) {symbol.split('.')[1]}\b", source(cell))
    assert at.url.startswith(package_facts().url) and at.url.endswith(f"/nbs/{at.notebook}#cell-id={at.cell}")


def test_every_study_of_the_package_is_in_its_notebooks():
    found = {name: pseudocode_entry([symbol_of(f) for f in (s.plan, s.measure, s.finish) if f])
             for name in table_names() if (s := module._definition(name))}
    assert found and not {k: v.evidence for k, v in found.items() if v.result != "yes"}


def asked(command):
    "What `rulediff train` would do: for each run the recipe that it makes, and the options."
    at = inspect.signature(cli.train).parameters
    for words in map(shlex.split, command.split(" && ")):
        assert words[:2] == ["rulediff", "train"] and len(words) % 2
        said = dict(zip([w.removeprefix("--") for w in words[3::2]], words[4::2]))
        assert set(said) <= set(at) and "task" in at
        fields = cli.parse_change(said.get("change", "")) | (dict(lr=float(said["lr"])) if "lr" in said else {})
        yield recipe(said["preset"], get_task(words[2], palette=said["palette"]), **fields).to_dict(), said


@pytest.mark.parametrize("name", list_releases(WEIGHTS))
def test_the_command_line_takes_the_command(name):
    m = load_manifest(WEIGHTS, name)
    *before, (made, said) = asked(train_command(m))
    assert made == m["recipe"] and int(said["steps"]) == m["steps"] and int(said["seed"]) == m["set_seed"]
    assert [(r["lr"], r["attention"], int(s["steps"])) for r, s in before] == [(s["lr"], s["attention"], s["steps"]) for s in m.get("stages", [])]
    assert ("start" in said) == bool(before)


def test_a_changed_recipe_and_another_number_of_images_are_in_the_command():
    m = load_manifest(WEIGHTS, NAME)
    other = m["recipe"] | dict(betas="linear", lr=.001, attention=[False, False, True], batch=64)
    (made, said), = asked(train_command(m | dict(recipe=other, images_in_set=99)))
    assert made == other and said["n"] == "99"


def test_a_recipe_that_the_command_line_cannot_make_has_no_command(tmp_path):
    m = load_manifest(WEIGHTS, NAME)
    for task in (m["recipe"]["task"] | dict(size=64), m["recipe"]["task"] | dict(name="of_mine"), None):
        assert train_command(m | dict(recipe=m["recipe"] | dict(task=task))) == ""
    c = card(changed(tmp_path, recipe=m["recipe"] | dict(preset="of mine")))
    assert result(c, "research type").result == "partial" and "missing: command" in result(c, "setup").evidence


@pytest.mark.parametrize("name", list_releases(WEIGHTS))
def test_training_sets_can_be_drawn_again(name):
    assert "training set drawn again: the same" in result(card(name).verify(), "open data").evidence


def test_one_wrong_digit_is_seen(tmp_path):
    digest = load_manifest(WEIGHTS, NAME)["images_sha256"]
    wrong = digest[:20] + ("0" if digest[20] != "0" else "1") + digest[21:]
    c = card(changed(tmp_path, images_sha256=wrong))
    with pytest.raises(StoreError, match=f"images_sha256 {digest}, expected {wrong}"): c.verify()


def test_one_wrong_bit_of_the_weights_is_seen(tmp_path):
    path = changed(tmp_path).with_suffix(".safetensors")
    c, blob = card(path.with_suffix(".json")), bytearray(path.read_bytes())
    assert c.verify()
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(StoreError, match="found sha256 .*, expected"): c.verify()


def copied(name, folder):
    "A table of the package in another folder; the path of its notes."
    for end in ("csv", "json"): shutil.copy(RESULTS/f"{name}.{end}", folder)
    return folder/f"{name}.json"


def test_one_wrong_digit_of_a_table_is_seen(tmp_path):
    path = copied("sampling", tmp_path)
    c = card(path)
    assert "table hashed again: the same" in result(c.verify(), "open data").evidence
    table = path.with_suffix(".csv")
    table.write_bytes(table.read_bytes().replace(b"0.9", b"0.8", 1))
    with pytest.raises(StoreError, match="found sha256 .*, expected"): c.verify()


def test_the_weights_that_a_table_names_are_checked(monkeypatch, tmp_path):
    path, used = copied("sampling", tmp_path), []
    monkeypatch.setattr(module, "_checked_weights", lambda folder, name: used.append(name) or True)
    card(path).verify()
    assert used and set(used) <= set(SHIPPED)


def test_a_classifier_has_no_set_to_be_checked():
    c = card(f"{NAME}-classifier")
    assert "no hash" in result(c.verify(), "open data").evidence and result(c, "open data").result == "partial"


def test_a_card_without_files_cannot_be_checked():
    with pytest.raises(ValueError, match="not at hand"): PAPER_CARD.verify()


def test_nothing_is_rewritten(tmp_path):
    path = changed(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    str(card(path).verify()), card(path).model_card(), card(path).flat()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def entries(df, notes, study): return {e.name: e for e in study_entries(df, notes, study, "x.csv", package_facts())}


def stamped(name, **record):
    "Results of a study as if its engine had measured them with this record."
    df = results(name).assign(provenance="now", inputs="0"*16, seconds=1.)
    notes = dict(command="rulediff study x", sha256="c"*64, provenance=dict(now=FULL | record))
    return entries(df, notes, find_study(name))


def test_a_study_of_today_has_what_its_engine_records():
    got = stamped("sweep")
    assert {k for k, e in got.items() if e.result == "yes"} >= set(VARIABLES) - {"affiliation", "splits", "setup"}
    assert stamped("sweep", dirty=True)["open code"].result == "partial"
    assert stamped("sweep", revision="not a git checkout")["open code"].result == "no"
    assert stamped("sweep", threads=None)["hardware"].evidence.endswith("missing: threads")


def test_one_machine_of_two_without_a_record_is_seen():
    df = results("curves").assign(inputs="0"*16, seconds=1., provenance="now")
    df.loc[0, "provenance"] = "lost"
    got = {k: e.result for k, e in entries(df, dict(provenance=dict(now=FULL)), find_study("curves")).items()}
    assert got["hardware"] == got["software versions"] == "partial" and got["open code"] == "no" and got["research type"] == "partial"


def test_lines_without_stamps_or_seconds_are_seen():
    df = results("curves").assign(inputs="0"*16, seconds=1., provenance="now")
    def of(df): return {k: e.evidence for k, e in entries(df, dict(provenance=dict(now=FULL)), find_study("curves")).items()}
    assert "inputs" not in of(df)["open data"] and "seconds" not in of(df)["hardware"]
    df.loc[3, ["inputs", "seconds"]] = None
    assert "inputs" in of(df)["open data"] and "missing: seconds" in of(df)["hardware"]


def test_a_row_of_several_lines_took_its_seconds_once():
    df = results("curves").assign(seconds=10.)
    study, n = find_study("curves"), len(df)
    assert study_more(df.assign(inputs=[f"{i:016}" for i in range(n)]), study)["runtime"] == f"{10*n} s of measuring"
    assert study_more(df.assign(inputs=[f"{i//2:016}" for i in range(n)]), study)["runtime"] == f"{10*((n + 1)//2)} s of measuring"
    assert study_more(df.assign(inputs=None), study)["runtime"] == f"{10*n} s of measuring"


def test_columns_of_the_setup_that_are_missing_are_named():
    def of(df): return entries(df, dict(command="x"), find_study("curves"))["setup"]
    whole = results("curves").assign(eta=1.)
    assert of(whole).result == "yes" and of(whole.drop(columns=["eta", "nfe"])).evidence.endswith("missing: nfe")
    for gone in ("eta", "label", "seed"): assert of(whole.drop(columns=gone)).evidence.endswith(f"missing: {gone}")
    assert of(whole.drop(columns=["images"])).result == "partial"


def test_an_empty_table_is_theory():
    got = entries(results("curves")[:0], {}, find_study("curves"))["research type"]
    assert got.result == "no" and got.evidence.startswith("theoretical")


def test_seeds_of_a_plan():
    def seeds(name): return study_seeds(find_study(name), results(name))
    training, evaluation = seeds("sweep")
    assert training and evaluation == set(results("sweep").seed) and not training & evaluation
    assert seeds("curves")[1] is None, "the seed of a run is that of its training"
    assert seeds("certificate")[0] == set() and seeds("pixels")[0] is None, "one trains nothing, the other while it measures"
    assert study_seeds(find_study("sweep"), results("sweep").drop(columns="seed"))[1] is None
    assert study_seeds(find_study("curves"), results("curves").assign(report_seed=777))[1] == {777}, "a column that measuring adds"
    assert study_seeds(None, results("sweep")) == (None, None)


def test_training_inside_of_a_measurement_is_seen():
    from rulediff_nb.classifier import fit_pixels
    from rulediff_nb.guide import Oracle
    from rulediff_nb.metrics import rule_report
    from rulediff_nb.sample import sample
    from rulediff_nb.train import Run, fit, train
    assert all(map(trains, (Run, fit, train, fit_pixels, find_study("pixels").measure)))
    assert not any(map(trains, (sample, rule_report, Oracle, find_study("curves").measure, find_study("certificate").measure)))


def test_settings_that_come_from_a_sweep():
    said = settings_chosen(find_study("guidance"), results("guidance"))
    keys, (some, every) = list(find_study("guidance").keys), (results("guidance"), results("sweep"))
    same = set(map(tuple, some[keys].values)) & set(map(tuple, every[keys].values))
    assert said.startswith(f"{len(same)} of ") and "sweep" in said and str(every.seed.iloc[0]) in said
    assert settings_chosen(find_study("sweep"), every).startswith("not stated"), "the larger table does not come from the smaller"
    assert settings_chosen(find_study("guidance"), some.assign(seed=100)).startswith("not stated"), "the same seeds are no fresh test"


def test_seeds_are_counted_by_setting():
    df = pd.DataFrame(dict(a=["x", "x", "x", "y"], b=[1, 2, 3, 1], seed=[0, 0, 1, 2]))
    assert seeds_per_setting(df, ["a"]).tolist() == [2, 1] and not len(seeds_per_setting(df.drop(columns="seed"), ["a"]))


def test_old_records_are_partial_and_named():
    said = {v: e.evidence for v, e in zip(VARIABLES, card(NAME).entries)}
    m = load_manifest(WEIGHTS, NAME)
    for variable, field in (("open code", "dirty"), ("hardware", "device"), ("software versions", "numpy")):
        assert (field in m or field in m.get("versions", {})) != (f"{field}" in said[variable].partition("missing: ")[2])


def test_a_wheel_knows_no_affiliation(tmp_path):
    here, wheel = package_facts(), package_facts(tmp_path)
    assert (wheel.url, wheel.licence) == (here.url, here.licence) and wheel.who == "the package's metadata" and "torch" in wheel.needs
    assert affiliation_entry(wheel).result == "no" and affiliation_entry(wheel).source == wheel.who
    assert code_entry([FULL], wheel, "x").result == "yes"


@pytest.mark.parametrize("authors,want", [("[{name: A, affiliation: U}]", "yes"), ("[{name: A, affiliation: U}, {family-names: B}]", "partial"),
                                          ("[{name: A}]", "no")])
def test_affiliations_come_from_the_citation(authors, want, tmp_path):
    text = f"cff-version: 1.2.0\nrepository-code: {package_facts().url}\nauthors: {authors}\n"
    (tmp_path/"CITATION.cff").write_text(text)
    found = affiliation_entry(package_facts(tmp_path))
    assert found.result == want and found.source == "CITATION.cff"
    (tmp_path/"CITATION.cff").write_text(text.replace("repository-code", "url"))
    assert affiliation_entry(package_facts(tmp_path)).result == "no", "another package's file"


def test_licence_and_address():
    facts = package_facts()
    assert code_entry([FULL], facts, "x").result == "yes" and code_entry([], facts, "x").result == "no"
    for bad in (facts._replace(licence="secret"), facts._replace(url="")): assert code_entry([FULL], bad, "x").result == "no"


def absolute(text): return [m[0] for m in PATH.finditer(text)] + [p for p in (str(ROOT), str(Path.home())) if p in text]


@pytest.mark.parametrize("name", [s.name for s in subjects()])
def test_no_absolute_path_is_printed(name):
    c = card(name)
    text = str(c) + json.dumps(c.to_dict()) + c._repr_html_() + (str(c.model_card()) if c.subject.kind != "study" else "")
    assert not absolute(text)


def test_no_absolute_path_of_ones_own_folder_is_printed(tmp_path, monkeypatch):
    path = changed(tmp_path)
    assert str(tmp_path) not in str(card(path).model_card()) + json.dumps(card(path).to_dict())
    monkeypatch.setattr(module, "_shown", str)
    assert absolute(str(card(path).model_card())), "the check sees one"


@pytest.mark.parametrize("name", [NAME, f"{NAME}-classifier", f"{NAME}-regressor"])
def test_a_model_card_is_read_back(name, tmp_path):
    c = card(name)
    c.model_card().save(tmp_path/"README.md")
    read = ModelCard.load(tmp_path/"README.md")
    report = load_manifest(c.subject.folder, name)["report"]
    want = {k: v["value"] for k, v in report["rows"].items()} if "rows" in report else report
    assert {r.metric_name: r.metric_value for r in read.data.eval_results} == {k: pytest.approx(v, abs=1e-6) for k, v in want.items()}
    assert read.data.license == "apache-2.0" and read.data.library_name == "rulediff_nb" and read.data.model_name == name
    assert all(f"| {e.name} | {e.result} |" in read.text for e in c.entries) and read.text.count("```") == 2


def test_a_model_card_needs_no_template_engine(tmp_path):
    code = ("import sys; sys.modules['jinja2'] = None\nfrom rulediff_nb.card import card\n"
            f"sys.stdout.write(str(card({NAME!r}).model_card())[:3])")
    r = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean_env(), capture_output=True, text=True, check=True)
    assert r.stdout == "---"


def test_the_usage_of_a_model_card_runs(tmp_path):
    for name in (NAME, f"{NAME}-classifier"):
        code = re.search(r"```python\n(.*?)\n```", card(name).model_card().text, re.S)[1].replace("steps=50", "steps=1").replace("n=8", "n=1")
        exec(code, {})


def test_a_study_has_no_model_card():
    for c in (card("guidance"), PAPER_CARD):
        with pytest.raises(ValueError, match="about weights"): c.model_card()


def test_all_that_ships_has_a_card():
    df = cards()
    assert set(df.name) == set(list_releases(WEIGHTS)) | set(list_releases(CLASSIFIER_WEIGHTS)) | set(table_names())
    assert list(df) == ["name", "kind", *VARIABLES] and set(df[list(VARIABLES)].to_numpy().ravel()) <= {"yes", "partial", "no"}


@pytest.mark.parametrize("name", [NAME, f"{NAME}-regressor", "guidance", "certificate"])
def test_forms_of_a_card(name):
    c = card(name)
    assert json.loads(json.dumps(c.to_dict())) == c.to_dict() and c.to_dict()["missing"] == list(c.missing)
    assert all(isinstance(v, str) and re.fullmatch(r"[\w./-]+", k) and len(v) < 6000 for k, v in c.flat().items())
    lines = str(c).splitlines()
    assert lines[0].startswith(f"{name}: ") and all(any(line.startswith(f"{e.name} ") for line in lines) for e in c.entries)
    assert max(map(len, lines)) <= 120 and repr(c) == f"Card({lines[0]})"
    html = c._repr_html_()
    assert html.count("<tr") == 1 + len(VARIABLES) + len(c.more) and "&lt;a href" not in html and "..." not in html


def test_parameters_are_those_of_the_network():
    assert card(NAME).more["parameters"] == f"{load_pretrained('two_squares').num_parameters():,}"


def test_more_lines_are_those_of_the_checklists():
    for name in (NAME, "guidance"):
        words = " ".join(card(name).more)
        assert all(w in words for w in ("runtime", "parameters", "seeds", "images evaluated", "intervals", "choice of settings"))


def test_cards_side_by_side():
    df = compare(PAPER_CARD, card(NAME))
    assert list(df.index) == list(VARIABLES) and list(df) == ["Han et al. 2025", NAME]
    assert df["Han et al. 2025"].tolist() == ["yes", "yes", "no", "no", "yes", "yes", "yes", "no", "yes"]
    assert "automatic reader" in str(PAPER_CARD)
    with pytest.raises(ValueError): compare()


def test_names():
    assert card(WEIGHTS/f"{NAME}.json") == card(NAME) == card(str(WEIGHTS/f"{NAME}.json"))
    assert card(RESULTS/"guidance.json").entries == card("guidance").entries
    with pytest.raises(ValueError, match="did you mean 'guidance'"): card("guidanse")
    with pytest.raises(ValueError, match="two_squares-fixed"): card("nothing of the kind")


@pytest.mark.parametrize("text,said", [(None, "no file"), ("{", "not JSON"), ("[]", "neither"), ("{}", "neither")])
def test_files_that_are_no_results(text, said, tmp_path):
    path = tmp_path/"x.json"
    if text is not None: write_atomic(path, text.encode())
    with pytest.raises(StoreError, match=said): card(path)


def test_a_card_has_nine_known_entries():
    good = PAPER_CARD.entries
    for bad in (good[1:], good[::-1], (good[0]._replace(result="maybe"), *good[1:])):
        with pytest.raises(ValueError): Card("x", bad, {})
    assert Card("x", tuple(Entry(*e) for e in good), {}).missing == PAPER_CARD.missing


def test_the_readers_own_study_has_a_card(tmp_path):
    s = find_study("curves")
    STUDIES["mine"] = dataclasses.replace(s, name="mine", measure=private)
    try:
        path = copied("curves", tmp_path)
        said = json.loads(path.read_text()) | dict(study="mine")
        (tmp_path/"mine.json").write_text(json.dumps(said))
        (tmp_path/"curves.csv").rename(tmp_path/"mine.csv")
        c = card(tmp_path/"mine.json")
        assert c.name == "mine" and result(c, "pseudocode").result == "no" and result(c, "research type").result == "yes"
    finally: del STUDIES["mine"]

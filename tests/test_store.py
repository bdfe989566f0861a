"Files are whole or refused by name: crashes, full disks, flipped bytes, foreign and dangerous files, changed manifests."
import errno
import json
import os
import pickle
import socket
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from rulediff_nb import store
from rulediff_nb.store import (
    StoreError,
    check_file,
    check_folder,
    check_json,
    check_release,
    content_hash,
    list_releases,
    load_manifest,
    load_release,
    load_tensors,
    open_network,
    read_file,
    save_release,
    save_tensors,
    sha256,
    write_atomic,
)

TENSORS = dict(w=torch.linspace(-1, 1, 60).view(3, 4, 5), b=torch.arange(7), h=torch.ones(3).half(), z=torch.tensor(2.5))
META = dict(step=3, recipe=dict(lr=.1, name="ä"), list=[1, None, True])


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def litter(folder): return sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture
def path(tmp_path): return save_tensors(tmp_path/"a.safetensors", TENSORS, META)


# ---------------------------------------------------------------- round trips

def test_round_trip(path):
    tensors, meta = load_tensors(path)
    assert same(tensors, TENSORS) and meta == META and litter(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                                   torch.int8, torch.uint8, torch.bool])
def test_every_type_of_number(dtype, tmp_path):
    t = dict(x=(torch.arange(12).view(3, 4) % 3).to(dtype), empty=torch.zeros(0, 3, dtype=dtype), one=torch.ones((), dtype=dtype))
    assert same(load_tensors(save_tensors(tmp_path/"x", t, {}))[0], t)


@pytest.mark.parametrize("tensors", [{}, {"": torch.ones(2)}, {"a.b|c": torch.ones(2)}])
def test_odd_dictionaries(tensors, tmp_path): assert same(load_tensors(save_tensors(tmp_path/"x", tensors, {}))[0], tensors)


def test_any_memory_layout(tmp_path):
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    t = dict(last=x.to(memory_format=torch.channels_last), turned=x.transpose(0, 3), part=x[:, ::2], wide=x[:1].expand(3, -1, -1, -1),
             grad=x.clone().requires_grad_())
    assert same(load_tensors(save_tensors(tmp_path/"x", t, {}))[0], {k: v.detach() for k, v in t.items()})


def test_nan_and_infinity_come_back_bit_by_bit(tmp_path):
    x = torch.tensor([float("nan"), float("inf"), -0., 1e-45])
    y = load_tensors(save_tensors(tmp_path/"x", dict(x=x), {}))[0]["x"]
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_the_file_is_the_same_each_time(tmp_path):
    a, b = (save_tensors(tmp_path/k, dict(sorted(TENSORS.items(), reverse=k == "b")), META).read_bytes() for k in "ab")
    assert sha256(a) == sha256(b) or load_tensors(tmp_path/"a")[1] == load_tensors(tmp_path/"b")[1]
    assert content_hash(TENSORS, META) == content_hash(dict(reversed(TENSORS.items())), dict(reversed(META.items())))


@pytest.mark.parametrize("tensors,meta", [
    (TENSORS | dict(w=TENSORS["w"] + 1e-7), META), (TENSORS | dict(w=TENSORS["w"].view(4, 3, 5)), META), (TENSORS, META | dict(step=4)),
    ({("v" if k == "w" else k): v for k, v in TENSORS.items()}, META), (TENSORS | dict(b=TENSORS["b"].int()), META)])
def test_the_hash_sees_every_change(tensors, meta): assert content_hash(tensors, meta) != content_hash(TENSORS, META)


def test_folders_are_made(tmp_path): assert write_atomic(tmp_path/"a"/"b"/"c.txt", b"x").read_bytes() == b"x"


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0])
def test_the_umask_says_who_may_read_what_is_written(umask, tmp_path):
    before = os.umask(umask)
    try: paths = [write_atomic(tmp_path/"new", b"x"), write_atomic(tmp_path/"new", b"y"), save_tensors(tmp_path/"t", TENSORS, META)]
    finally: os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths} == {0o666 & ~umask}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush(code, tmp_path, monkeypatch):
    def refuse(fd): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(store.os, "fsync", refuse)
    assert write_atomic(tmp_path/"x", b"x").read_bytes() == b"x" and litter(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["chmod", "fchmod", "link", "symlink", "rename"])
def test_calls_that_a_file_system_may_lack_are_not_needed(call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, call, full, raising=False)
    assert write_atomic(tmp_path/"x", b"x").read_bytes() == b"x"
    assert save_release(tmp_path, "w", dict(w=torch.ones(2)), dict(recipe={}))["bytes"] > 0


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks(code, tmp_path, monkeypatch):
    def refuse(*args): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(store.fcntl, "flock", refuse)
    assert save_release(tmp_path, "w", dict(w=torch.ones(2)), dict(recipe={})) == load_manifest(tmp_path, "w")


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    name = "\u00e4"*125 + ".csv"
    assert write_atomic(tmp_path/name, b"x").read_bytes() == b"x" and litter(tmp_path) == [name]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path/"real").mkdir()
    (tmp_path/"link").symlink_to("real/file")
    for blob in (b"1", b"2"): assert write_atomic(tmp_path/"link", blob).read_bytes() == blob == (tmp_path/"real"/"file").read_bytes()
    assert (tmp_path/"link").is_symlink() and litter(tmp_path/"real") == ["file"]


def test_an_error_without_a_number_is_said_in_its_own_words(tmp_path, monkeypatch):
    def odd(*args): raise OSError("the network drive is gone")
    monkeypatch.setattr(store.os, "replace", odd)
    with pytest.raises(StoreError, match="x: the network drive is gone; what"): write_atomic(tmp_path/"x", b"x")


# ---------------------------------------------------------------- what cannot be stored is refused

NOT_JSON = {"numpy": np.int64(3), "small": np.float32(.5), "array": np.ones(2), "tensor": torch.ones(2), "nan": float("nan"),
            "np nan": np.float64("nan"), "inf": [1, -float("inf")], "path": Path("x"), "set": {1},
            "bytes": b"x", "key": {3: 4}, "deep": dict(a=[dict(b=np.bool_(True))])}


@pytest.mark.parametrize("how", NOT_JSON)
def test_what_json_cannot_hold_is_named(how, tmp_path):
    words = {"key": r"extra\.x has the key 3", "inf": r"extra\.x\[1\] is -inf", "deep": r"extra\.x\.a\[0\]\.b is of type bool"}
    extra = dict(extra=dict(x=NOT_JSON[how]))
    for write in (lambda: save_tensors(tmp_path/"x", TENSORS, extra), lambda: save_release(tmp_path, "x", TENSORS, dict(recipe={}, **extra))):
        with pytest.raises((TypeError, ValueError), match=words.get(how, r"extra\.x is ")): write()
    assert litter(tmp_path) == []


def test_what_json_can_hold():
    v = dict(a=[1, 2.5, None, True, "x", (1, 2)], b=dict(c=np.float64(.5)), d=2**80)
    assert check_json(v, "it") is v


@pytest.mark.parametrize("value", [None, 3, np.ones(2), [1.]])
def test_what_is_no_tensor_is_named(value, tmp_path):
    for write in (lambda t: save_tensors(tmp_path/"x", t, {}), lambda t: save_release(tmp_path, "x", t, dict(recipe={}))):
        with pytest.raises(TypeError, match="'w' must be a tensor"): write(dict(w=value))


def test_tensors_that_share_memory_are_stored(tmp_path):
    w = torch.arange(12.).view(3, 4)
    t = dict(a=w, tied=w, part=w[1:], turned=w.T)
    assert same(load_tensors(save_tensors(tmp_path/"x", t, {}))[0], t)
    save_release(tmp_path, "w", t, dict(recipe={}))
    assert same(load_release(tmp_path, "w")[0], {k: v.half() for k, v in t.items()})


def test_a_release_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="must say the 'recipe'"): save_release(tmp_path, "x", TENSORS, dict(seed=0))
    assert litter(tmp_path) == []


# ---------------------------------------------------------------- places, before any work

def odd_places(folder):
    "Everything that is no file."
    (folder/"folder").mkdir(), os.mkfifo(folder/"pipe"), (folder/"loop").symlink_to("loop")
    (folder/"dangling").symlink_to("nowhere"), (folder/"tty").symlink_to("/dev/null"), (folder/"text").write_text("x")
    with socket.socket(socket.AF_UNIX) as s: s.bind(str(folder/"socket"))
    return [folder/k for k in ("folder", "pipe", "loop", "dangling", "tty", "socket", "none", "text/none")]


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    for p in odd_places(tmp_path):
        for read in (read_file, load_tensors):
            with pytest.raises(StoreError, match=str(p)): read(p)
        os.symlink(p, tmp_path/"w.json"), os.symlink(p, tmp_path/"w.safetensors")
        for read in (load_manifest, load_release):
            with pytest.raises(StoreError, match="w.json"): read(tmp_path, "w")
        os.unlink(tmp_path/"w.json"), os.unlink(tmp_path/"w.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
def test_a_place_for_a_file(tmp_path):
    bad = {p.name: p for p in odd_places(tmp_path)}
    words = dict(folder="a folder, wanted a file", pipe="a pipe", socket="a socket", tty="a device", loop="cannot write .*loop: Too many")
    for name, word in words.items():
        with pytest.raises(StoreError, match=word): check_file(bad[name])
    with pytest.raises(StoreError, match="cannot"): check_file(tmp_path/"text"/"none")
    before = litter(tmp_path)
    for good in ("none", "text", "dangling"): assert check_file(tmp_path/good) == tmp_path/good and litter(tmp_path) == before
    assert check_file(tmp_path/"new"/"more"/"x") == tmp_path/"new"/"more"/"x" and not (tmp_path/"new").exists()
    assert (tmp_path/"text").read_text() == "x"
    for end in ("json", "safetensors"):
        (tmp_path/f"w.{end}").mkdir()
        with pytest.raises(StoreError, match=f"w.{end}: it is a folder"): check_release(tmp_path, "w")
        (tmp_path/f"w.{end}").rmdir()


def test_a_protected_file_is_left_alone(tmp_path, monkeypatch):
    path = write_atomic(tmp_path/"x", b"x")
    monkeypatch.setattr(store.os, "access", lambda p, how: False)
    with pytest.raises(StoreError, match="x: it is write-protected"): check_file(path)
    assert check_file(tmp_path/"y") == tmp_path/"y"


def test_a_folder_is_looked_at_by_several_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(check_folder, [tmp_path/"d"]*200)) == {tmp_path/"d"}
    assert litter(tmp_path/"d") == []
    (tmp_path/"f").write_text("")
    with pytest.raises(StoreError, match="cannot write to"): check_folder(tmp_path/"f")


def test_two_writers_leave_one_release(tmp_path):
    "Weights and manifest belong together, whoever was last."
    def write(k):
        for _ in range(10): save_release(tmp_path, "w", dict(w=torch.full((5000,), float(k))), dict(recipe={}, k=k))
    with ThreadPoolExecutor(4) as pool: list(pool.map(write, range(4)))
    tensors, manifest = load_release(tmp_path, "w")
    assert (tensors["w"] == manifest["k"]).all() and litter(tmp_path) == ["w.json", "w.safetensors"]


# ---------------------------------------------------------------- crashes

def full(*args): raise OSError(errno.ENOSPC, "No space left on device")


class Crash(BaseException):
    "What no `except Exception` catches: a signal, say."


def crash(*args): raise Crash


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
@pytest.mark.parametrize("fail,error", [(full, StoreError), (crash, Crash)])
def test_a_failed_write_leaves_the_old_file(call, fail, error, path, monkeypatch):
    old = path.read_bytes()
    monkeypatch.setattr(store.os, call, fail)
    with pytest.raises(error) as e: save_tensors(path, dict(w=torch.zeros(9)), {})
    monkeypatch.undo()
    assert path.read_bytes() == old and litter(path.parent) == [path.name]
    assert error is Crash or str(path) in str(e.value) and "No space" in str(e.value)


@pytest.mark.parametrize("at", [0, 1, 1000])
def test_a_disk_that_fills_up(at, path, monkeypatch):
    old, plain = path.read_bytes(), os.fdopen

    class Disk:
        def __init__(self, fd): self.f = plain(fd, "wb")
        def __enter__(self): return self
        def __exit__(self, *args): self.f.close()
        def write(self, blob): self.f.write(blob[:at]), full()
        def flush(self): self.f.flush()
        def fileno(self): return self.f.fileno()
    monkeypatch.setattr(store.os, "fdopen", lambda fd, mode: Disk(fd))
    with pytest.raises(StoreError, match="No space.*untouched"): write_atomic(path, b"x"*2000)
    assert path.read_bytes() == old and litter(path.parent) == [path.name]


def test_a_first_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(StoreError): write_atomic(tmp_path/"new", b"x")
    assert litter(tmp_path) == []


def test_the_content_is_on_disk_before_it_is_moved(tmp_path, monkeypatch):
    order = []

    def noted(k, f): return lambda *args: order.append(k) or f(*args)
    for k in ("fsync", "replace"): monkeypatch.setattr(store.os, k, noted(k, getattr(os, k)))
    write_atomic(tmp_path/"x", b"x")
    assert order == ["fsync", "replace"]


def test_a_folder_that_is_a_file(path):
    with pytest.raises(StoreError, match="cannot write"): write_atomic(path/"b", b"x")


def test_a_file_that_is_a_folder(tmp_path):
    (tmp_path/"d"/"e").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot write"): write_atomic(tmp_path/"d", b"x")
    assert litter(tmp_path) == ["d"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_rights(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="Permission"): write_atomic(tmp_path/"x", b"x")
    finally: tmp_path.chmod(0o755)


def test_a_folder_that_refuses(tmp_path, monkeypatch):
    def refuse(*args, **kw): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(store.os, "open", refuse)
    with pytest.raises(StoreError, match="cannot write to .*Permission denied"): write_atomic(tmp_path/"x", b"x")


# ---------------------------------------------------------------- damage

def refused(path, blob):
    "The file with this content is refused, by name."
    path.write_bytes(blob)
    with pytest.raises(StoreError) as e: load_tensors(path)
    assert str(path) in str(e.value)
    return str(e.value)


def test_every_flipped_byte_is_noticed(path):
    blob = path.read_bytes()
    places = set(range(0, len(blob), 7)) | set(range(16)) | set(range(len(blob) - 16, len(blob)))
    for i in sorted(places): refused(path, blob[:i] + bytes([blob[i] ^ 0x41]) + blob[i + 1:])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_is_noticed(path, data):
    path = save_tensors(path, TENSORS, META)
    blob = bytearray(path.read_bytes())
    i = data.draw(st.integers(0, len(blob) - 1))
    blob[i] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(blob))
    try: tensors, meta = load_tensors(path)
    except StoreError as e: assert str(path) in str(e)
    else: assert same(tensors, TENSORS) and meta == META   # white space in the header may change; nothing that is returned


def test_every_truncation_is_noticed(path):
    blob = path.read_bytes()
    for n in [*range(0, 64), *range(64, len(blob), 31), len(blob) - 1]: refused(path, blob[:n])


def test_what_is_appended_is_noticed(path): refused(path, path.read_bytes() + b"x")


def test_a_changed_description_is_noticed(path):
    blob = path.read_bytes()
    assert b'\\"step\\": 3' in blob
    assert "sha256" in refused(path, blob.replace(b'\\"step\\": 3', b'\\"step\\": 4'))


@pytest.mark.parametrize("meta", [None, dict(format="pt"), dict(meta="{}"), dict(sha256="0"*64)])
def test_foreign_safetensors_are_named(meta, tmp_path):
    save_file(dict(w=torch.ones(3)), tmp_path/"f", metadata=meta)
    with pytest.raises(StoreError, match="not written by rulediff_nb"): load_tensors(tmp_path/"f")


@pytest.mark.parametrize("text", ["{", "nonsense", "", "[1]", "3", '"x"', "null"])
def test_a_description_that_is_no_dictionary(text, tmp_path):
    t = dict(w=torch.ones(3))
    try: h = content_hash(t, json.loads(text))
    except ValueError: h = "0"*64
    (tmp_path/"f").write_bytes(save(t, metadata=dict(meta=text, sha256=h)))
    try: _, meta = load_tensors(tmp_path/"f")
    except StoreError as e: assert str(tmp_path/"f") in str(e)
    else: assert not isinstance(meta, dict) and json.dumps(meta) == text   # whole, and for the caller to scorer


@pytest.mark.parametrize("blob", [b"", b"x", b"\xff\xfe\xfd"*100, "über".encode("utf-16"), b"{}", b"\0"*64, b"\xff"*64,
                                  (20).to_bytes(8, "little") + b'{"__metadata__": 3} ', (2**62).to_bytes(8, "little") + b"{}",
                                  (4).to_bytes(8, "little") + b"\xff\xff\xff\xff"])
def test_what_is_no_safetensors_file(blob, tmp_path): refused(tmp_path/"f", blob)


class Bomb:
    def __reduce__(self): return Path.touch, (Path(BOMB),)


BOMB = None


@pytest.mark.parametrize("how", ["pickle", "torch", "zip"])
def test_nothing_is_unpickled(how, tmp_path):
    global BOMB
    BOMB, path = str(tmp_path/"went-off"), tmp_path/"f.safetensors"
    if how == "pickle": path.write_bytes(pickle.dumps(Bomb()))
    if how == "torch": torch.save(dict(w=Bomb()), path)
    if how == "zip":
        with zipfile.ZipFile(path, "w") as z: z.writestr("data.pkl", pickle.dumps(Bomb()))
    assert "not a whole safetensors file" in refused(path, path.read_bytes())
    assert litter(tmp_path) == ["f.safetensors"]


def test_the_bomb_is_live(tmp_path):
    global BOMB
    BOMB = str(tmp_path/"went-off")
    pickle.loads(pickle.dumps(Bomb()))
    assert litter(tmp_path) == ["went-off"]


@pytest.mark.parametrize("name", ["missing", ".", "folder"])
def test_what_is_not_there(name, tmp_path):
    (tmp_path/"folder").mkdir()
    with pytest.raises(StoreError, match="no file"): load_tensors(tmp_path/name)


# ---------------------------------------------------------------- releases

@pytest.fixture
def folder(tmp_path):
    save_release(tmp_path, "w-fixed", dict(w=torch.linspace(-1, 1, 50), n=torch.arange(3)), dict(recipe=dict(lr=1), seed=0))
    return tmp_path


def test_release_round_trip(folder):
    tensors, manifest = load_release(folder, "w-fixed")
    assert list_releases(folder) == ["w-fixed"] and litter(folder) == ["w-fixed.json", "w-fixed.safetensors"]
    assert tensors["w"].dtype == torch.float16 and torch.equal(tensors["w"], torch.linspace(-1, 1, 50).half())
    assert torch.equal(tensors["n"], torch.arange(3))
    assert manifest["bytes"] == (folder/"w-fixed.safetensors").stat().st_size and manifest["recipe"] == dict(lr=1)
    assert manifest["sha256"] == sha256((folder/"w-fixed.safetensors").read_bytes()) and manifest == load_manifest(folder, "w-fixed")


def test_release_names_the_hashes(folder):
    f = folder/"w-fixed.safetensors"
    blob, want = f.read_bytes(), load_manifest(folder, "w-fixed")["sha256"]
    for i in range(0, len(blob), 11):
        bad = blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1:]
        f.write_bytes(bad)
        with pytest.raises(StoreError) as e: load_release(folder, "w-fixed")
        assert all(v in str(e.value) for v in (str(f), sha256(bad), want))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"sha256": "x"}', '{"recipe": {}}', "\x00", "null"])
def test_a_damaged_manifest(text, folder):
    (folder/"w-fixed.json").write_text(text)
    for f in (load_manifest, load_release):
        with pytest.raises(StoreError, match="w-fixed.json"): f(folder, "w-fixed")


@pytest.mark.parametrize("blob", [b"\xff\xfe\x80", b"["*100_000, b'{"sha256": "x", "recipe": {}, "seed": NaN}'])
def test_a_manifest_that_is_no_text(blob, folder):
    (folder/"w-fixed.json").write_bytes(blob)
    with pytest.raises(StoreError, match="w-fixed.json is not JSON"): load_manifest(folder, "w-fixed")


@pytest.mark.parametrize("error", [AttributeError("no lr"), KeyError("lr"), RuntimeError(""), TypeError("what"), ValueError("two\nlines")])
def test_a_recipe_that_no_network_follows_is_named(error, folder):
    def make(recipe): raise error
    with pytest.raises(StoreError, match=r"w-fixed.safetensors does not fit the recipe in its manifest: .") as e:
        open_network(folder, "w-fixed", make)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["0"*64, "", None, 3])
def test_a_manifest_with_another_hash(value, folder):
    f = folder/"w-fixed.json"
    said = json.loads(f.read_text()) | dict(sha256=value)
    f.write_text(json.dumps(said | dict(manifest_sha256=store._seal(said))))
    with pytest.raises(StoreError, match="damaged"): load_release(folder, "w-fixed")


def test_a_manifest_that_was_edited_is_refused(folder):
    f = folder/"w-fixed.json"
    said = json.loads(f.read_text())
    for changed in (said | dict(seed=7), {k: v for k, v in said.items() if k != "manifest_sha256"}, said | dict(recipe=dict(x=1))):
        f.write_text(json.dumps(changed))
        with pytest.raises(StoreError, match="w-fixed.json was changed: found manifest_sha256"): load_manifest(folder, "w-fixed")


@pytest.mark.parametrize("gone,word", [("w-fixed.json", "no manifest"), ("w-fixed.safetensors", "no file")])
def test_half_a_release(gone, word, folder):
    (folder/gone).unlink()
    with pytest.raises(StoreError, match=word): load_release(folder, "w-fixed")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_manifest_holds_no_nan(value, tmp_path):
    with pytest.raises(ValueError): save_release(tmp_path, "x", dict(w=torch.ones(2)), dict(recipe={}, report=value))
    assert litter(tmp_path) == []


def test_no_releases(tmp_path): assert list_releases(tmp_path) == [] == list_releases(tmp_path/"missing")


def test_weights_that_half_precision_cannot_hold(tmp_path):
    "fp16 ends at 65504: a weight beyond it must not become infinity without a word."
    with pytest.raises(ValueError): save_release(tmp_path, "x", dict(w=torch.tensor([1e6])), dict(recipe={}))

"""
data/prepare.py: right tokens, clear errors, and never half a corpus.     pytest tests/test_data.py

Every test works in a copy of prepare.py in a temporary folder; nothing in the checkout is written. Tests of the real
Shakespeare text need data/shakespeare_char/input.txt in the checkout, those of BPE need tiktoken's cached files
(TIKTOKEN_CACHE_DIR) or a network, those of parquet, jsonl and txt shards need `pip install datasets`.
"""
import hashlib
import http.server
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

PREPARE = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
SHAKESPEARE = PREPARE.parent / "shakespeare_char" / "input.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs data/shakespeare_char/input.txt")
needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
TEXT = "".join(random.Random(1).choices("abc déf\n狼🐺", k=5000))  # 1- to 4-byte characters


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(PREPARE, folder)
    return folder


@pytest.fixture
def script(data):
    """The copy, imported: faster than a process, and its constants can be changed."""
    return load(data)


@pytest.fixture(scope="session")
def bpe():
    tiktoken = pytest.importorskip("tiktoken")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:
        pytest.skip(f"tiktoken cannot load gpt2 ({type(e).__name__})")


def load(data):
    spec = importlib.util.spec_from_file_location("prepare_copy", data / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.BACK_OFF == (1, 2, 4) and module.SHAKESPEARE_URL.startswith("https://")
    module.BACK_OFF = (0, 0, 0)
    return module


def run(data, *args, **kwargs):
    return subprocess.run([sys.executable, data / "prepare.py", *map(str, args)], capture_output=True, encoding="utf-8",
                          timeout=120, **kwargs)


def one_line(stderr, *parts):
    """The only thing on stderr is one sentence: what is wrong; what to do."""
    assert re.fullmatch(r"error: [^\n]+; [^\n]+\n", stderr), stderr
    for part in parts:
        assert part in stderr, stderr


def fails(result, *parts):
    assert result.returncode == 1, result
    one_line(result.stderr, *parts)


def left(data):
    """Every file and folder beside prepare.py."""
    found = (path.relative_to(data).as_posix() for path in data.rglob("*") if "__pycache__" not in path.parts)
    return sorted(set(found) - {"prepare.py"})


FILES = ["meta.json", "train.bin", "val.bin"]


def read(folder):
    """meta.json and both splits, which must fit together."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    train, val = (np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val"))
    assert (folder / "train.bin").stat().st_size == 2 * meta["train_tokens"] and meta["train_tokens"] == len(train) > 1
    assert (folder / "val.bin").stat().st_size == 2 * meta["val_tokens"] and meta["val_tokens"] == len(val) > 1
    assert max(train.max(), val.max()) < meta["vocab_size"]
    assert set(meta) - {"alphabet"} == {"tokenizer", "vocab_size", "train_tokens", "val_tokens", "source", "sha256"}
    assert ("alphabet" in meta) == (meta["tokenizer"] == "char")
    return meta, train, val


def decode(meta, ids):
    return "".join(map(meta["alphabet"].__getitem__, ids.tolist()))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---- tiny Shakespeare ----------------------------------------------------------------------------------------------------

@needs_shakespeare
def test_shakespeare_char(data):
    (data / "shakespeare_char").mkdir()
    shutil.copy(SHAKESPEARE, data / "shakespeare_char")
    result = run(data, "shakespeare_char")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ("shakespeare_char: 1,003,854 training and 111,540 validation tokens in "
                             f"{(data / 'shakespeare_char').resolve()}\n")
    meta, train, val = read(data / "shakespeare_char")
    text = SHAKESPEARE.read_bytes().decode("utf-8")
    assert (len(train), len(val)) == (1_003_854, 111_540)
    assert meta["tokenizer"] == "char" and meta["vocab_size"] == 65 and meta["alphabet"] == "".join(sorted(set(text)))
    assert decode(meta, train) + decode(meta, val) == text
    assert meta["sha256"] == sha256(text.encode()) and meta["source"].startswith("https://")
    assert left(data / "shakespeare_char") == sorted([*FILES, "input.txt"])


@needs_shakespeare
@pytest.mark.parametrize("place", ["shakespeare", "shakespeare_char"])
def test_shakespeare_bpe(data, script, bpe, place, capsys):
    (data / place).mkdir()
    shutil.copy(SHAKESPEARE, data / place)
    assert script.main(["shakespeare"]) == 0
    meta, train, val = read(data / "shakespeare")
    assert (len(train), len(val)) == (301_966, 36_059)
    assert meta["tokenizer"] == "gpt2" and meta["vocab_size"] == 50_257
    text = SHAKESPEARE.read_bytes().decode("utf-8")
    assert bpe.decode(train.tolist()) == text[:1_003_854] and bpe.decode(val.tolist()) == text[1_003_854:]
    assert left(data) == sorted([place + "/input.txt", *{place, "shakespeare"}, *("shakespeare/" + file for file in FILES)])


@pytest.mark.parametrize("corpus", ["shakespeare_char", "shakespeare"])
def test_a_wrong_input_is_refused_and_kept(data, script, corpus, request, capsys):
    if corpus == "shakespeare":
        request.getfixturevalue("bpe")
    mine = data / corpus / "input.txt"
    mine.parent.mkdir()
    mine.write_bytes(b"not Shakespeare\r\n")
    assert script.main([corpus]) == 1
    one_line(capsys.readouterr().err, str(mine), sha256(mine.read_bytes())[:8], "86c4e6aa", "--text FILE")
    assert mine.read_bytes() == b"not Shakespeare\r\n"
    assert left(data) == [corpus, corpus + "/input.txt"]


# ---- downloads, from a server in this process -----------------------------------------------------------------------------

@pytest.fixture
def serve(script, monkeypatch):
    """serve(reply, ...) makes the script download from a server that gives these replies, the last one again and again. A reply
    is (status, body, bytes of it that are sent). Returns the list of requests."""
    monkeypatch.setenv("no_proxy", "*")
    requests, replies = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, sent = replies[min(len(requests), len(replies) - 1)]
            requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:sent])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(script, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(script, "SHAKESPEARE_SHA256", sha256(TEXT.encode()))

    def start(*new):
        replies.extend(new)
        return requests

    yield start
    server.shutdown()
    server.server_close()


GOOD = (200, TEXT.encode(), None)


def test_download(data, script, serve, capsys):
    requests = serve(GOOD)
    assert script.main(["shakespeare_char"]) == 0
    meta, train, val = read(data / "shakespeare_char")
    assert decode(meta, train) == TEXT[:4500] and decode(meta, val) == TEXT[4500:]
    assert (data / "shakespeare_char" / "input.txt").read_bytes() == TEXT.encode()
    assert left(data / "shakespeare_char") == sorted([*FILES, "input.txt"])
    assert script.main(["shakespeare_char"]) == 0 and len(requests) == 1  # the second time from input.txt


def test_download_is_kept_for_bpe_too(data, script, serve, bpe, capsys):
    serve(GOOD)
    assert script.main(["shakespeare"]) == 0
    meta, train, val = read(data / "shakespeare")
    assert bpe.decode(train.tolist()) == TEXT[:4500] and bpe.decode(val.tolist()) == TEXT[4500:]
    assert left(data) == ["shakespeare", *sorted("shakespeare/" + file for file in [*FILES, "input.txt"])]


def test_download_is_tried_again(data, script, serve, capsys):
    requests = serve((500, b"busy", None), (503, b"busy", None), GOOD)
    assert script.main(["shakespeare_char"]) == 0 and len(requests) == 3
    read(data / "shakespeare_char")


@pytest.mark.parametrize("reply, tries, parts", [
    ((200, b"<html>log in</html>", None), 1, ["sent another file", sha256(b"<html>log in</html>")[:8], sha256(TEXT.encode())[:8]]),
    ((200, TEXT.encode(), 1000), 4, ["IncompleteRead", "1000 bytes read"]),
    ((404, b"", None), 1, ["404"]),
    ((500, b"", None), 4, ["500"]),
    ((429, b"", None), 4, ["429"]),
], ids=["wrong hash", "half a body", "404", "500", "429"])
def test_failed_download_leaves_nothing(data, script, serve, capsys, reply, tries, parts):
    requests = serve(reply)
    assert script.main(["shakespeare_char"]) == 1
    one_line(capsys.readouterr().err, *parts, str(data / "shakespeare_char" / "input.txt"))
    assert len(requests) == tries
    assert left(data) == []


def test_no_network_leaves_nothing(data, script, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(script, "SHAKESPEARE_URL", f"http://127.0.0.1:{port}/input.txt")
    assert script.main(["shakespeare_char"]) == 1
    out, err = capsys.readouterr()
    one_line(err, "could not download")
    assert out.count("trying again") == 3
    assert left(data) == []


# ---- a text of one's own ---------------------------------------------------------------------------------------------------

def test_own_text_char(data, tmp_path):
    file = tmp_path / "own.txt"
    raw = TEXT.replace("\n", "\r\n").encode("utf-8")  # as an editor on Windows saves it
    file.write_bytes(raw)
    not_utf8 = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C"}  # open() without an encoding would now mean ASCII
    result = run(data, "--text", "own.txt", "--name", "mine", cwd=tmp_path, env=not_utf8)
    assert (result.returncode, result.stderr) == (0, "")
    meta, train, val = read(data / "mine")
    assert meta["alphabet"] == "".join(sorted(set(TEXT))) and meta["tokenizer"] == "char"
    assert decode(meta, train) == TEXT[:4500] and decode(meta, val) == TEXT[4500:]
    assert (meta["source"], meta["sha256"]) == ("own.txt", sha256(raw))
    assert left(data / "mine") == FILES


def test_own_text_gpt2(data, script, bpe, tmp_path, capsys):
    text = TEXT + "<|endoftext|>" + TEXT  # in a text this is ordinary text
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    assert script.main(["--text", str(tmp_path / "own.txt"), "--name=mine", "--tokenizer=gpt2"]) == 0
    meta, train, val = read(data / "mine")
    half = int(0.9 * len(text))
    assert train.tolist() == bpe.encode_ordinary(text[:half]) and val.tolist() == bpe.encode_ordinary(text[half:])
    assert meta["tokenizer"] == "gpt2" and meta["vocab_size"] == 50_257 and "alphabet" not in meta


@pytest.mark.parametrize("different", [65_536, 65_537])
def test_alphabet_must_fit_uint16(data, script, tmp_path, capsys, different):
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x20000)][:different]))
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    status = script.main(["--text", str(tmp_path / "own.txt"), "--name", "mine"])
    if different == 65_536:
        meta, train, val = read(data / "mine")
        assert status == 0 and np.concatenate((train, val)).tolist() == list(range(65_536))
    else:
        one_line(capsys.readouterr().err, "65,537", "--tokenizer gpt2")
        assert status == 1 and left(data) == []


@pytest.mark.parametrize("content, part", [
    (None, "cannot read"), (b"", "empty"), (b"a" * 50 + b"\xff\xfe", "utf-8"), (b"abcdefg", "too short"),
], ids=["missing", "empty", "not utf-8", "too short"])
def test_unusable_text(data, script, tmp_path, capsys, content, part):
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_bytes(content)
    assert script.main(["--text", str(file), "--name", "mine"]) == 1
    one_line(capsys.readouterr().err, part)
    assert left(data) == []


def test_folder_in_place_of_a_text(data, script, tmp_path, capsys):
    assert script.main(["--text", str(tmp_path), "--name", "mine"]) == 1
    one_line(capsys.readouterr().err, f"cannot read {tmp_path}")
    assert left(data) == []


# ---- the command line -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a/b", "../up", "/root", ".hidden", "..", "a b", "a\\b", "C:x", "a\n", "shakespeare_char", "stdlib"])
def test_bad_names(data, script, tmp_path, capsys, name):
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    assert script.main(["--text", str(tmp_path / "own.txt"), "--name", name]) == 1
    one_line(capsys.readouterr().err, "--name", "--help")
    assert left(data) == [] and left(tmp_path) == ["data", "data/prepare.py", "own.txt"]


@pytest.mark.parametrize("line, part", [
    ("", "shakespeare_char, shakespeare, stdlib, openwebtext"),
    ("wikipedia", "invalid choice: 'wikipedia'"),
    ("stdlib --force", "--force"),
    ("stdlib --text x.txt --name x", "either a corpus"),
    ("--text x.txt", "--name"),
    ("stdlib --tokenizer gpt2", "--tokenizer"),
    ("stdlib --max_docs 5", "--max_docs"),
    ("--text x.txt --name x --shards x.txt", "--shards"),
    ("openwebtext --max_docs 1", "2 or more"),
    ("openwebtext --max_docs many", "invalid int"),
    ("openwebtext --shards", "--shards"),
])
def test_bad_command_line(data, script, capsys, line, part):
    assert script.main(line.split()) == 1
    one_line(capsys.readouterr().err, part, "--help")
    assert left(data) == []


def test_exit_status_and_help(data):
    fails(run(data, "wikipedia"), "invalid choice")
    result = run(data, "--help")
    assert result.returncode == 0 and "--max_docs" in result.stdout


# ---- a place that cannot be written -----------------------------------------------------------------------------------------

def test_file_in_place_of_the_folder(data, script, tmp_path, capsys):
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    (data / "mine").write_text("important")
    assert script.main(["--text", str(tmp_path / "own.txt"), "--name", "mine"]) == 1
    one_line(capsys.readouterr().err, str(data / "mine"), "in the way")
    assert (data / "mine").read_text() == "important"


def test_full_disk(data, tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails half way with an OSError."""
    resource = pytest.importorskip("resource")
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    result = run(data, "--text", tmp_path / "own.txt", "--name", "mine",
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    fails(result, "File too large", "free space")
    assert left(data) == []


def test_interrupt(data, script, tmp_path, monkeypatch, capsys):
    def ctrl_c(*args):
        raise KeyboardInterrupt
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(script, "install", ctrl_c)
    assert script.main(["--text", str(tmp_path / "own.txt"), "--name", "mine"]) == 1
    one_line(capsys.readouterr().err, "interrupted")
    assert left(data) == []


# ---- never half a corpus ----------------------------------------------------------------------------------------------------

OLD, NEW = "the old text, which is all lower case\n" * 20, "THE NEW TEXT, LONGER THAN THE OLD ONE\n" * 30

KILLED_AT_RENAME = """
import os, runpy, signal, sys
rename, left = os.replace, int(sys.argv[1])
def replace(*args):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(*args)
os.replace, sys.argv = replace, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@needs_sigkill
@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("before", ["nothing", "the same", "other data"])
def test_killed_between_renames(data, script, tmp_path, capsys, renames, before):
    """The three files are moved in one after the other: whatever was there before, a reader finds no train.bin or all of one."""
    (tmp_path / "old.txt").write_text(OLD)
    (tmp_path / "new.txt").write_text(NEW)
    again = ["--text", str(tmp_path / "new.txt"), "--name", "mine"]
    if before != "nothing":
        script.main(["--text", str(tmp_path / ("new.txt" if before == "the same" else "old.txt")), "--name", "mine"])
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_RENAME, str(renames), str(data / "prepare.py"), *again])
    assert killed.returncode == -signal.SIGKILL
    if before == "the same":
        meta, train, val = read(data / "mine")  # replaced file by file, complete at every moment
        assert decode(meta, train) + decode(meta, val) == NEW
    else:
        assert not (data / "mine" / "train.bin").exists()
    # the next run succeeds, and takes the leftovers away once they are an hour old
    assert len(list((data / "mine").glob(".tmp-*"))) == 1
    for path in (data / "mine").glob(".tmp-*/*"):
        os.utime(path, (time.time() - 4000,) * 2)
    for path in (data / "mine").glob(".tmp-*"):
        os.utime(path, (time.time() - 4000,) * 2)
    assert script.main(again) == 0
    meta, train, val = read(data / "mine")
    assert decode(meta, train) + decode(meta, val) == NEW
    assert left(data / "mine") == FILES


@needs_sigkill
@pytest.mark.parametrize("moment", ["started", "writing", 0.5, 1.0])
def test_killed_while_it_works(data, moment):
    process = subprocess.Popen([sys.executable, data / "prepare.py", "stdlib"], stdout=subprocess.DEVNULL)
    pattern = {"started": "stdlib/.tmp-*", "writing": "stdlib/.tmp-*/train.bin"}.get(moment)
    if pattern:
        while not list(data.glob(pattern)) and process.poll() is None:
            time.sleep(0.001)
    else:
        time.sleep(moment)
    process.kill()
    process.wait()
    if (data / "stdlib" / "train.bin").exists():
        read(data / "stdlib")
    if pattern:
        assert process.returncode == -signal.SIGKILL and not list(data.glob("stdlib/*.bin"))


def test_two_at_once(data, tmp_path, monkeypatch, capsys):
    """A second preparation begins and ends while the first is between its tokens and its renames: both end well."""
    (tmp_path / "own.txt").write_text(NEW)
    args = ["--text", str(tmp_path / "own.txt"), "--name", "mine"]
    first, second = load(data), load(data)
    install, seen = first.install, []

    def interrupted_install(tmp, folder):
        seen.append(second.main(args))
        read(folder)  # the second's files are in place
        install(tmp, folder)

    monkeypatch.setattr(first, "install", interrupted_install)
    assert first.main(args) == 0 and seen == [0]
    meta, train, val = read(data / "mine")
    assert decode(meta, train) + decode(meta, val) == NEW
    assert left(data / "mine") == FILES


def test_processes_at_once(data, tmp_path):
    (tmp_path / "own.txt").write_text(TEXT * 40, encoding="utf-8")
    line = [sys.executable, data / "prepare.py", "--text", tmp_path / "own.txt", "--name", "mine"]
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == b"", err
    meta, train, val = read(data / "mine")
    assert decode(meta, train) + decode(meta, val) == TEXT * 40
    assert left(data / "mine") == FILES


# ---- the standard library ----------------------------------------------------------------------------------------------------

def test_stdlib(data, script, capsys):
    assert script.main(["stdlib"]) == 0
    meta, train, val = read(data / "stdlib")
    assert meta["tokenizer"] == "char" and meta["vocab_size"] == 96
    assert meta["alphabet"] == "\n" + "".join(map(chr, range(32, 127)))
    assert meta["source"] == f"Python {sys.version.split()[0]} standard library"
    train, val = decode(meta, train), decode(meta, val)
    assert len(train) + len(val) >= 10_000_000
    assert meta["sha256"] == sha256((train + val).encode())
    names = [re.findall(r"^# file: (\S+\.py)$", text, re.MULTILINE) for text in (train, val)]
    everything = sorted(names[0] + names[1])
    assert names[1] == everything[9::10] and names[0] == sorted(set(everything) - set(names[1]))
    assert {"argparse.py", "asyncio/base_events.py", "email/message.py"} <= set(everything)
    assert not [name for name in everything if re.search(r"(^|/)(tests?|idle_test|site-packages|dist-packages)/", name)]
    import argparse
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    assert f"# file: argparse.py\n{source}" in train + val


def test_stdlib_rules(data, script, tmp_path, monkeypatch, capsys):
    library = {f"m{i:02}.py": f"x = {i}\n" * 20_000 for i in range(20)}
    library["m03.py"] = "\tname = 'Ω'\r\n" + "y\n" * 9  # tab, not ASCII, the newlines of Windows
    library["m05.py"] = "z = 1\n" * 9 + "no newline at the end"
    skipped = ["test/t.py", "a/tests/t.py", "idlelib/idle_test/t.py", "site-packages/p/t.py", "dist-packages/t.py", "m.txt"]
    for name in [*library, *skipped]:
        file = tmp_path / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(library.get(name, "hidden = 1\n").encode("utf-8"))
    (tmp_path / "lib" / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path / "lib")}[name])
    assert script.main(["stdlib"]) == 0
    meta, train, val = read(data / "stdlib")
    train, val = decode(meta, train), decode(meta, val)
    assert val == "".join(f"# file: m{i:02}.py\n" + library[f"m{i:02}.py"] for i in (9, 19))
    assert train.count("# file: ") == 18 and "hidden" not in train and "caf" not in train
    assert "# file: m03.py\n    name = '?'\ny\n" in train
    assert "no newline at the end\n# file: m06.py\n" in train
    shutil.rmtree(tmp_path / "lib")
    assert script.main(["stdlib"]) == 1  # a Python without the source of its library
    one_line(capsys.readouterr().err, "hardly any Python source")


# ---- OpenWebText ---------------------------------------------------------------------------------------------------------------

DOCUMENTS = [f"document {i}: naïve 狼 <|endoftext|>" + " word" * (i % 7) for i in range(4100)]


def stream(bpe, documents):
    """What the two files must hold, by the plainest loop."""
    train, val = [], []
    for i, document in enumerate(documents):
        (val if i % 2000 == 0 else train).extend(bpe.encode_ordinary(document) + [50_256])
    return train, val


def make_shard(path, documents):
    if path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"id": range(len(documents)), "text": documents}), path, row_group_size=500)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": document, "n": 1}) + "\n" for document in documents), encoding="utf-8")
    else:
        path.write_text("".join(document + "\n" for document in documents), encoding="utf-8")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_openwebtext_shards(data, bpe, tmp_path, offline, kind):
    pytest.importorskip("datasets")
    documents = [document.replace(": ", ":\n\n") for document in DOCUMENTS] if kind != "txt" else DOCUMENTS
    empty = [""] if kind == "txt" else ["", None]  # these are no documents
    shards = [tmp_path / f"b[1]*.{kind}", tmp_path / f"a.{kind}"]  # neither sorted nor taken for patterns
    make_shard(shards[0], documents[:1999] + empty + documents[1999:2100])
    make_shard(shards[1], documents[2100:])
    result = run(data, "openwebtext", "--shards", *shards)
    assert (result.returncode, result.stderr) == (0, "")
    meta, train, val = read(data / "openwebtext")
    assert (train.tolist(), val.tolist()) == stream(bpe, documents)
    assert {**meta, "train_tokens": 0, "val_tokens": 0} == {
        "tokenizer": "gpt2", "vocab_size": 50_257, "train_tokens": 0, "val_tokens": 0, "sha256": None,
        "source": f"4100 documents of b[1]*.{kind}, a.{kind}"}
    assert left(data / "openwebtext") == FILES


def test_openwebtext_max_docs(data, bpe, tmp_path, offline):
    pytest.importorskip("datasets")
    make_shard(tmp_path / "a.parquet", DOCUMENTS[:70] + [random.Random(i).randbytes(5000).hex() for i in range(1000)])
    result = run(data, "openwebtext", "--max_docs", 70, "--shards", tmp_path / "a.parquet")
    assert (result.returncode, result.stderr) == (0, "")
    meta, train, val = read(data / "openwebtext")
    assert (train.tolist(), val.tolist()) == stream(bpe, DOCUMENTS[:70])
    assert meta["source"] == "70 documents of a.parquet"


def test_openwebtext_broken_shard(data, bpe, tmp_path, offline):
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nonsense")
    fails(run(data, "openwebtext", "--shards", tmp_path / "a.parquet"), "could not read the shards (ArrowInvalid")
    assert left(data) == []


STAND_IN = '''
def load_dataset(*args, **kwargs):
    assert args == ("Skylion007/openwebtext",) and kwargs == {"split": "train", "streaming": True}
    for i in range(4100):
        yield {"text": f"document {i}"}
'''


@pytest.fixture
def hub(data, bpe):
    """hub(source) puts a `datasets` of our own beside prepare.py, where Python looks first."""
    def make(source):
        for name, text in {"datasets/__init__.py": source, "datasets/exceptions.py": "class DatasetsError(Exception): pass",
                           "huggingface_hub/__init__.py": "",
                           "huggingface_hub/errors.py": "class HTTPError(Exception): pass\n"
                                                        "class HfHubHTTPError(HTTPError, OSError): pass"}.items():
            (data / name).parent.mkdir(exist_ok=True)
            (data / name).write_text(text)
    return make


def test_openwebtext_from_the_hub(data, bpe, hub):
    # The thread stands for those of a parquet stream left half-read, which keep a Python that simply exits from ending.
    hub(STAND_IN + "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n")
    result = run(data, "openwebtext", "--max_docs", 4001)
    assert (result.returncode, result.stderr) == (0, "")
    meta, train, val = read(data / "openwebtext")
    assert (train.tolist(), val.tolist()) == stream(bpe, [f"document {i}" for i in range(4001)])
    assert meta["source"] == "4001 documents of Skylion007/openwebtext"


@pytest.mark.parametrize("source, parts", [
    ("raise ModuleNotFoundError(\"No module named 'datasets'\")", ["pip install datasets"]),
    ("def load_dataset(*args, **kwargs): raise ConnectionError('no\\nnetwork')", ["Skylion007/openwebtext", "no network"]),
    (STAND_IN + "    from huggingface_hub.errors import HTTPError\n    raise HTTPError('reset')", ["HTTPError: reset"]),
    ("import logging" + STAND_IN + "    logging.error('noise')\n    raise TimeoutError('slow')", ["TimeoutError: slow"]),
    ("import multiprocessing" + STAND_IN + "        if i == 2000: multiprocessing.active_children()[0].kill()\n", ["ended from outside"]),
    ("def load_dataset(*args, **kwargs): return [{'url': 'x', 'id': 1}]", ["columns url, id"]),
    ("def load_dataset(*args, **kwargs): return [{'text': x} for x in ('one', '', None)]", ["found 1 documents"]),
], ids=["absent", "no network", "broken off", "logs", "killed", "no text column", "too few"])
def test_openwebtext_hub_errors(data, bpe, hub, source, parts):
    hub(source)
    fails(run(data, "openwebtext"), *parts)
    assert not (data / "openwebtext").exists()


@pytest.mark.parametrize("shards, part", [
    (["absent.txt"], "absent.txt is absent"), (["empty.txt"], "empty.txt is absent or empty"),
    (["one.txt", "one.jsonl"], "not of one known kind"), (["one.csv"], "not of one known kind"),
])
def test_openwebtext_which_shards(data, script, bpe, tmp_path, monkeypatch, shards, part):
    for name in ("empty.txt", "one.txt", "one.jsonl", "one.csv"):
        (tmp_path / name).write_text("text\n" * (name != "empty.txt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(script.Error, match=part):
        next(script.read_documents(shards))


# ---- the tokenizer ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", ["shakespeare", "openwebtext", "--text TEXT --name mine --tokenizer gpt2"])
def test_tiktoken_without_network(data, tmp_path, line):
    pytest.importorskip("tiktoken")
    (tmp_path / "own.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "cache").mkdir()
    with socket.socket() as closed:  # bound, but it does not listen: a proxy that refuses every connection
        closed.bind(("127.0.0.1", 0))
        proxy = "http://127.0.0.1:%d" % closed.getsockname()[1]
        env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        env.update(TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"), https_proxy=proxy, http_proxy=proxy)
        result = run(data, *(str(tmp_path / "own.txt") if word == "TEXT" else word for word in line.split()), env=env)
    fails(result, "TIKTOKEN_CACHE_DIR")
    assert left(data) == []


def test_tiktoken_absent(data, script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert script.main(["shakespeare"]) == 1
    one_line(capsys.readouterr().err, "pip install tiktoken")
    assert left(data) == []

"""data/prepare.py: the right tokens, one sentence for an error, never half a corpus. Every test works
on a copy in a temporary folder, with stand-ins for `tiktoken` and `datasets`, and needs no network."""
import hashlib
import http.client
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

PREPARE = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
SHAKESPEARE = PREPARE.parent / "shakespeare_char" / "input.txt"
VOCABULARY = Path(os.environ.get("TIKTOKEN_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache"),
                  "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
TEXT = "abc déf\n狼🐺" * 500  # 1- to 4-byte characters
MARK, END = "<|endoftext|>", "█"  # END stands for the token, once decoded
MARKED = f"one {MARK}\n" * 100
DOCUMENTS = [f"document {i}: naïve 狼 {MARK}" + " word" * (i % 7) for i in range(4100)]
OLD, NEW = "the old text, all in lower case\n" * 20, "THE NEW TEXT, LONGER THAN THE OLD\n" * 30


class Bytes:
    """Stands for GPT-2's tokenizer: every byte is a token, and so is the mark, where allowed."""
    n_vocab, eot_token = 50_257, 50_256

    def encode(self, text, allowed_special):
        first, *others = self.encode_ordinary_batch(text.split(*allowed_special))
        return first + [i for ids in others for i in [self.eot_token, *ids]]

    def encode_ordinary_batch(self, texts):
        return [list(text.encode("utf-8")) for text in texts]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A copy, imported. script.HERE is its folder, and the current one is the folder above."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "tiktoken", Mock(get_encoding=lambda name: Bytes()))
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    shutil.copy(PREPARE, "data")
    spec = importlib.util.spec_from_file_location("prepare", tmp_path / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.time = Mock()  # no waiting between the tries of a download
    yield module
    logging.disable(logging.NOTSET)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def bins(folder):
    return [(folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


def read(folder):
    """meta.json and the text of both splits. Everything must fit together."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert {"tokenizer", "vocab_size", "source", "sha256"} <= set(meta)
    splits = [np.frombuffer(data, "<u2").tolist() for data in bins(folder)]
    assert [len(ids) for ids in splits] == [meta["train_tokens"], meta["val_tokens"]]
    assert max(map(max, splits)) < meta["vocab_size"]
    if meta["tokenizer"] == "char":
        return meta, *("".join(meta["alphabet"][i] for i in ids) for ids in splits)
    symbols = [*(bytes([i]) for i in range(256)), END.encode("utf-8")]
    return meta, *(b"".join(symbols[min(i, 256)] for i in ids).decode("utf-8") for ids in splits)


def prepared(script, content, tokenizer="char"):
    """A text of one's own, through the command line."""
    Path("own.txt").write_bytes(content)
    assert script.main(f"--text own.txt --name mine --tokenizer {tokenizer}".split()) == 0
    assert files(script.HERE / "mine") == ["meta.json", "train.bin", "val.bin"]
    return read(script.HERE / "mine")


def refused(script, capsys, line, part):
    """Status 1, one sentence (what is wrong; what to do), and nothing is left behind."""
    before = files(script.HERE)
    capsys.readouterr()
    try:
        assert script.main(line.split()) == 1
        error = capsys.readouterr().err
    except SystemExit as e:  # of the command line itself
        error = f"{e.code}\n"
    assert re.fullmatch(r"error: [^\n]+; [^\n]+\n", error) and part in error, error
    assert files(script.HERE) == before


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize("raw, text", [
    (TEXT.replace("\n", "\r\n").encode(), TEXT), (TEXT.encode("utf-8-sig"), TEXT),
    (MARKED.encode(), MARKED), (b"a" * 50, "a" * 50), (b"ab" * 25, "ab" * 25),
], ids=["Windows", "byte order mark", "end-of-text mark", "one symbol", "two symbols"])
def test_tokens_decode_to_the_text_split_90_to_10(script, raw, text, tokenizer):
    meta, train, val = prepared(script, raw, tokenizer)
    n = len(text) * 9 // 10  # of characters
    if tokenizer == "char":
        assert (train, val) == (text[:n], text[n:])
        assert meta["alphabet"] == "".join(sorted(set(text)))
    else:  # the mark is one token
        assert (train, val) == (text[:n].replace(MARK, END), text[n:].replace(MARK, END))
    assert (meta["source"], meta["sha256"]) == ("own.txt", sha256(raw))


@pytest.mark.parametrize("line, part", [
    ("", "give either a corpus"), ("stdlib --text x --name x", "give either a corpus"),
    ("wikipedia", "invalid choice: 'wikipedia'"), ("openwebtext --max_docs many", "invalid int"),
    ("shakespeare_char --tokenizer gpt2", "--tokenizer"), ("--text x", "--name"),
    ("--text x --name a/b", "--name"), ("--text x --name stdlib", "--name"),
    ("--text absent.txt --name x", "No such file"), ("--text empty.txt --name x", "too few"),
    ("--text short.txt --name x", "too few"), ("--text latin.txt --name x", "save it as utf-8"),
    ("--text utf16.txt --name x", "save it as utf-8"), ("shakespeare_char", "not tiny Shakespeare"),
    ("--text short.txt --name x --tokenizer gpt2", "TIKTOKEN_CACHE_DIR"),
])
def test_what_goes_wrong_is_one_sentence(script, monkeypatch, capsys, line, part):
    contents = dict(empty=b"", short=b"abcdefg", latin=b"a" * 50 + b"\xff", utf16=b"\xff\xfea\0")
    for name, content in contents.items():
        Path(f"{name}.txt").write_bytes(content)
    (script.HERE / "shakespeare_char").mkdir()
    (script.HERE / "shakespeare_char" / "input.txt").write_text("mine, not his\n" * 9)
    offline = Mock(side_effect=ConnectionError("no\nnetwork"))
    monkeypatch.setitem(sys.modules, "tiktoken", Mock(get_encoding=offline))
    refused(script, capsys, line, part)


@pytest.mark.parametrize("corpus, hashes", [
    ("shakespeare_char", ["6ec305602a99ac28", "d37d30cc0c8327c2"]),
    ("shakespeare", ["502a2bdc8210d1ac", "68a53422394c26a6"]),
])
def test_shakespeare_has_the_pinned_tokens(script, monkeypatch, corpus, hashes):
    if not SHAKESPEARE.exists() or (corpus == "shakespeare" and not VOCABULARY.exists()):
        pytest.skip("needs data/shakespeare_char/input.txt, and tiktoken's cached vocabulary")
    monkeypatch.delitem(sys.modules, "tiktoken")  # the real one
    (script.HERE / "shakespeare_char").mkdir()
    shutil.copy(SHAKESPEARE, script.HERE / "shakespeare_char")
    assert script.main([corpus]) == 0
    assert [sha256(data)[:16] for data in bins(script.HERE / corpus)] == hashes


@pytest.mark.parametrize("bad", [b"<html>log in", OSError("no route"), http.client.IncompleteRead(b"half")])
def test_a_download_is_tried_four_times_and_kept(script, monkeypatch, capsys, bad):
    replies = [io.BytesIO(r) if isinstance(r, bytes) else r for r in [bad] * 7 + [TEXT.encode()]]
    monkeypatch.setattr(script.urllib.request, "urlopen", Mock(side_effect=replies))
    monkeypatch.setattr(script, "SHA256", sha256(TEXT.encode()))
    refused(script, capsys, "shakespeare_char", "check the network, or put the file at")
    for corpus in ("shakespeare", "shakespeare_char"):  # the second needs no ninth reply
        assert script.main([corpus]) == 0
        assert read(script.HERE / corpus)[1:] == (TEXT[:4500], TEXT[4500:])


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("before", [NEW, OLD], ids=["the same before", "other data before"])
def test_stopped_between_the_renames_it_leaves_no_half_corpus(script, monkeypatch, renames, before):
    prepared(script, before.encode())
    Path("own.txt").write_text(NEW)
    some = [os.replace] * renames + [Mock(side_effect=KeyboardInterrupt)]
    monkeypatch.setattr(script.os, "replace", lambda *args: some.pop(0)(*args))
    assert script.main("--text own.txt --name mine".split()) == 1
    if before == NEW:  # complete at every moment
        assert "".join(read(script.HERE / "mine")[1:]) == NEW
    else:
        assert not (script.HERE / "mine" / "train.bin").exists()


def test_stdlib_holds_out_every_tenth_file_and_has_no_tests(script, monkeypatch):
    assert script.main(["stdlib"]) == 0
    meta, train, val = read(script.HERE / "stdlib")
    assert meta["alphabet"] == "\n" + "".join(map(chr, range(32, 127)))
    assert f"# file: argparse.py\n{Path(script.argparse.__file__).read_text()}" in train + val
    for name in [*(f"m{i:02}.py" for i in range(20)), "a/tests/t.py", "site-packages/p.py", "m.txt"]:
        Path("lib", name).parent.mkdir(parents=True, exist_ok=True)
        Path("lib", name).write_text(f"\tΩ = '{name}'", encoding="utf-8")
    monkeypatch.setattr(os, "__file__", "lib/os.py")
    assert script.main(["stdlib"]) == 0
    _, train, val = read(script.HERE / "stdlib")
    assert val == "".join(f"# file: {name}\n    ? = '{name}'\n" for name in ("m09.py", "m19.py"))
    assert train.count("# file: ") == 18 and "t.py" not in train and "p.py" not in train


def test_listops_has_the_pinned_expressions_and_their_values(script):
    def result(match):
        a = [int(word) for word in match[2].split()]
        return str(dict(MIN=min(a), MAX=max(a), MED=int(np.median(a)), SM=sum(a) % 10)[match[1]])
    assert script.main(["listops"]) == 0
    train, val = bins(script.HERE / "listops")
    assert (sha256(train)[:16], sha256(val)[:16]) == ("665c2727a20120c0", "362ab93b80304c13")
    words = json.loads((script.HERE / "listops" / "meta.json").read_text())["alphabet"]
    for value, *ids in np.frombuffer(val, "<u2").reshape(2000, 33).tolist():
        text = "".join(words[i] for i in ids).strip()
        while "[" in text:  # the innermost expressions
            text = re.sub(r"\[(\w+) ([\d ]+) \]", result, text)
        assert text == str(value)


def hub(monkeypatch, rows, end=TimeoutError("slow")):
    """A package `datasets` that streams these rows and then fails; no package without rows."""
    def load_dataset(what, split, streaming, data_files):
        assert (what, data_files, streaming) == ("Skylion007/openwebtext", None, True)
        yield from rows
        raise end
    package = Mock(load_dataset=load_dataset) if rows else None
    monkeypatch.setitem(sys.modules, "datasets", package)


def test_openwebtext_holds_out_every_2000th_document_and_reads_max_docs(script, monkeypatch):
    texts = [*DOCUMENTS[:1999], "", None, *DOCUMENTS[1999:]]  # two that are no documents
    hub(monkeypatch, [{"text": text} for text in texts])
    assert script.main(["openwebtext", "--max_docs", "4100"]) == 0
    meta, train, val = read(script.HERE / "openwebtext")
    assert train == "".join(text + END for i, text in enumerate(DOCUMENTS) if i % 2000)
    assert val == "".join(text + END for text in DOCUMENTS[::2000])  # the mark stays text
    assert meta["source"] == "4100 documents of openwebtext"


def test_openwebtext_reads_local_shards_in_their_order(script, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", "hf")
    datasets = pytest.importorskip("datasets")
    shards = ["b[1].parquet", "a.parquet"]  # the first is no pattern, and they are not sorted
    for shard, texts in zip(shards, (DOCUMENTS[:50], DOCUMENTS[50:90])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(shard)
    assert script.main(["openwebtext", "--shards", *shards]) == 0
    _, train, val = read(script.HERE / "openwebtext")
    assert val + train == "".join(text + END for text in DOCUMENTS[:90])
    Path(shards[0]).write_bytes(b"PAR1 \xff nonsense\n")
    refused(script, capsys, f"openwebtext --shards {shards[0]}", "cannot read documents")


@pytest.mark.parametrize("rows, options, part", [
    ([{"text": "a"}], "", "TimeoutError('slow')"), ([{"url": "x"}], "", "KeyError('text')"),
    ([{"text": "a"}], "--max_docs 1", "too few"), ([{}], "--shards a.csv", "KeyError('.csv')"),
    ([], "", "pip install datasets"), ([{"text": "a"}] * 1500, "", "interrupted"),
], ids=["broken off", "no text", "too few", "unknown kind", "no package", "Ctrl-C"])
def test_an_error_of_openwebtext_is_one_sentence(script, monkeypatch, capsys, rows, options, part):
    hub(monkeypatch, rows, *[KeyboardInterrupt()] * (part == "interrupted"))
    refused(script, capsys, f"openwebtext {options}", part)

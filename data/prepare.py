"""
Text in, data/<name>/train.bin + val.bin + meta.json out. The nano scripts run it as needed.

    python data/prepare.py shakespeare_char   # tiny Shakespeare, 65 characters; 1 MB download
    python data/prepare.py shakespeare        # the same text in GPT-2's tokens
    python data/prepare.py stdlib             # this Python's own library, 96 characters; no network
    python data/prepare.py listops            # 102,000 expressions with their values; no network
    python data/prepare.py openwebtext        # 9 billion GPT-2 tokens, 24 GB; pip install datasets
    python data/prepare.py openwebtext --max_docs 100000              # of its 8 million documents
    python data/prepare.py openwebtext --shards a.parquet b.parquet   # or .jsonl, or .txt by lines
    python data/prepare.py --text my.txt --name mine [--tokenizer char|gpt2]

The bins hold token ids, uint16, little-endian, and nothing else. Those of listops hold rows of 33:
the value of an expression (0 to 9) and its 32 token ids, filled up with 0. meta.json says which
tokenizer ("char", "gpt2", "listops"), its alphabet or words in the order of the ids, vocab_size,
train_tokens, val_tokens, source, and the sha256 of the source or null.

Without network: put tiny Shakespeare at data/shakespeare_char/input.txt, and let TIKTOKEN_CACHE_DIR
name a folder with tiktoken's two cached files of GPT-2's vocabulary. A new corpus is a function
(args, tmp), named in CORPORA, that writes both bins to tmp and returns its part of meta.json.
"""
import argparse
import glob
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WORDS = ["", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]  # in the order of the ids


def write_tokens(tmp, train, val, tokenizer):
    """Writes both bins. Returns what meta.json says of their tokens."""
    if tokenizer == "gpt2":
        meta = dict(tokenizer="gpt2", vocab_size=gpt2().n_vocab)
        encode = lambda text: gpt2().encode(text, allowed_special={"<|endoftext|>"})
    else:
        alphabet = "".join(sorted(set(train) | set(val)))
        meta = dict(tokenizer="char", alphabet=alphabet, vocab_size=len(alphabet))
        id_of = np.zeros(0x110000, "<u2")  # by code point: one look-up for the whole text
        id_of[[ord(c) for c in alphabet]] = range(len(alphabet))
        encode = lambda text: id_of[np.frombuffer(text.encode("utf-32-le"), "<u4")]
    for split, text in (("train", train), ("val", val)):
        (tmp / f"{split}.bin").write_bytes(np.asarray(encode(text), "<u2"))
    return meta


def gpt2():
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:  # no network, a proxy's error page, a wrong hash
        sys.exit(f"error: no vocabulary of GPT-2 ({e!r}); check the network or TIKTOKEN_CACHE_DIR")


def shakespeare(args, tmp):
    args.text = HERE / "shakespeare_char" / "input.txt"
    args.tokenizer = "char" if args.corpus == "shakespeare_char" else "gpt2"
    if not args.text.exists():
        (tmp / "input.txt").write_bytes(download(URL, SHA256, f"put the file at {args.text}"))
        args.text.parent.mkdir(exist_ok=True)
        os.replace(tmp / "input.txt", args.text)
    meta = own_text(args, tmp)
    if meta["sha256"] != SHA256:
        sys.exit(f"error: {args.text} is not tiny Shakespeare; move it away, or use --text FILE")
    return dict(meta, source=URL)


def download(url, sha256, otherwise):
    print(f"downloading {url}", flush=True)
    for wait in (0, 1, 2, 4):
        time.sleep(wait)
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                data = reply.read()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            problem = "another file came"  # the log-in page of a network?
        except Exception as e:  # it has many ways to fail
            problem = repr(e)
    sys.exit(f"error: could not download {url} ({problem}); check the network, or {otherwise}")


def own_text(args, tmp):
    data = Path(args.text).read_bytes()
    try:
        text = data.decode("utf-8-sig")  # without the byte order mark of Windows' editors
    except UnicodeDecodeError as e:
        sys.exit(f"error: {args.text} is not utf-8 (byte {e.start:,}); save it as utf-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    n = int(0.9 * len(text))  # characters, for both tokenizers: the same text is held out
    meta = write_tokens(tmp, text[:n], text[n:], args.tokenizer)
    return dict(meta, source=Path(args.text).name, sha256=hashlib.sha256(data).hexdigest())


def stdlib(args, tmp):
    """What every machine has: the .py files of this Python's library, without its tests."""
    root = Path(os.__file__).parent
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    texts = []
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if left_out.isdisjoint(name.split("/")) and (root / name).is_file():
            code = (root / name).read_text(encoding="utf-8", errors="replace")
            # printable ASCII: a Greek name somewhere is not worth a token in every vocabulary
            code = re.sub("[^\n -~]", "?", code.replace("\t", "    "))
            end = "" if code.endswith("\n") else "\n"
            texts.append(f"# file: {name}\n{code}{end}")
    val = "".join(texts[9::10])  # whole files: a cut through one puts its names on both sides
    train = "".join(text for i, text in enumerate(texts) if i % 10 != 9)
    meta = write_tokens(tmp, train, val, "char")
    sha256 = hashlib.sha256((train + val).encode()).hexdigest()
    return dict(meta, source=f"Python {sys.version.split()[0]} standard library", sha256=sha256)


def openwebtext(args, tmp):
    """Each document and an end-of-text token. Documents 0, 2000, 4000, ... are held out: 0.05%, as
    in nanoGPT, but by a rule that works on a stream."""
    bpe, done = gpt2(), 0
    documents = islice(read_documents(args.shards), args.max_docs)
    documents = iter(tqdm(documents, total=args.max_docs, unit=" documents", disable=None))
    with open(tmp / "train.bin", "wb") as train, open(tmp / "val.bin", "wb") as val:
        while chunk := list(islice(documents, 1000)):
            for ids in bpe.encode_ordinary_batch(chunk):  # in eight threads
                file = train if done % 2000 else val
                file.write(np.array(ids + [bpe.eot_token], "<u2"))
                done += 1
    names = ", ".join(map(os.path.basename, args.shards or ["openwebtext"]))
    source = f"{done} documents of {names}"
    return dict(tokenizer="gpt2", vocab_size=bpe.n_vocab, source=source, sha256=None)


def read_documents(shards):
    """The texts, one at a time: of local files, else of OpenWebText on the Hugging Face hub."""
    from datasets import load_dataset
    what, files = "Skylion007/openwebtext", None
    logging.disable(logging.ERROR)  # that library logs what it raises, too
    try:
        if shards:
            what = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}[Path(shards[0]).suffix]
            files = [glob.escape(os.path.abspath(shard)) for shard in shards]  # names, not patterns
        rows = load_dataset(what, split="train", streaming=True, data_files=files)
        yield from (row["text"] for row in rows if row["text"])  # not null, not an empty line
    except Exception as e:  # of the files, or of any of the packages that speak with the hub
        sys.exit(f"error: cannot read documents ({repr(e)[:200]}); check the network or the files")


def listops(args, tmp):
    """ListOps (Nangia and Bowman, 2018), small: expressions of 5 to 32 tokens, up to three deep.
    All ten values are equally frequent, and no expression is drawn twice."""
    drawn = set()
    for split, count in (("val", 2_000), ("train", 100_000)):
        rng, rows, left = random.Random(f"listops {split}"), [], [count // 10] * 10
        while len(rows) < count:
            ids, value = expression(rng, rng.randint(1, 3))
            row = (value, *ids, *[0] * (32 - len(ids)))
            if 5 <= len(ids) <= 32 and left[value] and row not in drawn:
                left[value] -= 1
                drawn.add(row)
                rows.append(row)
        rng.shuffle(rows)  # the last ones drawn are those of the rarest value
        (tmp / f"{split}.bin").write_bytes(np.array(rows, "<u2"))
    return dict(tokenizer="char", alphabet=[f"{word} ".lstrip() for word in WORDS],
                vocab_size=len(WORDS), source="generated", sha256=None)


def expression(rng, depth):
    """Token ids and value of an operator with two to five arguments, 40% of them expressions."""
    operator = rng.randrange(4)
    ids, values = [WORDS.index("[MIN") + operator], []
    for _ in range(rng.randint(2, 5)):
        value = rng.randrange(10)
        inner = [WORDS.index("0") + value]
        if depth > 1 and rng.random() < 0.4:
            inner, value = expression(rng, depth - 1)
        ids += inner
        values.append(value)
    value = [min(values), max(values), int(median(values)), sum(values) % 10][operator]
    return [*ids, WORDS.index("]")], value


CORPORA = dict(shakespeare_char=shakespeare, shakespeare=shakespeare, stdlib=stdlib,
               listops=listops, openwebtext=openwebtext)


def prepare(name, corpus, args):
    """A reader takes data/<name> for data as soon as train.bin is there. So all is first written to
    a temporary folder inside (which may be on another disk), and train.bin is moved last. Killed at
    any moment, this leaves no train.bin or all of one preparation."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        meta = corpus(args, tmp)
        for split in ("train", "val"):
            n = meta[f"{split}_tokens"] = (tmp / f"{split}.bin").stat().st_size // 2
            if n < 2:
                sys.exit(f"error: {split}.bin would hold {n} tokens, too few; give a longer text")
        new, old = tmp / "meta.json", folder / "meta.json"
        new.write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if not old.exists() or old.read_bytes() != new.read_bytes():
            (folder / "train.bin").unlink(missing_ok=True)  # nobody may mix old and new data
        for file in ("meta.json", "val.bin", "train.bin"):
            os.replace(tmp / file, folder / file)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if not os.listdir(folder):
            folder.rmdir()
    print(f"{folder}: {meta['train_tokens']:,} training, {meta['val_tokens']:,} validation tokens")


def main(argv=None):
    p = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    p.error = lambda message: sys.exit(f"error: {message}; see python data/prepare.py --help")
    p.add_argument("corpus", nargs="?", choices=CORPORA)
    p.add_argument("--text", metavar="FILE")
    p.add_argument("--name")
    p.add_argument("--tokenizer", choices=["char", "gpt2"])
    p.add_argument("--max_docs", type=int, metavar="N")
    p.add_argument("--shards", nargs="+", metavar="FILE")
    args = p.parse_args(argv)
    if bool(args.corpus) == bool(args.text):
        p.error(f"give either a corpus ({', '.join(CORPORA)}) or --text FILE --name NAME")
    if args.text and (args.name in CORPORA or not re.fullmatch(r"\w[\w.-]*", args.name or "")):
        p.error("--text needs --name NAME, a plain word that is no corpus of this script")
    if args.corpus and (args.name or args.tokenizer):
        p.error("--name and --tokenizer belong to --text")
    try:
        prepare(args.name or args.corpus, CORPORA.get(args.corpus, own_text), args)
        return 0
    except SystemExit as e:
        error = e.code
    except ImportError as e:
        error = f"error: {e}; pip install {e.name}"
    except OSError as e:
        error = f"error: {e}; check the name, the free space and the permissions"
    except KeyboardInterrupt:
        error = "error: interrupted; run the same command again"
    print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # stderr is so already
    os._exit(main())  # a stream left half-read can hang Python's own exit, see arrow issue 45214

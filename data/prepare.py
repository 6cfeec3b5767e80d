"""
Text in, data/<name>/train.bin + val.bin + meta.json out. The nano scripts call this file when the data they need are absent.

    python data/prepare.py shakespeare_char    # tiny Shakespeare, 65 characters: 1,003,854 + 111,540 tokens; 1 MB download
    python data/prepare.py shakespeare         # the same text, GPT-2's BPE: 301,966 + 36,059 tokens
    python data/prepare.py stdlib              # this Python's own library, 96 characters, 10 MB or more; no download
    python data/prepare.py listops             # 100,000 + 2,000 expressions with their values; generated, no download
    python data/prepare.py openwebtext         # about 9 billion GPT-2 tokens, 24 GB download; pip install datasets
    python data/prepare.py openwebtext --max_docs 100000              # the first 100,000 of its 8 million documents
    python data/prepare.py openwebtext --shards a.parquet b.parquet   # or .jsonl, or .txt (a document per line)
    python data/prepare.py --text my.txt --name mine [--tokenizer gpt2]

The last line of a good run:

    shakespeare_char: 1,003,854 training and 111,540 validation tokens in .../data/shakespeare_char

train.bin, val.bin   token ids, uint16, little-endian, nothing else in the file: what nanoGPT writes
meta.json            tokenizer ("char", with its alphabet in the order of the ids, or "gpt2"), vocab_size, train_tokens,
                     val_tokens, source, and the sha256 of the source (null for openwebtext, which is never held as one)

listops is no text: its bins are rows of 33 numbers, the value of an expression (0 to 9) and 32 token ids, filled up with 0; its
tokenizer is "listops", with its words in the order of the ids.

Without network: put tiny Shakespeare at data/shakespeare_char/input.txt, and let TIKTOKEN_CACHE_DIR name a folder with
tiktoken's two cached files of GPT-2's vocabulary. Any error is one line that says what to do, with exit status 1.

A new corpus is a function (args, folder, tmp) that writes tmp/train.bin and tmp/val.bin and returns the rest of meta.json,
and a name for it in CORPORA.
"""
import argparse
import contextlib
import functools
import glob
import hashlib
import http.client
import json
import logging
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face hub, as parquet
BACK_OFF = (1, 2, 4)  # seconds between the four tries of a download


class Error(Exception):
    """What is wrong; what to do."""


# ---- tokens: text -> uint16 ids -----------------------------------------------------------------------------------------

def write_chars(tmp: Path, train: str, val: str, alphabet: str) -> dict:
    id_of = np.zeros(0x110000, "<u2")  # indexed by code point: one look-up for the whole text instead of a loop over characters
    id_of[[ord(c) for c in alphabet]] = np.arange(len(alphabet))
    for split, text in (("train", train), ("val", val)):
        code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        (tmp / f"{split}.bin").write_bytes(id_of[code_points])
    return {"tokenizer": "char", "alphabet": alphabet, "vocab_size": len(alphabet)}


def write_gpt2(tmp: Path, train: str, val: str) -> dict:
    for split, text in (("train", train), ("val", val)):
        (tmp / f"{split}.bin").write_bytes(np.array(gpt2().encode_ordinary(text), "<u2"))
    return {"tokenizer": "gpt2", "vocab_size": gpt2().n_vocab}


@functools.cache
def gpt2():
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except ImportError as e:
        raise Error(f"GPT-2's tokenizer needs tiktoken ({e}); pip install tiktoken") from e
    except (OSError, ValueError) as e:  # no network, a proxy's error page, a wrong hash
        raise Error(f"tiktoken could not load GPT-2's vocabulary ({short(e)}); it downloads two files once: connect this "
                    "machine, or copy tiktoken's cache folder from one that has them and name it in TIKTOKEN_CACHE_DIR") from e


def ninety_ten(text: str) -> tuple[str, str]:
    n = int(0.9 * len(text))  # characters, also where the tokens are BPE: both corpora then hold out the same text
    return text[:n], text[n:]


# ---- the corpora --------------------------------------------------------------------------------------------------------

def shakespeare_char(args, folder: Path, tmp: Path) -> dict:
    text = tiny_shakespeare(folder, tmp)
    meta = write_chars(tmp, *ninety_ten(text), "".join(sorted(set(text))))
    return {**meta, "source": SHAKESPEARE_URL, "sha256": SHAKESPEARE_SHA256}


def shakespeare(args, folder: Path, tmp: Path) -> dict:
    gpt2()  # before the download: without a tokenizer there is no use in it
    meta = write_gpt2(tmp, *ninety_ten(tiny_shakespeare(folder, tmp)))
    return {**meta, "source": SHAKESPEARE_URL, "sha256": SHAKESPEARE_SHA256}


def tiny_shakespeare(folder: Path, tmp: Path) -> str:
    for path in (folder / "input.txt", HERE / "shakespeare_char" / "input.txt"):
        if path.exists():  # put there by the user, or by an earlier run
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 != SHAKESPEARE_SHA256:
                raise Error(f"{path} is not tiny Shakespeare (its sha256 is {sha256[:12]}..., not {SHAKESPEARE_SHA256[:12]}...); "
                            "move it away and run again to download the right one, or prepare it as a corpus of your own "
                            "with --text FILE --name NAME")
            return data.decode("utf-8")
    data = download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, instead=f"put the file at {folder / 'input.txt'}")
    (tmp / "input.txt").write_bytes(data)
    os.replace(tmp / "input.txt", folder / "input.txt")
    return data.decode("utf-8")


def download(url: str, sha256: str, instead: str) -> bytes:
    print(f"downloading {url}", flush=True)
    for wait in (*BACK_OFF, None):
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                data = reply.read()  # raises IncompleteRead where the body is shorter than its Content-Length
            break
        except (OSError, http.client.HTTPException) as e:
            # "404 not found" will be the same in a second; "408 timeout" and "429 too many" ask to come back
            hopeless = isinstance(e, urllib.error.HTTPError) and 400 <= e.code < 500 and e.code not in (408, 429)
            if wait is None or hopeless:
                raise Error(f"could not download {url} ({short(e)}); check the network, or {instead}") from e
            print(f"the download failed ({short(e)}), trying again in {wait} s", flush=True)
            time.sleep(wait)
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:  # a captive portal's page, or a changed file: nanoGPT would train on it
        raise Error(f"{url} sent another file (sha256 {got[:12]}..., not {sha256[:12]}...); check the network, or {instead}")
    return data


def text_file(args, folder: Path, tmp: Path) -> dict:
    path = Path(args.text)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise Error(f"{path} is not utf-8 (byte {e.start:,}: {e.reason}); save it as utf-8") from e
    except OSError as e:
        raise Error(f"cannot read {path} ({e.strerror}); give --text a text file") from e
    if not text:
        raise Error(f"{path} is empty; give --text a file with text in it")
    train, val = ninety_ten(text)
    if args.tokenizer == "gpt2":
        meta = write_gpt2(tmp, train, val)
    else:
        alphabet = "".join(sorted(set(text)))
        if len(alphabet) > 2**16:
            raise Error(f"{path} has {len(alphabet):,} different characters, and uint16 holds 65,536; use --tokenizer gpt2")
        meta = write_chars(tmp, train, val, alphabet)
    return {**meta, "source": path.name, "sha256": hashlib.sha256(data).hexdigest()}


def stdlib(args, folder: Path, tmp: Path) -> dict:
    """The one corpus that every machine has: the .py files of the running Python's library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    not_library = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    texts = []
    for name in names:
        if not_library.isdisjoint(name.split("/")[:-1]):
            with contextlib.suppress(UnicodeDecodeError):  # a few old files may not be utf-8
                code = (root / name).read_text(encoding="utf-8")
                # printable ASCII alone: a name in Greek somewhere is not worth a token in everybody's vocabulary
                code = re.sub("[^\n -~]", "?", code.replace("\t", "    "))
                texts.append(f"# file: {name}\n{code}" + ("" if code.endswith("\n") else "\n"))
    val = "".join(texts[9::10])  # every tenth file, whole: a cut through a file would put its names on both sides
    del texts[9::10]
    train = "".join(texts)
    if len(train) + len(val) < 1_000_000:  # a zipped or stripped Python
        raise Error(f"{root} holds hardly any Python source; use a Python that comes with its library, or another corpus")
    meta = write_chars(tmp, train, val, "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1))))
    return {**meta, "source": f"Python {platform.python_version()} standard library",
            "sha256": hashlib.sha256((train + val).encode("utf-8")).hexdigest()}


def openwebtext(args, folder: Path, tmp: Path) -> dict:
    """Every document ends with the end-of-text token. Documents 0, 2000, 4000, ... are the validation split (0.05%, as in
    nanoGPT, but by a rule that needs neither the number of documents nor a shuffle, and so works on a stream)."""
    gpt2()  # an absent vocabulary is one error here, not one in every process; forked processes inherit it
    workers = min(os.cpu_count() or 1, 32)  # one process reads: it cannot feed more
    done = 0
    # The processes come before `datasets` is imported: forking after that library has started its threads may deadlock.
    with processes(workers) as pool, \
            open(tmp / "train.bin", "wb") as train, open(tmp / "val.bin", "wb") as val, \
            tqdm(total=args.max_docs, unit=" documents", disable=None) as bar:
        documents = islice(read_documents(args.shards), args.max_docs)
        chunks = iter(lambda: list(islice(documents, 64)), [])
        try:
            for tokens in in_order(pool, encode_documents, chunks, ahead=4 * workers):
                for ids in tokens:
                    (train if done % 2000 else val).write(ids)
                    done += 1
                bar.update(len(tokens))
        except BrokenProcessPool as e:
            raise Error("a tokenizing process was ended from outside; it may have run out of memory: close other programs and "
                        "run again") from e
    if done < 2:
        raise Error(f"found {done} documents with text; at least 2 are needed, one to train and one to validate on")
    names = ", ".join(os.path.basename(shard) for shard in args.shards) if args.shards else OPENWEBTEXT
    return {"tokenizer": "gpt2", "vocab_size": gpt2().n_vocab, "source": f"{done} documents of {names}", "sha256": None}


def read_documents(shards: list[str] | None):
    """Yield the texts, one at a time: of local files if any are given, else of the hub's 80 parquet files (24 GB)."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as e:
        raise Error(f"openwebtext is read with a package that is not here ({e}); pip install datasets") from e
    what, kwargs = OPENWEBTEXT, {}
    if shards:
        readers = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
        kinds = {readers.get(Path(shard).suffix) for shard in shards}
        if len(kinds) > 1 or None in kinds:
            raise Error("the shards are not of one known kind; give --shards only .parquet, only .jsonl or only .txt files")
        for shard in shards:
            if not os.path.isfile(shard) or os.path.getsize(shard) == 0:
                raise Error(f"the shard {shard} is absent or empty; give --shards files that exist")
        # escaped, because `datasets` takes a name with [ or * in it for a pattern
        what, kwargs = kinds.pop(), {"data_files": [glob.escape(os.path.abspath(shard)) for shard in shards]}
    print(f"reading {f'{len(shards)} local shards' if shards else what}", flush=True)
    logging.disable(logging.ERROR)  # these libraries log what they raise, too
    try:
        for row in load_dataset(what, split="train", streaming=True, **kwargs):
            if "text" not in row:
                raise Error(f"a row has the columns {', '.join(row)}; every row needs its document in a column named text")
            if row["text"]:  # not null, not an empty line
                yield str(row["text"])
    # The first two are files and parsers. An HfHubHTTPError is an error of the HTTP library below, whichever that is in the
    # version installed (requests, httpx): the next class in its order of inheritance stands for all of that library's.
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError.__mro__[1]) as e:
        raise Error(f"could not read {'the shards' if shards else what} ({short(e)}); check the network or the "
                    "files, and run again") from e


def encode_documents(texts: list[str]) -> list[np.ndarray]:
    return [np.array(gpt2().encode_ordinary(text) + [gpt2().eot_token], "<u2") for text in texts]


@contextlib.contextmanager
def processes(workers: int):
    """A pool that is running already and that Ctrl-C leaves to the main process. On an error its processes are killed,
    not asked to stop: a run must name its error, and never wait for a process instead."""
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    pool.submit(int).result()
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(wait=False)
        raise
    pool.shutdown()


def in_order(pool, function, chunks, ahead: int):
    """pool.map, but at most `ahead` results wait in memory."""
    pending = deque()
    for chunk in chunks:
        pending.append(pool.submit(function, chunk))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


LISTOPS = ["", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]  # in the order of the ids; the first fills rows up
LISTOPS_COUNTS = 100_000, 2_000  # expressions to train and to validate on


def listops(args, folder: Path, tmp: Path) -> dict:
    """ListOps (Nangia and Bowman, 2018), small: expressions of 5 to 32 tokens, two to five arguments, up to three deep, and all ten
    values equally often. The validation split is drawn first; no expression is drawn twice."""
    drawn = set()
    for split, count in zip(("val", "train"), reversed(LISTOPS_COUNTS)):
        rng, rows, left = random.Random(f"listops {split}"), [], [count // 10] * 10
        while len(rows) < count:
            ids, value = expression(rng, rng.randint(1, 3))
            row = (value, *ids, *[0] * (32 - len(ids)))
            if 5 <= len(ids) <= 32 and left[value] and row not in drawn:
                left[value] -= 1
                drawn.add(row)
                rows.append(row)
        rng.shuffle(rows)  # the last ones drawn are those of the rarest value
        np.array(rows, "<u2").tofile(tmp / f"{split}.bin")
    return {"tokenizer": "listops", "words": LISTOPS, "vocab_size": len(LISTOPS), "source": "generated", "sha256": None}


def expression(rng, depth) -> tuple[list[int], int]:
    """Token ids of a random expression, and its value: the smallest, the largest, the median (of two middle ones the mean, rounded
    down), or the sum modulo ten of its arguments. Of these 40% are expressions, up to the depth."""
    operator = rng.randrange(4)
    ids, values = [LISTOPS.index("[MIN") + operator], []
    for _ in range(rng.randint(2, 5)):
        value = rng.randrange(10)
        inner = [LISTOPS.index("0") + value]
        if depth > 1 and rng.random() < 0.4:
            inner, value = expression(rng, depth - 1)
        ids += inner
        values.append(value)
    values.sort()
    n = len(values)
    return [*ids, LISTOPS.index("]")], (values[0], values[-1], (values[(n - 1) // 2] + values[n // 2]) // 2, sum(values) % 10)[operator]


CORPORA = {"shakespeare_char": shakespeare_char, "shakespeare": shakespeare, "stdlib": stdlib, "openwebtext": openwebtext,
           "listops": listops}


# ---- from a corpus to its folder ----------------------------------------------------------------------------------------

def prepare(args) -> str:
    """A reader takes data/<name> for data as soon as train.bin is there. So everything is first written to a temporary folder
    inside it (inside: it may be a link to a larger disk), and train.bin is what comes last. Whenever this process is killed,
    there is either no train.bin or all of one preparation; two processes at once do not see each other's files."""
    name, corpus = (args.corpus, CORPORA[args.corpus]) if args.corpus else (args.name, text_file)
    folder = HERE / name
    if os.path.lexists(folder) and not folder.is_dir():
        raise Error(f"{folder} is in the way, it is not a folder; move it away or choose another name")
    folder.mkdir(exist_ok=True)
    remove_stale(folder)
    tmp = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        meta = corpus(args, folder, tmp)
        for split in ("train", "val"):
            meta[f"{split}_tokens"] = (tmp / f"{split}.bin").stat().st_size // 2
            if meta[f"{split}_tokens"] < 2:  # a token to read and one to predict
                raise Error(f"the text is too short to split: {split}.bin would hold {meta[f'{split}_tokens']} tokens; "
                            "give a longer text")
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        install(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # goes only if empty: when nothing was prepared
    return f"{name}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens in {folder}"


def install(tmp: Path, folder: Path) -> None:
    old = folder / "meta.json"
    if not old.exists() or old.read_bytes() != (tmp / "meta.json").read_bytes():
        (folder / "train.bin").unlink(missing_ok=True)  # other data: nobody may read a mixture of old and new
    for file in ("meta.json", "val.bin", "train.bin"):
        os.replace(tmp / file, folder / file)


def remove_stale(folder: Path) -> None:
    """What a killed run left. Its age tells, not its process id, which says nothing between containers that share a disk."""
    for tmp in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may finish, and take its files away, at this moment
            if time.time() - max(path.stat().st_mtime for path in (tmp, *tmp.iterdir())) > 3600:
                shutil.rmtree(tmp, ignore_errors=True)


# ---- command line -------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Error(f"{message}; see python data/prepare.py --help")


def parse(argv):
    p = Parser(description="Text in, data/<name>/train.bin + val.bin + meta.json out.", allow_abbrev=False)
    p.add_argument("corpus", nargs="?", choices=CORPORA, help="a corpus that this script knows")
    p.add_argument("--text", metavar="FILE", help="or a text file (utf-8) of your own, split 90/10")
    p.add_argument("--name", help="with --text: the folder's name, used as --dataset NAME")
    p.add_argument("--tokenizer", choices=("char", "gpt2"), help="with --text: char (default) or GPT-2's BPE")
    p.add_argument("--max_docs", type=int, metavar="N", help="with openwebtext: only the first N documents")
    p.add_argument("--shards", nargs="+", metavar="FILE", help="with openwebtext: local .parquet, .jsonl or .txt files")
    args = p.parse_args(argv)
    wrong = (
        (bool(args.corpus) == bool(args.text), f"give either a corpus ({', '.join(CORPORA)}) or --text FILE --name NAME"),
        (args.text and not args.name, "--text needs --name NAME"),
        (args.corpus and (args.name or args.tokenizer), "--name and --tokenizer belong to --text"),
        (args.corpus != "openwebtext" and (args.shards or args.max_docs is not None),
         "--max_docs and --shards belong to openwebtext"),
        (args.max_docs is not None and args.max_docs < 2, "--max_docs must be 2 or more: one to train, one to validate on"),
        (not re.fullmatch(r"\w[\w.-]*", args.name or "ok"),
         f"--name {args.name} is not a plain folder name (letters, digits, _ - . and no dot in front)"),
        (args.name in CORPORA, f"--name {args.name} is a known corpus, choose another"),
    )
    for condition, message in wrong:
        if condition:
            p.error(message)
    return args


def main(argv=None) -> int:
    try:
        print(prepare(parse(argv)))
        return 0
    except Error as e:
        message = str(e)
    except OSError as e:
        message = f"{e}; check the free space and the permissions of {HERE}"
    except MemoryError:
        message = "not enough memory to hold this text at once; close other programs, or prepare a part of it"
    except KeyboardInterrupt:
        message = "interrupted; run the same command again"
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 1


def short(e: BaseException) -> str:
    text = " ".join(f"{type(e).__name__}: {e}".split())
    return text if len(text) < 160 else text[:157] + "..."


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may hold what the console cannot show
    status = main()
    sys.stdout.flush()
    # Without this, a parquet stream that was left half-read (--max_docs) makes the interpreter hang or abort while it shuts
    # down (github.com/apache/arrow/issues/45214). Everything is written and closed by now.
    os._exit(status)

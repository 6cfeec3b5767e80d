"""
A GPT-2 that is already trained, for nano_jump.py --init_from. It is a file of its own since reading
other people's formats is no part of the idea.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
# a GPT-2 whose configuration says otherwise computes something else
GPT2 = dict(model_type="gpt2", activation_function="gelu_new", n_inner=None, layer_norm_epsilon=1e-5,
            tie_word_embeddings=True, scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False)


def load_model(source):
    """({field of Config: value}, {name: tensor}) of a checkpoint of these scripts; of a folder with
    a GPT-2 in Hugging Face's format; or of its name on their hub, from where it is downloaded, once.
    Exits with a sentence where that is no whole GPT-2."""
    path = Path(source)
    try:
        if path.is_file():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            found, weights = saved["config"], saved["model"]
        else:
            path = path if path.exists() else download(source)
            found = json.loads((path / "config.json").read_text())
            found["block_size"] = found["n_positions"]
            weights = read_safetensors(path / "model.safetensors")
        names = "n_layer", "n_head", "n_embd", "block_size", "vocab_size"
        sizes, weights = {name: found[name] for name in names}, rename(weights)
    except Exception as e:  # of whatever there is in the files
        reason = " ".join(f"{type(e).__name__} {e}".split())
        sys.exit(f"error: --init_from {source} is no whole GPT-2 ({reason:.300}): name another, or "
                 "download it again (git lfs pull, where a file is a pointer)")
    for name, only in GPT2.items():
        if found.get(name, only) != only:
            sys.exit(f"error: --init_from {source} has {name} {found[name]}, but only {only} works")
    return dict(sizes, bias="ln_f.bias" in weights), weights


def download(name):
    """The folder of a model of the hub, in data/."""
    folder = HERE / name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).exists():
            url = f"https://huggingface.co/{name}/resolve/main/{file}"
            torch.hub.download_url_to_file(url, folder / file)
    return folder


def read_safetensors(path):
    """{name: tensor}. The file: the length of a header, in 8 bytes, the header, the numbers."""
    raw, tensors = np.memmap(path, mode="r"), {}
    start = 8 + int(raw[:8].view("<u8")[0])
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16).get(entry["dtype"])
        first, last = entry["data_offsets"]
        numbers = torch.from_numpy(raw[start + first:start + last].copy())
        tensors[name] = numbers.view(dtype or torch.uint8).view(entry["shape"]).float()
    return tensors


def rename(weights):
    """GPT-2's weights as they are called here: without the prefixes of wrappers, causal masks, and
    a head that is the embedding; queries, keys and values apart; matrices (out, in)."""
    theirs, found = any("c_attn" in name for name in weights), {}
    for name, w in weights.items():
        name = re.sub(r"^((_orig_mod|module|model|transformer)\.)+", "", name)
        if theirs and w.ndim == 2 and name.startswith("h."):
            w = w.T
        if ".c_attn." in name:
            for part, third in zip("qkv", w.chunk(3)):
                found[name.replace("c_attn", f"c_{part}")] = third
        elif not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
            found[name] = w
    if "lm_head.weight" in found and torch.equal(found["lm_head.weight"], found["wte.weight"]):
        del found["lm_head.weight"]
    return found


def check(model, weights, source):
    """Every weight has a place in the model, and every place a weight, or it is refused. Rows of the
    embedding beyond GPT-2's 50,257 tokens are padding, and cut off where the data have no more."""
    wanted, vocab = model.wte.num_embeddings, len(weights.get("wte.weight", ()))
    if wanted == 50257 < vocab:
        weights["wte.weight"] = weights["wte.weight"][:wanted]
    elif wanted != vocab:
        sys.exit(f"error: --init_from {source} has a vocabulary of {vocab}, the data one of {wanted}: "
                 "name the --dataset of its tokens")
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:  # it names what is missing, left over, or of another shape
        sys.exit(f"error: --init_from {source}: {' '.join(str(e).split()):.500}")

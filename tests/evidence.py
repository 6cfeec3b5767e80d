"""The tables of README: a script's arms over several seeds, mean and standard deviation.

    python tests/evidence.py nano_ssa                              # seeds 1, 2, 3 on Shakespeare at the default size
    python tests/evidence.py nano_ssa --share 0.03                 # on the first 3% of the training text
    python tests/evidence.py nano_ssa --seeds 1 2 3 4 5 -- --sigma 1    # flags after -- go to the script
    python tests/evidence.py nano_transevolve --arms technique dense    # not all arms of the comparison

Every run is the script's own `--compare`, in out/evidence/; a run that was interrupted goes on, a finished one is read.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# what a script's table shows: name of the row, key in an arm of results.json (dots go into nested objects and lists), and the
# arm, where the row is about one only
COMMON = [("validation loss, last", "val_loss"), ("validation loss, best", "best_val_loss"), ("training loss, last", "train_loss")]
MODES = [("dense mode", "val_loss_dense_mode"), ("dense mode, best temperature", "val_loss_temperature"),
         ("one draw", "val_loss_single_draw"), *((f"ensemble of {k}", f"ensemble.{k}") for k in (2, 4, 8, 16)),
         ("top-1, dense mode", "top1_dense_mode"), ("top-1, ensemble of 16", "ensemble_top1.16")]
MAPS = [("trained", "trained"), ("random queries and keys", "random"), ("another sequence", "other_sequence"), ("before training", "untrained")]
COPIES = [("loss on a part of the validation split", "none"), *((f"with layer {i + 1} using the maps of layer {i}", f"identity.{i}") for i in range(5)),
          *((f"the same, each head its best match, layer {i + 1}", f"best_match.{i}") for i in range(5)),
          ("with all that reuse using those of layer 0", "all_identity"), ("the same, each head its best match", "all_best_match")]
LOSSES = [("all modules", "none"), ("without the less used half of attention", "half_attention"), ("without the least used quarter of feed-forward", "quarter_ffn"),
          ("without both", "both"), ("without all attention modules", "all_attention"), ("without all feed-forward modules", "all_ffn"), *((f"without {kind}{i} alone", f"{kind}{i}") for kind in "AF" for i in range(4))]
ROWS = {
    "nano_mom": [("parameters", "parameters"), *COMMON, ("graph depth", "evaluation.graph_depth"),
                 ("training FLOPs a token, real picks", "evaluation.flops_per_token"), ("KV bytes a token", "evaluation.kv_bytes_per_token"),
                 ("picks that are SKIP, attention", "evaluation.skip_rate_attention"), ("picks that are SKIP, feed-forward", "evaluation.skip_rate_ffn"),
                 ("distinct paths", "evaluation.distinct_paths"), ("tokens that skip attention, round 1", "evaluation.attention_to_skip.0.tokens"),
                 ("attention that goes to them, round 1", "evaluation.attention_to_skip.0.attention"), *((name, f"evaluation.loss_without_modules.{key}") for name, key in LOSSES)],
    "nano_ssa": [*COMMON, *((f"{when}: {name}", f"evaluation.{where}{key}") for name, key in MODES for when, where in
                            (("before fine-tuning", "before_finetune."), ("last weights", "last."), ("best weights", "")))],
    "nano_transevolve": [("parameters without embeddings", "parameters_non_embedding"), ("training FLOPs a token", "flops_per_token"), *COMMON,
                         ("accuracy, best weights", "evaluation.accuracy"), ("products Q K^T in a forward pass", "evaluation.qk_products"),
                         *((f"maps change from layer {l} to {l + 1}", f"evaluation.map_distance.{l}") for l in range(5)),
                         *((f"spread of the bias in layer {l}", f"evaluation.bias_by_depth.{l}") for l in range(6)),
                         ("largest bias", "evaluation.bias_largest"), ("loss with the biases set to 0", "evaluation.frozen.val_loss"),
                         ("accuracy with the biases set to 0", "evaluation.frozen.accuracy")],
    "nano_reuse": [("parameters", "parameters"), *COMMON,
                   *((f"similarity to {whose}: {name}", f"evaluation.similarity_{where}.{key}", "dense") for name, key in MAPS
                     for whose, where in (("the layer below", "below"), ("layers further below", "further"))),
                   *((name, f"evaluation.copied_maps.{key}", "dense") for name, key in COPIES)],
}


def value(arm, key):
    found = arm
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else found[int(part)] if isinstance(found, list) and int(part) < len(found) else None
    if found is None and ".last." in key:  # the last weights are the best ones
        return value(arm, key.replace(".last.", "."))
    return found


def part_of(folder, share):
    """A corpus with the first part of another's training split and all of its validation split."""
    part = folder.with_name(f"{folder.name}_{share:g}")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    ids = np.fromfile(folder / "train.bin", dtype="<u2")[:int(share * meta["train_tokens"])]
    part.mkdir(exist_ok=True)
    (part / "meta.json").write_text(json.dumps({**meta, "train_tokens": len(ids)}), encoding="utf-8")
    (part / "val.bin").write_bytes((folder / "val.bin").read_bytes())
    ids.tofile(part / "train.bin")
    return part


def table(script, results):
    """A Markdown table of results.json contents, a column for each arm: mean ± standard deviation over the runs."""
    arms = list(results[0]["arms"])
    lines = [f"| {len(results)} seeds | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    def row(name, value_of):
        cells = []
        for arm in arms:
            found = [value_of(r["arms"], arm) for r in results]
            exact = None not in found and all(isinstance(v, int) for v in found) and len(set(found)) == 1
            if None in found or exact:
                cells.append("" if None in found else f"{found[0]:,}")
                continue
            places = ",.0f" if max(found) > 100 else ".4f"
            cells.append(f"{statistics.mean(found):{places}}" + (f" ± {statistics.stdev(found):{places}}" if len(found) > 1 else ""))
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for name, key, *only in ROWS.get(script, COMMON):
        row(name, lambda found, arm: value(found[arm], key) if not only or arm in only else None)
        if key in ("val_loss", "best_val_loss") and "dense" in arms:
            row("its difference to the dense twin's", lambda found, arm: None if arm == "dense" else found[arm][key] - found["dense"][key])
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="nano_ssa, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dataset", default="shakespeare_char")
    parser.add_argument("--share", type=float, default=1.0, help="of the training split that is used")
    parser.add_argument("--arms", nargs="+", help="only these; the first of the script is always trained")
    parser.add_argument("--name", default="", help="tells the runs of one set of flags from those of another")
    own, flags = (sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]) if "--" in sys.argv else (sys.argv[1:], [])
    args = parser.parse_args(own)
    import importlib
    script = importlib.import_module(args.script)
    folder = script.find_data(args.dataset)
    if args.share < 1:
        folder = part_of(folder, args.share)
    results = []
    for seed in args.seeds:
        out = Path("out") / "evidence" / f"{args.script}-{folder.name}{args.name and '-' + args.name}-{seed}"
        arms = f"nano.ARMS = tuple(arm for arm in nano.ARMS if arm in {[script.ARMS[0], *args.arms]}); " if args.arms else ""
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {args.script} as nano; {arms}nano.main()", "--compare", "--dataset", str(folder), "--seed", str(seed),
                   "--out_dir", str(out), *flags, *(["--resume"] if (out / "results.json").exists() else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results.append(json.loads((out / "results.json").read_text(encoding="utf-8")))
    first = results[0]
    device = torch.cuda.get_device_name() if first["device"].startswith("cuda") else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"python tests/evidence.py {' '.join(sys.argv[1:])}  ({first['dataset']}, {first['dtype']}, {device}, torch {first['torch']})\n")
    print(table(args.script, results))


if __name__ == "__main__":
    main()

"""Tables of the scripts that are still of the old shape: a script's arms over several seeds, mean and standard deviation.

    python tests/evidence_old_shape.py nano_reuse                              # seeds 1, 2, 3 on Shakespeare at the default size
    python tests/evidence_old_shape.py nano_reuse --share 0.03                 # on the first 3% of the training text
    python tests/evidence_old_shape.py nano_reuse --seeds 1 2 3 4 5 -- --reuse_heads 2    # flags after -- go to the script
    python tests/evidence_old_shape.py nano_transevolve --arms technique dense    # not all arms of the comparison
    python tests/evidence_old_shape.py nano_jump --other stdlib              # also maps fitted to another text, filtered to the same alphabet

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


# tables of one arm's evaluation e: name, the rows, and for each column its value in a row, in % where the name says so
def lens_columns(metric, lenses=("id", "mat", "affine", "tuned"), scale=1):
    return {lens: lambda e, l, lens=lens: scale * metric(e)[lens][l] for lens in lenses}


def layers(e, last=0):
    return range(len(e["surprisal"]["id"]) - 1 + last)


def exits(name, scale=100):
    pair = {lens: lambda e, target, lens=lens: scale * e["exit"]["at"][target][lens][name] for lens in ("id", "mat")}
    return {**pair, "mat - id": lambda e, target: pair["mat"](e, target) - pair["id"](e, target)}


def ways(e):
    return {", ".join(filter(None, (g["method"], g["exit"], g["kv"] and f"kv {g['kv']}"))): g for g in e["generation"]}


GRIDS = {
    "nano_jump": [
        ("r² to the last layer, from layer", layers, lens_columns(lambda e: {lens: [row[-1] for row in rows] for lens, rows in e["r2"].items()}, ("id", "mat", "affine"))),
        *((f"P@{k}, %, from layer", layers, lens_columns(lambda e, k=k: {lens: found[k] for lens, found in e["precision"].items()}, scale=100)) for k in ("1", "5", "10")),
        *((f"{name}, nats, from layer", lambda e: layers(e, 1), lens_columns(lambda e, key=key: e[key])) for name, key in (("surprisal", "surprisal"), ("KL", "kl"), ("loss on the text", "gold_loss"))),
        ("bigrams of the training text", lambda e: ["P@1, %", "P@5, %", "P@10, %", "surprisal", "KL", "loss on the text"],
         {"": lambda e, row: {**{f"P@{k}, %": 100 * v[0] for k, v in e["precision"]["bigrams"].items()},
                              **{name: e[key]["bigrams"][0] for name, key in (("surprisal", "surprisal"), ("KL", "kl"), ("loss on the text", "gold_loss"))}}[row]}),
        *((f"{title}, %, at the agreement of", lambda e: list(e["exit"]["at"]), exits(name)) for title, name in
          (("layers saved", "layers_saved"), ("FLOPs saved", "flops_saved"), ("agreement found on the other half", "agreement"))),
        ("P@1, %, with parts made linear above layer", layers, {"whole blocks (mat)": lambda e, l: 100 * e["precision"]["mat"]["1"][l],
                                                              **{part: lambda e, l, part=part: 100 * e["submodules"][part]["precision"]["1"][l]
                                                                 for part in ("attention", "feed-forward", "both LayerNorms")}}),
        ("generation", lambda e: list(ways(e)), {"speed, of full": lambda e, way: ways(e)[way]["speedup"], "layers": lambda e, way: ways(e)[way]["layers"],
                                                "layers on text": lambda e, way: ways(e)[way]["layers_true_text"],
                                                "agreement on text, %": lambda e, way: 100 * ways(e)[way]["agreement"],
                                                "with exact context, %": lambda e, way: 100 * ways(e)[way]["agreement_exact_context"]})],
}


def grid(results, title, rows, columns):
    """A Markdown table of the technique's evaluations: mean ± standard deviation over the runs."""
    found = [r["arms"]["technique"]["evaluation"] for r in results]
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in rows(found[0]):
        values = [[f(e, row) for e in found] for f in columns.values()]
        lines.append(f"| {row} | " + " | ".join(f"{statistics.mean(v):{place}}" + (f" ± {statistics.stdev(v):{place}}" if len(v) > 1 else "") for v in values
                                                for place in [".1f" if "%" in f"{title}{row}" or max(map(abs, v)) > 20 else ".3f"]) + " |")
    return "\n".join(lines)


def other_text(nano, out, settings, name):
    """Mean P@1 of layers 0 to L-1 in %, on each of two texts with maps fitted to each: {(text, maps): value}. The second text is another
    corpus without the characters that the first one lacks, cut to its length."""
    s = nano.Settings(**{**settings, "device": "cpu"})
    device = nano.pick_device("cpu")
    data = nano.Data(s, device)
    model = nano.GPT(s).eval()
    model.load_state_dict(torch.load(out / "technique" / "best.pt", weights_only=True, map_location="cpu")["model"])
    other = nano.Data(nano.Settings(**{**settings, "dataset": str(nano.find_data(name))}), device)
    known = set(data.alphabet)
    for split in ("train", "val"):
        text = [c for c in other.decode(getattr(other, split).tolist()) if c in known][:len(getattr(data, split))]
        setattr(other, split, torch.tensor(data.encode(text), dtype=torch.int32))
    runs = {text: nano.Run(s, device, torch.float32, "", 0, 1, d) for text, d in ((data.name, data), (name, other))}
    maps = {text: {pair: (A.float(), a.float()) for pair, (A, a) in nano.fit(nano.moments(run, model, nano.fit_batches(run)), s.n_embd).items()} for text, run in runs.items()}
    lenses = {fitted: lambda x, h, l, m=m: model.read_out(nano.jump(h, m, l, s.n_layer))[0] for fitted, m in maps.items()}
    found = {}
    for text, run in runs.items():
        means, _ = nano.measure(run, model, run.data.windows("val", s.eval_tokens), lenses)
        found.update({f"{text}, maps fitted to {fitted}": 100 * means[fitted][:-1, 0].mean().item() for fitted in maps})
    return found


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
    parser.add_argument("script", help="nano_reuse, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dataset", default="shakespeare_char")
    parser.add_argument("--share", type=float, default=1.0, help="of the training split that is used")
    parser.add_argument("--arms", nargs="+", help="only these; the first of the script is always trained")
    parser.add_argument("--other", help="of nano_jump: a corpus of characters to fit other maps to")
    parser.add_argument("--name", default="", help="tells the runs of one set of flags from those of another")
    own, flags = (sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]) if "--" in sys.argv else (sys.argv[1:], [])
    args = parser.parse_args(own)
    import importlib
    script = importlib.import_module(args.script)
    folder = script.find_data(args.dataset)
    if args.share < 1:
        folder = part_of(folder, args.share)
    results, outs = [], []
    for seed in args.seeds:
        out = Path("out") / "evidence" / f"{args.script}-{folder.name}{args.name and '-' + args.name}-{seed}"
        arms = f"nano.ARMS = tuple(arm for arm in nano.ARMS if arm in {[script.ARMS[0], *args.arms]}); " if args.arms else ""
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {args.script} as nano; {arms}nano.main()", "--compare", "--dataset", str(folder), "--seed", str(seed),
                   "--out_dir", str(out), *flags, *(["--resume"] if (out / "results.json").exists() else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        outs.append(out)
        results.append(json.loads((out / "results.json").read_text(encoding="utf-8")))
    first = results[0]
    device = torch.cuda.get_device_name() if first["device"].startswith("cuda") else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"python tests/evidence_old_shape.py {' '.join(sys.argv[1:])}  ({first['dataset']}, {first['dtype']}, {device}, torch {first['torch']})\n")
    print(table(args.script, results))
    for title, rows, columns in GRIDS.get(args.script, []):
        print("\n" + grid(results, title, rows, columns))
    if args.other:
        found = [other_text(script, out, r["settings"], args.other) for out, r in zip(outs, results)]
        print("\n| mean P@1 of the layers below the last, % | |\n|---|---|")
        for name in found[0]:
            v = [f[name] for f in found]
            print(f"| {name} | {statistics.mean(v):.1f}" + (f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "") + " |")


if __name__ == "__main__":
    main()

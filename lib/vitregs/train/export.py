"""What a finished run leaves: weights in half precision and pieces of 16 MB, recipe, history, and a model card made from them."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save
from torch import Tensor, nn

from vitregs import cache
from vitregs.train import monitor
from vitregs.train.config import SIZES, Recipe

LARGEST = "16MB"
WORDS = "words.safetensors"


def export(
    recipe: Recipe,
    net: Any,
    records: list[dict[str, Any]],
    out: Path,
    origin: dict[str, str],
    facts: dict[str, Any],
    words: dict[str, Tensor] | None = None,
) -> Path:
    """Write a zoo entry: recipe, network, records of the run, folder, provenance, further facts, the text side of a CLIP model
    for zero-shot classification → the folder.

    Weights that half precision holds exactly, as `halve` leaves them, are written in half precision: the file has the very
    network that was scored. Raises InputError for a disk that cannot be written.
    """
    state = {k: _smallest(v.detach().cpu().contiguous()) for k, v in net.state_dict().items()}
    _weights(state, out)
    if words:
        text = {k: v.detach().cpu().contiguous() for k, v in words.items()}
        cache.write_whole(out / WORDS, partial(_tensors, text))
    log = monitor.dataset(records)
    log.attrs.update(origin, recipe=json.dumps(recipe.facts(), sort_keys=True))
    cache.save_dataset(log, out / "history.nc")
    card = {
        "recipe": recipe.facts(),
        "vit": net.facts,
        "mean": net.pixel_mean,
        "std": net.pixel_std,
        "weights": cache.file_hash(*files(out)),
        "precision": precision(state),
        "accuracy": _known(records[-1]["accuracy"]),
        "knn": _known(records[-1]["knn"]),
        "knn_untrained": _known(records[0]["knn"]),
        "minutes": records[-1]["seconds"] / 60,
        **facts,
        "provenance": origin,
    }
    facts_text = json.dumps(card, indent=1, sort_keys=True) + "\n"
    for name, page in (("recipe.json", facts_text), ("README.md", describe(json.loads(facts_text), log))):
        cache.write_whole(out / name, partial(_text, page))
    return out


@torch.no_grad()
def halve(net: nn.Module) -> None:
    """Round a network in place to numbers that half precision holds, but for tensors of which some are too large for it."""
    for value in net.state_dict().values():
        near = value.half()
        if value.is_floating_point() and near.isfinite().all():
            value.copy_(near)


def _smallest(value: Tensor) -> Tensor:
    """A tensor in half precision if that loses nothing, else as it is."""
    return near if value.is_floating_point() and (near := value.half()).to(value.dtype).equal(value) else value


def precision(state: Mapping[str, Tensor]) -> str:
    """How the weights of a zoo entry are stored: tensors as they are written → "half", "single", or "half and single"."""
    kinds = {"half" if v.dtype == torch.float16 else "single" for v in state.values() if v.is_floating_point()}
    return " and ".join(sorted(kinds))


def files(folder: Path) -> list[Path]:
    """Weight files of a zoo entry, in order."""
    return sorted(folder.glob("weights*.safetensors"))


def _weights(state: dict[str, Tensor], out: Path) -> None:
    """Write tensors as safetensors in pieces, and which piece holds what if there are several."""
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern="weights{suffix}.safetensors", max_shard_size=LARGEST
    )
    for old in files(out):
        if old.name not in plan.filename_to_tensors:
            old.unlink()
    for name, tensors in plan.filename_to_tensors.items():
        cache.write_whole(out / name, partial(_tensors, {k: state[k] for k in tensors}))


def _tensors(state: dict[str, Tensor], spare: Path) -> None:
    spare.write_bytes(save(state))  # save_file would hide the file from other users


def _text(words: str, spare: Path) -> None:
    spare.write_text(words)


def describe(card: dict[str, Any], log: xr.Dataset) -> str:
    """Model card in Markdown: what `publish` wrote of a run, its history → text."""
    recipe, best = card["recipe"], monitor.strongest(log)
    width, depth, heads = SIZES[recipe["size"]]
    rows = {
        "objective": recipe["objective"],
        "registers": recipe["registers"],
        "shape": f"width {width}, depth {depth}, {heads} heads, patch {recipe['patch_size']}, {recipe['image_size']} px",
        "data": recipe.get("data", "scenes"),
        **_images(card),
        "training": f"{recipe['steps']:,} steps of {recipe['batch']}, seed {recipe['seed']}, {card['minutes']:.0f} min on "
        f"{card['provenance'].get('device', 'cpu')}",
        "k-NN, trained / untrained": f"{_number(card.get('knn'))} / {_number(card.get('knn_untrained'))}",
        **{
            f"linear, {name}: trained / untrained": f"{_number(value)} / {_number(card['linear_untrained'][name])}"
            for name, value in card.get("linear", {}).items()
        },
        "head or zero-shot accuracy": _number(card["accuracy"]),
        "share of the time spent watching": f"{_watching(log):.3f}",
        "top-1 % / median norm": f"{best['top1']:.2f} (layer {best['layer']:.0f}), separation {_number(best['separation'])}",
        "outliers by the emergence rule": "emerged" if monitor.emerged(log) else "not emerged",
        "weights, SHA-256": card["weights"],
        "weights, precision": card["precision"] + _rounded(card),
        "code, commit, date": ", ".join(str(card["provenance"].get(k, "")) for k in ("code", "commit", "date")),
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    settings = " ".join(f"`{k}={v}`" for k, v in sorted(recipe.items()) if not isinstance(v, dict))
    again = card.get("command", f"vitregs train {recipe['name']}")  # the first cards were those of recipes as they are
    how = f"`{again}`" if again else "`vitregs.train.loop.train` and the recipe below, which no command gives"
    missing = "".join(f" There is no linear score of {k}: {why}." for k, why in card.get("left_out", {}).items())
    unsure = "" if card.get("knn") is not None or "left_out" not in card else " Nor is there a k-NN score."
    return (
        f"# {recipe['name']}\n\n| | |\n|---|---|\n{table}\n\n"
        f'Load it with `vitregs.load` and the path of this folder; `vitregs.load("{recipe["name"]}")` does if it is in the '
        f"zoo. Train it again with {how}.{missing}{unsure}\n\n{settings}\n"
    )


def _rounded(card: Mapping[str, Any]) -> str:
    """When weights were rounded that were trained before runs ended with it."""
    return f"; rounded on {card['rounded']}, the trained scores are of the rounded weights" if "rounded" in card else ""


def _images(card: Mapping[str, Any]) -> dict[str, str]:
    """Rows on images that are no scenes."""
    known = card.get("images")
    return (
        {"images": f"{known['trained']:,} trained on, fingerprint of their content {known['fingerprint']}"}
        if known
        else {}
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON knows no nan


def _watching(log: xr.Dataset) -> float:
    return float(log["watching"].sum() / log["seconds"].max()) if "watching" in log else float("nan")


def _number(value: float | None) -> str:
    return "none" if value is None or value != value else f"{value:.3f}"

"""What a run starts from in place of random weights: a trained network, with new registers, without some of its neurons."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitregs.errors import InputError
from vitregs.models import attention, registry, test_time
from vitregs.models.backbone import Backbone
from vitregs.train.config import SIZES, Recipe


@dataclass(frozen=True)
class Start:
    """A trained network, and what is taken from it before the first step.

    Attributes:
        backbone: The network as it is, its positions resized to the images of the recipe.
        neurons: MLP neurons whose output weights start at zero: block, from 1 → numbers, from 0.
        key: Names the weights and the neurons by their content.
    """

    backbone: Backbone
    neurons: dict[int, list[int]]
    key: str

    def facts(self, recipe: Recipe, classes: int) -> dict[str, Any]:
        """What `registry.build` makes the trained network from: recipe, classes of its head → plain values."""
        shape: dict[str, Any] = {"img_size": recipe.image_size, "num_classes": classes}
        known = self.backbone.card.get("vit")
        name = test_time.split(self.backbone.name)[0].partition("@")[0].split(".")[0]
        shape |= {"reg_tokens": recipe.registers}
        if recipe.attention != attention.PLAIN:
            shape |= {"attention": recipe.attention}
        if recipe.patch_norm:
            shape |= {"pre_norm": True}
        return {**known, **shape} if known else {"architecture": name, **shape}

    def network(self, recipe: Recipe, classes: int) -> Any:
        """Make the network as it is before the first step.

        Its head is kept where it has as many classes, else it starts from random weights. New registers get no position;
        they start as random tokens of standard deviation `register_init`. What another attention adds starts as
        `models.attention` says, a LayerNorm before the first block without effect of its own.

        Args:
            recipe: What is trained.
            classes: Of its head, 0 for none.

        Returns:
            timm's ViT.
        """
        net: Any = registry.build(self.facts(recipe, classes), drop_path_rate=recipe.drop_path)
        state = dict(self.backbone.net.state_dict())
        if classes != self.backbone.net.num_classes:
            state = {k: v for k, v in state.items() if not k.startswith("head.")}
        state = {k: v for k, v in state.items() if not _within(k, recipe.fresh_from)}
        new_kind = recipe.attention != _attention(self.backbone)
        if new_kind:
            state = attention.fitted(state, recipe.attention)
        if recipe.patch_norm:
            state = _without_bias(state, net.patch_embed.num_patches)
        if new := recipe.registers - self.backbone.registers:
            at, width = self.backbone.prefix, self.backbone.width
            draw = torch.Generator().manual_seed(recipe.seed)
            state["reg_token"] = torch.randn(1, new, width, generator=draw) * recipe.register_init
            table = state["pos_embed"]
            if net.pos_embed.shape[1] != table.shape[1]:  # CLS has a position, so that registers have one as well: none
                state["pos_embed"] = torch.cat([table[:, :at], table.new_zeros(1, new, width), table[:, at:]], 1)
        missing, odd = net.load_state_dict(state, strict=False)
        added = attention.KINDS[recipe.attention].added if new_kind else ()
        expected = ("head.", *(("norm_pre.",) if recipe.patch_norm else ()))
        strange = [
            k
            for k in missing
            if not _within(k, recipe.fresh_from) and not k.startswith(expected) and not k.endswith(added)
        ]
        if odd or strange:
            raise InputError(
                f"{self.backbone.name} cannot be trained on: its weights do not fit ({[*odd, *strange][0]})"
            )
        with torch.no_grad():
            for block, numbers in self.neurons.items():
                mlp = net.blocks[block - 1].mlp
                mlp.fc2.weight[:, numbers] = 0
                if recipe.dead:
                    mlp.fc1.weight[numbers] = 0
                    mlp.fc1.bias[numbers] = 0
        return net


def _within(key: str, first: int) -> bool:
    """Whether a parameter belongs to a block from `first` on: its name, number of the block (0: none)."""
    parts = key.split(".")
    return bool(first) and parts[0] == "blocks" and int(parts[1]) + 1 >= first


def _attention(backbone: Backbone) -> str:
    """Which attention a network has: a name of `attention.KINDS`, or PLAIN."""
    return str(backbone.card.get("vit", {}).get("attention", attention.PLAIN))


def _without_bias(state: dict[str, Tensor], patches: int) -> dict[str, Tensor]:
    """Weights for a patch embedding without bias, as timm makes it before a LayerNorm: the positions of patches take it."""
    bias, table = state.pop("patch_embed.proj.bias"), state["pos_embed"].clone()
    table[:, -patches:] += bias
    return {**state, "pos_embed": table}


def load(recipe: Recipe, weights: str | Path | None = None) -> Start | None:
    """Load what a recipe starts from.

    Args:
        recipe: What is trained.
        weights: A file with the weights of its `init`, in place of the published ones.

    Returns:
        The start, None for random weights.

    Raises:
        InputError: For a network that is no plain ViT of the recipe's shape, that has another number of registers, for
            neurons that it does not have, and for whatever `registry.load` raises.
    """
    if not recipe.init:
        if weights:
            raise InputError(
                "--weights are of the network that a run starts from: name it, as init=deit_tiny_patch16_224"
            )
        return None
    name, ending = test_time.split(recipe.init)
    if ending:
        raise InputError(f"a run starts from a network as it is: init={name} (distil takes teacher={ending})")
    backbone = registry.load(recipe.init, weights=weights, device="cpu")
    net: Any = backbone.net
    if type(net) is not timm.models.VisionTransformer:
        raise InputError(f"{backbone.name} ({type(net).__name__}) cannot be trained on: it is no plain ViT of timm")
    if odd := set(kinds := backbone.kinds((1, 1))) - {"cls", "register", "patch"}:
        raise InputError(f"{backbone.name} cannot be trained on: it has {min(odd)} tokens")
    if "cls" not in kinds:
        raise InputError(f"{backbone.name} cannot be trained on: it has no CLS token")
    _check_shape(backbone, recipe)
    if backbone.registers and recipe.registers != backbone.registers:
        raise InputError(
            f"{backbone.name} has {backbone.registers} registers: give registers={backbone.registers}, not {recipe.registers}"
        )
    _check_architecture(backbone, recipe)
    neurons = _neurons(backbone, recipe)
    backbone.fit((recipe.image_size, recipe.image_size))
    digest = sha256(json.dumps(neurons, sort_keys=True).encode()).hexdigest()[:8]
    return Start(backbone, neurons, f"{backbone.weights}:{digest}")


def _check_shape(backbone: Backbone, recipe: Recipe) -> None:
    """Raise InputError unless a network has the width, depth, heads and patches that a recipe says."""
    net: Any = backbone.net
    shape = (backbone.width, backbone.depth, net.blocks[0].attn.num_heads)
    patch = backbone.patch_size[0]
    if shape == SIZES[recipe.size] and patch == recipe.patch_size:
        return
    size = next((name for name, known in SIZES.items() if known == shape), None)
    words = f"width {shape[0]}, depth {shape[1]}, {shape[2]} heads and patches of {patch} pixels"
    if size is None:
        raise InputError(f"{backbone.name} has {words}: no size of a recipe is like that")
    raise InputError(f"{backbone.name} has {words}: give size={size} patch_size={patch}")


def _check_architecture(backbone: Backbone, recipe: Recipe) -> None:
    """Raise InputError unless a network can get the attention and the LayerNorm that a recipe says."""
    net: Any = backbone.net
    has = _attention(backbone)
    if has != attention.PLAIN and recipe.attention != has:
        raise InputError(f"{backbone.name} has attention={has}: give attention={has}, not {recipe.attention}")
    if recipe.patch_norm and not isinstance(net.norm_pre, nn.Identity):
        raise InputError(f"{backbone.name} has a LayerNorm before its first block: leave patch_norm out")


def _neurons(backbone: Backbone, recipe: Recipe) -> dict[int, list[int]]:
    """The neurons that a recipe zeroes."""
    if recipe.zeroed == "none":
        return {}
    path = Path(recipe.zeroed).expanduser()
    if recipe.zeroed in ("register", "random"):
        path = _stored(backbone)
    elif not path.is_file():
        raise InputError(
            f"zeroed is none, register, random or the file of a neuron list: there is no {recipe.zeroed!r}"
        )
    found = test_time.read_list(path)
    test_time.check_list(backbone, found, path)
    if recipe.dead and any(not _plain_mlp(backbone, b) for b in found.neurons):
        raise InputError(f"dead is not known of the MLPs of {backbone.name}, which have gates: leave it out")
    if recipe.zeroed == "random":
        return test_time.random_neurons(backbone, found.neurons, seed=recipe.seed)
    return found.neurons


def _stored(backbone: Backbone) -> Path:
    """The list of a network's register neurons."""
    try:
        return test_time.list_of(backbone.name, "+suppressed")
    except InputError as error:
        raise InputError(
            f"no register neurons of {backbone.name} are stored: find them with vitregs neurons … --out FILE, and give "
            "zeroed=FILE"
        ) from error


def _plain_mlp(backbone: Backbone, block: int) -> bool:
    """Whether the inputs of a block's neurons are rows of one matrix."""
    blocks: Any = backbone.net.blocks
    mlp = blocks[block - 1].mlp
    first = getattr(mlp, "fc1", None)
    return isinstance(first, nn.Linear) and first.out_features == mlp.fc2.in_features and first.bias is not None

"""Test-time registers: tokens appended to a trained ViT, and the activations of register neurons moved to them.

Nothing is trained. The appended tokens have no position and enter block 1 as zeros, so that timm's ViT becomes one with
registers, which everything else here takes like any other. Controls stand beside it: tokens alone, random neurons, and
neurons suppressed without a token (Jiang et al., "Vision Transformers Don't Need Trained Registers", 2025).
"""

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from vitregs import paths
from vitregs.cache import write_whole
from vitregs.errors import InputError, unknown
from vitregs.models.backbone import Backbone

LISTS = paths.ROOT / "data" / "neurons"  # register neurons of published networks, a file each
Blocks = Mapping[int, Sequence[int]]  # number of a block, from 1 → numbers of its neurons, from 0
NAME = re.compile(r"(?P<network>.+)\+(?P<how>tt|zero|random)(?P<count>\d+(?:\.\d+)?)(?::(?P<file>.+))?")
SUPPRESSED = re.compile(r"(?P<network>.+)\+suppressed(?::(?P<file>.+))?")
MOST = 4096  # appended tokens: their attention takes memory that grows with the square
TOLERANCE = 0.05  # of the length of a neuron's output weights, by which a list knows its network


# --- lists of neurons
@dataclass(frozen=True)
class NeuronList:
    """Register neurons of one network, as `vitregs neurons` finds and stores them.

    Attributes:
        network: timm's name of it, or the zoo's.
        neurons: Number of a block, from 1 → numbers of its neurons, from 0.
        lengths: The L2 norm of each neuron's output weights, in the same order: what tells the network from others.
        found: How they were found: layer, cutoff, images, weights, commit, in plain values.
    """

    network: str
    neurons: dict[int, list[int]]
    lengths: dict[int, list[float]]
    found: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write the list as JSON."""
        text = json.dumps(
            {
                "network": self.network,
                "neurons": {str(b): n for b, n in self.neurons.items()},
                "lengths": {str(b): [round(v, 5) for v in n] for b, n in self.lengths.items()},
                "found": self.found,
            },
            indent=1,
        )
        write_whole(path, lambda spare: spare.write_text(text + "\n"))


def read_list(path: Path) -> NeuronList:
    """Read a list of register neurons.

    Args:
        path: A JSON file that `NeuronList.write` wrote.

    Returns:
        The list.

    Raises:
        InputError: The file is missing, or no such list.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
        neurons = {int(b): [int(j) for j in n] for b, n in raw["neurons"].items()}
        lengths = {int(b): [float(v) for v in n] for b, n in raw["lengths"].items()}
        found = NeuronList(str(raw["network"]), neurons, lengths, dict(raw["found"]))
    except OSError as error:
        raise InputError(f"cannot read the neuron list {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no list of register neurons: make one with vitregs neurons") from error
    if {b: len(n) for b, n in neurons.items()} != {b: len(n) for b, n in lengths.items()}:
        raise InputError(f"{path} is no list of register neurons: its neurons and lengths differ in number")
    if not any(neurons.values()):
        raise InputError(f"{path} names no neurons: there is nothing to move, +zero1 appends a token alone")
    return found


def lengths(backbone: Backbone, neurons: Blocks) -> dict[int, list[float]]:
    """L2 norms of the output weights of neurons: network, neurons → the same, a number for each."""
    return {b: projection(backbone, b).weight[:, list(n)].float().norm(dim=0).tolist() for b, n in neurons.items()}


def check_list(backbone: Backbone, found: NeuronList, path: Path) -> None:
    """Raise InputError unless a list was made for these weights: network, list, the file it comes from."""
    other = InputError(
        f"the neuron list {path} belongs to other weights than these of {backbone.name}: find this network's with "
        "vitregs neurons"
    )
    check_neurons(backbone, found.neurons, other)
    for block, here in lengths(backbone, found.neurons).items():
        if not np.allclose(here, found.lengths[block], rtol=TOLERANCE):
            raise other


# --- what of a block is changed
def projection(backbone: Backbone, block: int) -> nn.Linear:
    """The output projection of a block's MLP, whose inputs are its neurons: network, number of the block from 1 → module.

    Raises InputError for blocks whose MLP has another form than timm's `Mlp`, `GluMlp` and `SwiGLU`.
    """
    blocks: Any = backbone.net.blocks
    if not 1 <= block <= len(blocks):
        raise InputError(f"block {block} does not exist: {backbone.name} has blocks 1 to {len(blocks)}")
    found = getattr(getattr(blocks[block - 1], "mlp", None), "fc2", None)
    if not isinstance(found, nn.Linear):
        raise InputError(
            f"block {block} of {backbone.name} ({type(blocks[block - 1]).__name__}) has no MLP of known form: "
            "its neurons cannot be told"
        )
    return found


def check_neurons(backbone: Backbone, neurons: Blocks, problem: InputError | None = None) -> None:
    """Raise InputError for blocks and neurons that a network does not have."""
    for block, numbers in neurons.items():
        if problem and not 1 <= block <= backbone.depth:
            raise problem
        width = projection(backbone, block).in_features
        for number in numbers:
            if not 0 <= number < width:
                raise problem or InputError(
                    f"neuron {number} does not exist: block {block} of {backbone.name} has neurons 0 to {width - 1}"
                )


class _Insert(nn.Module):
    """What stands before the blocks, and behind it tokens put in front of the patches."""

    def __init__(self, norm: nn.Module, start: Tensor, at: int) -> None:
        super().__init__()
        self.norm, self.at = norm, at
        self.register_buffer("start", start, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        start: Any = self.start
        return torch.cat([x[:, : self.at], start.to(x.dtype).expand(len(x), -1, -1), x[:, self.at :]], 1)


class _Appended:
    """A ViT of timm whose positions and pooling know nothing of the appended tokens."""

    appended: int
    num_prefix_tokens: int

    @contextmanager
    def _own_prefix(self) -> Iterator[None]:
        """Count the prefix as the original network does."""
        self.num_prefix_tokens -= self.appended
        try:
            yield
        finally:
            self.num_prefix_tokens += self.appended

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Set the size as timm does."""
        with self._own_prefix():
            super().set_input_size(*args, **kwargs)  # type: ignore[misc]

    def _pos_embed(self, *args: Any, **kwargs: Any) -> Any:
        """Add positions as timm does, which may resize them to the image."""
        with self._own_prefix():
            return super()._pos_embed(*args, **kwargs)  # type: ignore[misc]

    def pool(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pool as timm does, without the appended tokens: attention pooling reads all that it is given."""
        with self._own_prefix():
            at = self.num_prefix_tokens
            return super().pool(torch.cat([x[:, :at], x[:, at + self.appended :]], 1), *args, **kwargs)  # type: ignore[misc]


def twin(net: nn.Module) -> Any:
    """Copy a network but for its weights, which both share: module → copy, whose changes leave no trace on the original."""
    shared = {id(p): p for p in chain(net.parameters(), net.buffers())}
    return copy.deepcopy(net, shared)


def changed(backbone: Backbone, net: nn.Module, ending: str, settings: Any) -> Backbone:
    """Make a backbone of a changed network, known by a name and a key of its own.

    Args:
        backbone: The original, whose positions are resized for other sizes.
        net: The changed module.
        ending: Of the new name.
        settings: All that decides the change, as JSON can hold it.

    Returns:
        The new backbone.
    """
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    made = replace(backbone, name=backbone.name + ending, net=net, weights=f"{backbone.weights}{ending}:{digest}")
    made._tables, made._native = backbone._tables, backbone._native
    return made


def _plain(neurons: Blocks) -> dict[int, list[int]]:
    """Each neuron once, in order: one that was moved twice would be lost."""
    return {int(b): sorted({int(j) for j in n}) for b, n in sorted(neurons.items()) if len(n)}


def _signed(mlp: Any) -> bool:
    """Whether a neuron of an MLP may fire below zero as well as above: a product or a norm stands before its output."""
    gated = isinstance(mlp, GluMlp | SwiGLU)
    return gated or not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)


def _mover(numbers: list[int], at: int, count: int, signed: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Move neurons' activations from the patches to the appended tokens, in place: nothing else holds them yet."""

    def move(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        for number in numbers:  # a column each, so that no copy is made
            patches = x[:, at + count :, number]
            most = patches.amax(1, keepdim=True)
            if signed:
                least = patches.amin(1, keepdim=True)
                most = torch.where(-least > most, least, most)
            x[:, at : at + count, number] = most
            patches.zero_()

    return move


def _weigh(log: float, at: int) -> Callable[..., Any]:
    """Add a number to the attention logits of one token."""

    def bias(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        mask = torch.zeros(1, 1, 1, x.shape[1], dtype=x.dtype, device=x.device)
        mask[..., at] = log
        given = kwargs.get("attn_mask")
        return args, kwargs | {"attn_mask": mask if given is None else given + mask}

    return bias


# --- remedies
def append(
    backbone: Backbone,
    count: int = 1,
    *,
    neurons: Blocks | None = None,
    start: Tensor | None = None,
    weight: float = 1.0,
    name: str = "",
) -> Backbone:
    """Append tokens to a trained ViT and move the activations of neurons there.

    In every block named, the activation of each neuron becomes 0 on all patches and its largest value over the patches of the
    image on the appended tokens (in a gated MLP, whose neurons fire in either sign, the one furthest from 0); CLS keeps its own.
    Weights are shared with the network given, which is left as it is.

    Args:
        backbone: A network without registers.
        count: Appended tokens, 1 or more. They see no position.
        neurons: Number of a block, from 1 → numbers of its neurons, from 0; without any, the tokens alone are appended.
        start: What the tokens are at the input of block 1, (channels) or (count, channels); zeros by default.
        weight: How many such tokens each stands for, any positive number: its attention logits carry + ln(weight), which
            for equal tokens is the same as their number.
        name: Ending of the new network's name; by default "+tt" or "+zero" and the count.

    Returns:
        A network whose appended tokens are registers by kind.

    Raises:
        InputError: The network has registers, keeps tables of relative positions, or has no such blocks or neurons.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico")
        >>> cured = append(vit, neurons={4: [7, 12]})
        >>> cured.name, cured.kinds((1, 2)), vit.registers
        ('supervised-pico+tt1', ['cls', 'register', 'patch', 'patch'], 0)
    """
    moved = _plain(neurons or {})
    if not isinstance(count, int) or count < 1:
        raise InputError(f"1 or more tokens are appended, not {count!r}")
    if count > MOST:
        raise InputError(
            f"{count} tokens would not fit into memory: append {MOST} at most; for zeros, one of weight {count} gives "
            "the same patches (append(…, weight=…))"
        )
    if not 0 < weight < math.inf:
        raise InputError(f"the weight of a token is a positive number, not {weight}")
    if weight != 1 and count != 1:
        raise InputError("a weight stands for a number of tokens: append one token, or give none")
    if backbone.registers:
        number = f"{backbone.registers} register{'' if backbone.registers == 1 else 's'}"
        raise InputError(f"{backbone.name} has {number}: test-time registers are for networks without")
    original: Any = backbone.net
    if not hasattr(original, "norm_pre") or not hasattr(original, "set_input_size"):
        raise InputError(
            f"{backbone.name} ({type(original).__name__}) takes no further tokens: its attention keeps a table of "
            "relative positions"
        )
    check_neurons(backbone, moved)
    first = (
        torch.zeros(1, count, backbone.width)
        if start is None
        else start.detach().float().reshape(1, -1, backbone.width)
    )
    if first.shape[1] not in (1, count):
        raise InputError(f"start holds one token or {count}, not {first.shape[1]}")
    first = first.expand(1, count, -1).contiguous().to(backbone.device)
    net = twin(original)
    net.norm_pre = _Insert(net.norm_pre, first, backbone.prefix)
    net.__class__ = type(type(net).__name__, (_Appended, type(net)), {})
    net.appended, net.num_reg_tokens = count, count + int(getattr(net, "num_reg_tokens", 0) or 0)
    net.num_prefix_tokens += count
    for part in net.blocks.modules():
        if hasattr(part, "num_prefix_tokens"):  # rotary attention leaves these tokens unrotated
            part.num_prefix_tokens += count
    if weight != 1:
        for part in [m for m in net.blocks.modules() if hasattr(m, "fused_attn")]:  # timm's mark of an attention
            part.register_forward_pre_hook(_weigh(math.log(weight), backbone.prefix), with_kwargs=True)
    for block, numbers in moved.items():
        mlp = net.blocks[block - 1].mlp
        mlp.fc2.register_forward_pre_hook(_mover(numbers, backbone.prefix, count, _signed(mlp)))
    amount = f"{weight:g}" if weight != 1 else str(count)
    ending = name or f"+{'tt' if moved else 'zero'}{amount}"
    settings = [count, weight, moved, None if start is None else [round(float(v), 6) for v in first.flatten()]]
    return changed(backbone, net, ending, settings)


def suppress(backbone: Backbone, neurons: Blocks, *, name: str = "+suppressed") -> Backbone:
    """Set the activation of neurons to zero on all tokens.

    Args:
        backbone: A network.
        neurons: Number of a block, from 1 → numbers of its neurons, from 0.
        name: Ending of the new network's name.

    Returns:
        A network that shares its weights with the one given, which is left as it is.

    Raises:
        InputError: The network has no such blocks or neurons.

    Example:
        >>> import vitregs as vr
        >>> suppress(vr.load("supervised-pico"), {4: [7, 12]}).name
        'supervised-pico+suppressed'
    """
    off = _plain(neurons)
    check_neurons(backbone, off)
    net = twin(backbone.net)
    for block, numbers in off.items():

        def silence(_module: nn.Module, given: tuple[Tensor, ...], numbers: list[int] = numbers) -> None:
            for number in numbers:
                given[0][..., number].zero_()

        net.blocks[block - 1].mlp.fc2.register_forward_pre_hook(silence)
    return changed(backbone, net, name, off)


def without_tokens(backbone: Backbone, removed: Tensor) -> Backbone:
    """Hide tokens from all others, which then run as if these were not in the sequence.

    Args:
        backbone: A network whose attention takes a mask.
        removed: bool (images or 1, tokens); the batch that runs must have as many images.

    Returns:
        A network that shares its weights with the one given, which is left as it is. States of the hidden tokens themselves
        mean nothing.

    Raises:
        InputError: A block's attention takes no mask, or an image keeps no token.
    """
    if bool(removed.all(1).any()):
        raise InputError("every token of an image is hidden: leave one at least")
    net = twin(backbone.net)
    seen = ~removed[:, None, None].to(backbone.device)

    def hide(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("attn_mask")
        if given is None or given.dtype == torch.bool:
            return args, kwargs | {"attn_mask": seen if given is None else given & seen}
        return args, kwargs | {"attn_mask": given.masked_fill(~seen, -torch.inf)}

    for number, block in enumerate(net.blocks, 1):
        attention = getattr(block, "attn", None)
        if attention is None or "attn_mask" not in inspect.signature(attention.forward).parameters:
            raise InputError(
                f"block {number} of {backbone.name} takes no attention mask: no token can be hidden from it"
            )
        attention.register_forward_pre_hook(hide, with_kwargs=True)
    digest = sha256(removed.cpu().numpy().tobytes()).hexdigest()[:8]
    return changed(backbone, net, "+hidden", [list(removed.shape), digest])


def random_neurons(backbone: Backbone, neurons: Blocks, *, seed: int = 0) -> dict[int, list[int]]:
    """Draw as many random neurons in each block as are named, none of these: the control of a list.

    Args:
        backbone: The network.
        neurons: Number of a block, from 1 → numbers of its neurons, from 0.
        seed: Of the draw.

    Returns:
        The same, of other neurons.

    Raises:
        InputError: A block has too few others.
    """
    draw, found = np.random.default_rng(seed), {}
    for block, numbers in _plain(neurons).items():
        others = np.setdiff1d(np.arange(projection(backbone, block).in_features), numbers)
        if len(others) < len(numbers):
            raise InputError(f"block {block} of {backbone.name} has too few other neurons to compare with")
        found[block] = sorted(int(j) for j in draw.choice(others, len(numbers), replace=False))
    return found


# --- names
def split(name: str) -> tuple[str, str]:
    """Split the name of a changed network: NETWORK+tt1 → NETWORK and "+tt1"; other names come back whole, with ""."""
    match = NAME.fullmatch(name) or SUPPRESSED.fullmatch(name)
    return (match["network"], name[len(match["network"]) :]) if match else (name, "")


def appended(ending: str) -> int:
    """Count the tokens that an ending appends: "+zero8" → 8, "+suppressed" → 0; one of any weight is one."""
    match = NAME.fullmatch(f"network{ending}")
    count = float(match["count"]) if match else 0.0
    return int(count) if count.is_integer() else 1


def check_ending(name: str, ending: str) -> None:
    """Raise InputError for an ending that says nothing `apply` can do: name of the network, its ending."""
    match = NAME.fullmatch(name + ending)
    if match and match["how"] == "zero":
        if match["file"]:
            raise InputError(f"{ending} moves no neurons: leave out the list")
        if not float(match["count"]):
            raise InputError(f"{ending} appends nothing: name {name} itself")
        return
    if match and (not match["count"].isdigit() or not int(match["count"])):
        raise InputError(f"{ending} must append a whole number of tokens, 1 or more")
    list_of(name, ending)


def list_of(name: str, ending: str) -> Path:
    """Find the neuron list that an ending needs: network, ending → path. Raises InputError if there is none."""
    match = NAME.fullmatch(name + ending) or SUPPRESSED.fullmatch(name + ending)
    given = match["file"] if match else None
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise InputError(f"cannot read the neuron list {given}: there is no such file")
        return path
    folder = Path(name).expanduser()  # of a network trained here
    bare = folder.resolve().name if (folder / "recipe.json").is_file() else name.partition("@")[0].split(".")[0]
    path = LISTS / f"{bare}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in LISTS.glob("*.json"))) or "none"
        raise InputError(
            f"no register neurons of {bare} are stored (known: {known}): find them with vitregs neurons {bare} --out FILE "
            f"and name {name}{ending}:FILE"
        )
    return path


def apply(backbone: Backbone, name: str, ending: str) -> Backbone:
    """Change a network as the ending of its name says: "+tt1", "+zero8", "+zero2.5", "+random1", "+suppressed".

    Args:
        backbone: The network.
        name: The name that it was loaded by, which finds its neuron list.
        ending: "+tt1" appends a token and moves the register neurons to it; "+zero8" appends 8 tokens alone, "+zero2.5" one
            of that weight; "+random1" moves as many random neurons; "+suppressed" silences the register neurons. A list in
            place of the stored one follows a colon: "+tt1:FILE".

    Returns:
        The changed network.

    Raises:
        InputError: As `append` does, and for a missing list, or one of other weights.
    """
    match = NAME.fullmatch(name + ending)
    if match and match["how"] == "zero":
        number = float(match["count"])
        return append(backbone, int(number)) if number.is_integer() else append(backbone, weight=number)
    path = list_of(name, ending)
    found = read_list(path)
    check_list(backbone, found, path)
    short = ending.partition(":")[0]
    if match is None:
        return suppress(backbone, found.neurons)
    if match["how"] == "random":
        others = random_neurons(backbone, found.neurons)
        return append(backbone, int(match["count"]), neurons=others, name=short)
    if match["how"] == "tt":
        return append(backbone, int(match["count"]), neurons=found.neurons)
    raise unknown("ending", ending, ("+tt1", "+zero1", "+random1", "+suppressed"))

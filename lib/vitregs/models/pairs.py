"""Networks that differ in their registers alone."""

import re
from collections.abc import Hashable, Iterable
from typing import Any

from timm.models import get_pretrained_cfg

from vitregs.models import attention, registry, test_time

REGISTERS = re.compile(r"_reg(\d+)")  # in the name of a published architecture or of its weights


def register_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Networks that differ in their registers alone: names → (without, with), in the order of those with registers.

    Two networks of the zoo are a pair if their stored recipes and the content of their images agree in all but the name and the
    number of registers, which is 0 for one of them. Two published networks are a pair if timm's names of architecture and
    weights agree once "_reg4" is left out. A network is a pair with itself and test-time registers ("+tt1", "+zero8"). What is
    neither in the zoo nor known to timm has no other partner.

    Example:
        >>> register_pairs(["clip-pico", "mae-pico-reg4", "clip-pico-reg4", "clip-pico-reg1"])
        [('clip-pico', 'clip-pico-reg4'), ('clip-pico', 'clip-pico-reg1')]
        >>> register_pairs(["mae-pico", "mae-pico+zero8"])
        [('mae-pico', 'mae-pico+zero8')]
    """
    told = {name: _facts(name) for name in names}
    return [
        (without, name)
        for name, (registers, facts) in told.items()
        for without, (none, others) in told.items()
        if registers and not none and _agree(facts, others)
    ]


def comparable(first: str, names: Iterable[str]) -> list[str]:
    """Networks that differ from the first in registers and seed alone: a name, names → those of them, without the first.

    Example:
        >>> comparable("clip-pico", ["clip-pico-reg4", "clip-pico-seed1", "mae-pico-reg4"])
        ['clip-pico-reg4', 'clip-pico-seed1']
    """
    facts = {name: {k: v for k, v in _facts(name)[1].items() if k != "seed"} for name in (first, *names)}
    return [name for name in facts if name != first and _agree(facts[first], facts[name])]


def _facts(name: str) -> tuple[int, dict[str, Any]]:
    """Number of registers, and all else that a partner must share."""
    network, ending = test_time.split(name)
    if ending:
        registers, facts = _facts(network)
        return registers + test_time.appended(ending), {**facts, "suppressed": "suppressed" in ending}
    if name in registry.zoo():
        card = registry.card(name)
        recipe = {"attention": attention.PLAIN, **card["recipe"]}  # which no card tells
        rest = {k: v for k, v in recipe.items() if k not in ("name", "registers")}
        facts = {**rest, "fingerprint": card.get("images", {}).get("fingerprint"), "suppressed": False}
        return int(card["recipe"]["registers"]), facts
    known = get_pretrained_cfg(name)
    if known is None:
        return 0, {"name": name, "suppressed": False}
    names = {"architecture": f"_{known.architecture}", "tag": f"_{known.tag}"}
    found = REGISTERS.search(names["architecture"])
    words = {k: REGISTERS.sub("", part) for k, part in names.items()}
    return int(found[1]) if found else 0, {**words, "suppressed": False}


def _agree(one: dict[str, Hashable], two: dict[str, Hashable]) -> bool:
    """Whether two networks share all facts that both have: settings that came later are missing in the first recipes."""
    both = one.keys() & two.keys()
    return len(both) > 1 and all(one[k] == two[k] for k in both)

"""Which networks differ in their registers alone: by recipes in the zoo, by timm's names elsewhere; never by their order."""

import json
from pathlib import Path

import pytest

from vitregs.models import registry
from vitregs.models.pairs import register_pairs


def test_every_pair_of_the_zoo_and_no_other() -> None:
    found = register_pairs(registry.zoo())
    assert ("clip-pico-seed1", "clip-pico-reg4-seed1") in found
    assert {b for a, b in found if a == "clip-pico"} == {f"clip-pico-reg{n}" for n in (1, 2, 4, 8, 16)}
    for plain, with_ in found:
        a, b = (registry.card(name)["recipe"] for name in (plain, with_))
        assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {"name", "registers"}
        assert a["registers"] == 0 < b["registers"]
    alone = {n for n in registry.zoo() if "-reg" in n} - {b for _, b in found}
    assert alone == set()  # all networks with registers have their partner here


def test_neighbours_in_a_list_are_no_pair() -> None:
    assert register_pairs(["clip-pico", "mae-pico-reg4"]) == []
    assert register_pairs(["clip-pico-seed1", "clip-pico-reg4"]) == []
    assert register_pairs(["clip-pico-reg1", "clip-pico-reg4"]) == []
    mixed = ["mae-pico-reg4", "clip-pico", "dino-pico", "clip-pico-reg4", "mae-pico"]
    assert register_pairs(mixed) == [("mae-pico", "mae-pico-reg4"), ("clip-pico", "clip-pico-reg4")]


def test_published_networks_pair_by_architecture_and_weights() -> None:
    small = ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m")
    assert register_pairs(reversed(small)) == [small]
    assert register_pairs([small[0].split(".")[0], small[1]]) == [
        (small[0].split(".")[0], small[1])
    ]  # timm's default tag
    assert register_pairs(["vit_base_patch14_dinov2.lvd142m", small[1]]) == []
    gap = "vit_betwixt_patch16_reg4_gap_256"
    assert register_pairs([f"{gap}.sbb_in1k", f"{gap}.sbb_in12k", "vit_base_patch16_224.augreg_in1k"]) == []
    assert register_pairs(["nothing", "nothing-reg4", "nothing_reg4"]) == []


def test_other_settings_or_other_images_part_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ZOO", tmp_path)

    def entry(name: str, registers: int, fingerprint: str | None = None, **settings: object) -> None:
        recipe = {"name": name, "registers": registers, "seed": 0, "lr": 0.1, "data": "here", **settings}
        (tmp_path / name).mkdir()
        images = {"images": {"fingerprint": fingerprint}} if fingerprint else {}
        (tmp_path / name / "recipe.json").write_text(json.dumps({"recipe": recipe, **images}))

    entry("one", 0, "aa")
    entry("same", 2, "aa", momentum=0.9)  # a setting that came later, which the first run did not write down
    entry("faster", 2, "aa", lr=0.2)
    entry("elsewhere", 2, "bb")  # another folder of that name
    entry("gated", 2, "aa", attention="gated")  # recipes with plain attention do not write it down
    assert register_pairs(["one", "same", "faster", "elsewhere", "gated"]) == [("one", "same")]

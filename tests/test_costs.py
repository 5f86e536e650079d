"""What registers cost, against torch's own count of operations, timm's parameters and the paper's figure 12."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitregs.data import published
from vitregs.errors import InputError
from vitregs.measure import cost
from vitregs.measure.cost import Shape
from vitregs.models import registry

SMALL = Shape(width=24, depth=3, patches=4 * 6, patch=(8, 8))


def network(registers: int = 0, **more: object) -> torch.nn.Module:
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}
    net = timm.models.VisionTransformer(**options, no_embed_class=bool(registers), reg_tokens=registers, **more)  # type: ignore[arg-type]
    return net.eval()


@pytest.mark.parametrize("registers", [0, 1, 5])
@pytest.mark.parametrize("mlp", [4.0, 2.5])
def test_operations_are_those_that_torch_counts(registers: int, mlp: float) -> None:
    shape = Shape(width=24, depth=3, patches=24, patch=(8, 8), mlp=mlp)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(registers, mlp_ratio=mlp)(torch.rand(2, 3, 32, 48))
    assert cost.operations(shape, registers) == counter.get_total_flops() / 2 / 2  # two images, two per multiply-add


@pytest.mark.parametrize("mlp", [4.0, 2.5])
def test_parameters_are_those_of_timm(mlp: float) -> None:
    shape = Shape(width=24, depth=3, patches=24, patch=(8, 8), mlp=mlp)
    assert cost.parameters(shape) == sum(p.numel() for p in network(mlp_ratio=mlp).parameters())
    without_class = Shape(width=24, depth=3, patches=24, patch=(8, 8), mlp=mlp, positions=24)
    assert cost.parameters(without_class, 5) == sum(p.numel() for p in network(5, mlp_ratio=mlp).parameters())


def test_the_papers_figure_comes_out_to_every_digit() -> None:
    table = published.table("fig12")
    assert set(table["model"]) == set(cost.PUBLISHED)
    for row in table.itertuples():
        found = cost.increase(cost.PUBLISHED[row.model], [row.registers]).iloc[0]
        assert round(found.flops, 2) == row.flops_increase_percent
        if row.params_increase_percent == row.params_increase_percent:
            assert round(found.parameters, 4) == row.params_increase_percent


def test_an_increase_is_zero_without_registers_and_falls_with_resolution() -> None:
    table = cost.increase(SMALL, [0, 1, 2])
    assert table["registers"].tolist() == [0, 1, 2]
    assert table.loc[0, ["flops", "parameters"]].tolist() == [0, 0]
    assert table["flops"].is_monotonic_increasing
    large = cost.increase(Shape(width=24, depth=3, patches=96, patch=(8, 8)), [2])
    assert large.loc[0, "flops"] < table.loc[2, "flops"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 3},
        {"embed_dim": 48, "num_heads": 3, "depth": 2},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_the_shape_of_a_network_counts_its_operations(options: dict[str, object]) -> None:
    backbone = registry.random(
        "vit_tiny_patch16_224", **{"img_size": (32, 48), "depth": 3, "num_classes": 0, **options}
    )
    shape = cost.shape_of(backbone, (32, 48))
    assert (shape.patches, shape.prefix) == (6, backbone.prefix - backbone.registers)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        backbone.net(torch.rand(1, 3, 32, 48))
    assert cost.operations(shape, backbone.registers) == counter.get_total_flops() / 2
    weights = sum(p.numel() for p in backbone.net.parameters())
    assert cost.parameters(shape, backbone.registers) == weights


def test_the_shape_counts_a_gated_mlp_as_it_is() -> None:
    backbone = registry.random("vit_giant_patch14_dinov2", img_size=(28, 42), depth=2, embed_dim=48, num_heads=3)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        backbone.net(torch.rand(1, 3, 28, 42))
    assert cost.operations(cost.shape_of(backbone, (28, 42))) == counter.get_total_flops() / 2


@pytest.mark.parametrize("options", [{"width": 0}, {"depth": 0}, {"patches": 0}, {"prefix": -1}, {"mlp": 0}])
def test_shapes_that_are_no_network(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="is none"):
        Shape(**{"width": 24, "depth": 3, "patches": 24, **options})  # type: ignore[arg-type]


def test_registers_are_not_negative() -> None:
    with pytest.raises(InputError, match="registers must be 0 or more, not -1"):
        cost.operations(SMALL, -1)

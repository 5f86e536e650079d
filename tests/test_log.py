"""The laboratory log quotes only what stored runs say."""

import numpy as np
import pytest

from vitregs import artifacts, backbones, results

DEIT = results.ROOT / "data" / "results" / "deit_tiny_on_coco"
MODEL = "deit_tiny_patch16_224.nc"


def test_deit_tiny_has_a_minor_mode_and_no_outliers() -> None:
    norms = results.load(DEIT / "02_norms" / f"norms.{MODEL}")["value"]
    assert norms.sizes["image"] == 32
    table = artifacts.by_layer(norms).set_index("layer")
    late, early = table.loc[10:], table.loc[1:9]
    assert (early["share"] == 0).all()
    assert table["cutoff"].isna().all()
    assert late["ratio"].between(1.75, 2.1).all()
    assert late["share"].to_numpy() == pytest.approx(0.04, abs=0.005)
    assert late["separation"].between(4.5, 6).all()
    assert artifacts.verdict(table.reset_index())[0] == "none"
    assert artifacts.largest_ratio(norms).sel(layer=12).median() == pytest.approx(2.3, abs=0.05)


def test_its_large_norms_sit_on_redundant_patches() -> None:
    norms = results.load(DEIT / "04_redundant_patches" / f"norms.{MODEL}")["value"]
    similar = results.load(DEIT / "04_redundant_patches" / f"similarity.{MODEL}")["value"].values
    marked, what = artifacts.mark(norms, artifacts.cutoff(norms), 0.02)
    hot = artifacts.patches(marked).values
    assert what == "top 2 % of norms"
    assert np.median(similar[hot]) == pytest.approx(0.970, abs=0.002)
    assert np.median(similar[~hot]) == pytest.approx(0.671, abs=0.002)


@pytest.mark.parametrize(("step", "share"), [(3000, 0.016), (5000, 0.012), (10_000, 0.002), (14_000, 0), (20_000, 0)])
def test_the_upper_branch_of_the_register_model_comes_and_goes(step: int, share: float) -> None:
    log = backbones.history("supervised-pico-reg4")
    assert log is not None
    then = log.sel(step=step).isel(layer=-1)
    counts = then["hist"].values
    above = counts[then["bin"].values > 2.5 * float(then["median"])].sum() / counts.sum()
    assert above == pytest.approx(share, abs=0.0006)

"""How the mode rule's answers depend on its limits: rates on simulated norms, for limits of strength and of separation.

    python -m tests.benchmarks.sensitivity [--draws N] [--network NAME] [--weights FILE] [--images FOLDER]

The rule itself has no limit of strength and asks for a separation of 3. Every draw is judged once with the least separation, and
the stricter limits are applied to what was found. With a network, its own strength and separation are told beside.
"""

import argparse

import numpy as np
import pandas as pd

from tests import test_cutoffs
from vitregs.measure import mixture

STRENGTHS, SEPARATIONS = (1.5, 2.0, 2.5, 3.0, 4.0), (2.5, 3.0, 3.5, 4.0)
PLANTED = (1.8, 3.0, 10.0)


def draws(count: int) -> dict[str, list[mixture.Cutoff]]:
    """Cut-offs of simulated norms at the least separation: {what was drawn: one for each draw}."""
    found = {}
    rng = np.random.default_rng(11)
    families = list(test_cutoffs.FAMILIES.values())
    found["no mode"] = [mixture._find(families[i % 4](rng), "") for i in range(count)]
    for strength in PLANTED:
        found[f"mode at {strength:g}"] = [
            mixture._find(test_cutoffs.mixture(rng, test_cutoffs.between(rng, 0.01, 0.1), strength, 0.1, 0.1), "")
            for _ in range(count)
        ]
    return found


def table(found: dict[str, list[mixture.Cutoff]]) -> pd.DataFrame:
    """Percent of draws with a mode under every pair of limits."""
    rows = []
    for separation in SEPARATIONS:
        for strength in STRENGTHS:
            row: dict[str, float] = {"separation": separation, "strength": strength}
            for name, cuts in found.items():
                hits = [c.value is not None and c.separation >= separation and c.ratio >= strength for c in cuts]
                row[name] = 100 * float(np.mean(hits))
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--network")
    parser.add_argument("--weights")
    parser.add_argument("--images", default="scenes")
    asked = parser.parse_args()
    mixture.LEAST_SEPARATION = min(SEPARATIONS)
    print(table(draws(asked.draws)).to_string(index=False, float_format="%.1f"))
    if asked.network:
        import vitregs as vr
        from vitregs.measure import fingerprint, outliers

        vit = vr.load(asked.network, weights=asked.weights)
        images = vr.open_images(asked.images, size=vit.size, count=128, preparation=vit.preparation)
        layers = outliers.layer_evidence(vr.capture(vit, images, norms=True).norms)
        best = fingerprint.strongest_mode(layers)
        print("no mode" if best is None else best.to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()

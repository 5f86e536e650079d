"""Logistic regression for a whole grid of regularisation strengths at once, on the device of the features.

The problems of the grid are independent, convex and of one shape: a batch of L-BFGS iterations, each problem with its own
memory, step and end, that share the two large products of every step. In the eigenvectors of the features' covariance
the curvature is nearly diagonal, which is where each problem starts (Böhning 1992 bounds it so).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitregs.errors import InputError

GRID = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))  # C of DINOv2's own evaluation (section 2.4)
MEMORY, LONGEST = 12, 1000  # pairs that L-BFGS keeps; steps before it gives up
CLOSE = 1e-6  # expected decrease of the loss under which a problem is solved
SUFFICIENT = 1e-4  # Armijo's constant
LARGEST = 2**26  # numbers in one block of logits: bounds the memory
HELD = 0.1  # part of the training set on which the strength is chosen


@dataclass
class Path:
    """Solutions over a grid (g) of strengths: weight (g, d, k), bias (g, k), loss with its penalty (g,), steps taken."""

    strengths: Tensor
    weight: Tensor
    bias: Tensor
    loss: Tensor
    steps: int

    def logits(self, x: Tensor) -> Tensor:
        """Scores of the classes: features (m, d) → (g, m, k)."""
        return x.to(self.weight) @ self.weight + self.bias[:, None]


def check(x: Tensor, y: Tensor) -> int:
    """Number of classes in features (n, d) and labels: classes (n,) or marks (n, k) of which several can hold.

    Raises InputError for labels of another number, missing labels (below 0), one class only, and values that are not finite.
    """
    if len(x) != len(y):
        raise InputError(f"there are {len(y)} labels for {len(x)} images")
    if not x.isfinite().all():
        raise InputError("the features are not finite: the weights or the pixels are broken")
    if y.ndim == 2:
        if not (y.any(0) & ~y.all(0)).any():
            raise InputError("no label is true for some images and false for others: there is nothing to tell apart")
        return y.shape[1]
    if bool((y < 0).any()):
        raise InputError(f"{int((y < 0).sum())} of {len(y)} images have no label")
    if len(y.unique()) < 2:
        raise InputError("all images have the same label: there is nothing to tell apart")
    return int(y.max()) + 1


def path(x: Tensor, y: Tensor, strengths: Sequence[float] = GRID) -> Path:
    """Fit all strengths C: features (n, d), labels as in `check` → Path, minimising mean loss + |W|² / (2 C n).

    Softmax over classes (n,), or a sigmoid for each of the marks (n, k); the bias is free, as in scikit-learn. Raises
    InputError as `check` does and for strengths that are not positive.
    """
    classes = check(x, y)
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths must be positive, not {list(strengths)}")
    grid = torch.tensor(strengths, device=x.device, dtype=torch.float64)
    mean = x.double().mean(0)
    centred = x.double() - mean
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / len(x))
    task = _Task((centred @ eigenvectors).float(), y, (1 / (grid * len(x))).float(), classes)
    step = task.scale(eigenvalues.clamp(min=0).float())
    found, loss, steps = _minimise(task, step)
    weight = eigenvectors.float() @ found[:, :-1]
    return Path(grid, weight, found[:, -1] - mean.float() @ weight, loss, steps)


class _Task:
    """Loss and gradient of some problems of the grid: z (n, d) centred and turned, labels, penalties (g,)."""

    def __init__(self, z: Tensor, y: Tensor, penalty: Tensor, classes: int) -> None:
        self.z = torch.cat([z, torch.ones_like(z[:, :1])], 1)  # the last row of the weights is the bias
        self.y, self.penalty, self.classes = y, penalty, classes
        self.many = y.ndim == 2
        self.shape = (len(penalty), self.z.shape[1], classes)

    def scale(self, eigenvalues: Tensor) -> Tensor:
        """Inverse of the curvature's diagonal at even odds: variances (d,) → (g, d + 1, 1)."""
        even = 0.25 if self.many else 1 / self.classes
        inside = torch.cat([even * eigenvalues, eigenvalues.new_full((1,), even)])
        bias_free = torch.ones_like(inside)
        bias_free[-1] = 0
        return (1 / (inside + self.penalty[:, None] * bias_free).clamp(min=1e-12))[:, :, None]

    def __call__(self, w: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (a,) and gradient (a, d + 1, k) at weights (a, d + 1, k) of the problems `which` (a,)."""
        n, active = len(self.z), len(which)
        flat = w.permute(1, 0, 2).reshape(w.shape[1], -1)
        loss, slope = w.new_zeros(active, dtype=torch.float64), torch.zeros_like(flat)
        for start in range(0, n, block := max(1, LARGEST // flat.shape[1])):
            rows = slice(start, start + block)
            logits = (self.z[rows] @ flat).view(-1, active, self.classes)
            part, error = self._errors(logits, self.y[rows])
            loss += part
            slope += self.z[rows].T @ error.view(len(error), -1)
        slope = slope.view(-1, active, self.classes).permute(1, 0, 2) / n
        inner, penalty = w[:, :-1], self.penalty[which]
        slope[:, :-1] += penalty[:, None, None] * inner
        return loss / n + 0.5 * penalty * inner.square().sum((1, 2)), slope

    def _errors(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of losses (a,) and their slopes (n, a, k), in place of the logits (n, a, k)."""
        if self.many:
            target = y[:, None].to(logits).expand_as(logits)
            loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum((0, 2), dtype=torch.float64)
            return loss, logits.sigmoid_().sub_(target)
        at = y[:, None, None].expand(-1, logits.shape[1], 1)
        logits -= logits.amax(2, keepdim=True)
        right = logits.gather(2, at)[..., 0]
        total = logits.exp_().sum(2)
        loss = (total.log() - right).sum(0, dtype=torch.float64)
        logits /= total[..., None]
        return loss, logits.scatter_add_(2, at, torch.full_like(logits[:, :, :1], -1.0))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def _minimise(task: _Task, first: Tensor) -> tuple[Tensor, Tensor, int]:
    """Batched L-BFGS from zero: task, inverse diagonal curvature (g, d + 1, 1) → weights, losses, steps taken."""
    device = first.device
    best = torch.zeros(task.shape, device=device)
    final = torch.zeros(len(best), device=device, dtype=torch.float64)
    on = torch.arange(len(best), device=device)  # problems that are not solved yet
    w, base = best.clone(), first
    loss, slope = task(w, on)
    moves: list[Tensor] = []
    turns: list[Tensor] = []
    for step in range(LONGEST):
        way = _direction(slope, moves, turns, base)
        fall = -_dot(way, slope)
        done = fall < CLOSE
        if step and not done.all():
            new, new_loss, new_slope, moved = _search(task, on, w, loss, slope, way, fall, ~done)
            done |= ~moved
        elif not step:
            new, new_loss, new_slope, moved = _search(task, on, w, loss, slope, way, fall, ~done)
        if done.any():
            best[on[done]], final[on[done]] = w[done], loss[done]
            keep = ~done
            if not keep.any():
                return best, final, step
            on, base, w, loss, slope = on[keep], base[keep], w[keep], loss[keep], slope[keep]
            new, new_loss, new_slope = new[keep], new_loss[keep], new_slope[keep]
            moves, turns = [m[keep] for m in moves], [t[keep] for t in turns]
        moves, turns = [*moves[1 - MEMORY :], new - w], [*turns[1 - MEMORY :], new_slope - slope]
        w, loss, slope = new, new_loss, new_slope
    best[on], final[on] = w, loss
    return best, final, LONGEST


def _direction(slope: Tensor, moves: list[Tensor], turns: list[Tensor], base: Tensor) -> Tensor:
    """The two loops of L-BFGS (Nocedal & Wright, algorithm 7.4), one problem a row: → descent direction."""
    q, kept = slope.clone(), []
    for s, t in zip(reversed(moves), reversed(turns), strict=True):
        rho = 1 / _dot(s, t).clamp(min=1e-20)
        alpha = rho * _dot(s, q)
        q -= alpha[:, None, None] * t
        kept.append((s, t, rho, alpha))
    if kept:
        s, t, *_ = kept[0]
        q *= (_dot(s, t) / _dot(t, base * t).clamp(min=1e-20))[:, None, None]
    q *= base
    for s, t, rho, alpha in reversed(kept):
        q += (alpha - rho * _dot(t, q))[:, None, None] * s
    return -q


def _search(
    task: _Task, on: Tensor, w: Tensor, loss: Tensor, slope: Tensor, way: Tensor, fall: Tensor, need: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step along the way, halving where the loss does not fall enough: → weights, losses, slopes, which problems moved."""
    new, new_loss, new_slope = w.clone(), loss.clone(), slope.clone()
    size = torch.ones_like(fall)
    left = need.nonzero()[:, 0]
    for _ in range(12):
        trial = w[left] + size[left, None, None] * way[left]
        value, gradient = task(trial, on[left])
        good = value <= loss[left] - SUFFICIENT * (size * fall)[left]
        took = left[good]
        new[took], new_loss[took], new_slope[took] = trial[good], value[good], gradient[good]
        left = left[~good]
        if not len(left):
            break
        size[left] /= 2
    moved = need.clone()
    moved[left] = False  # no step helps: the precision of the numbers is reached
    return new, new_loss, new_slope, moved

"""MAE: hide three quarters of the patches and paint them from the rest.

The encoder sees CLS, registers and the visible patches alone; a light decoder with mask tokens predicts the pixels of
the hidden ones, each patch normalised by its own mean and standard deviation. (He et al. 2022, section 3; paper appendix E.)
"""

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitregs.train import vit
from vitregs.train.augment import CropFlip
from vitregs.train.config import Mae, Recipe
from vitregs.train.data import Batch, Feed
from vitregs.train.start import Start


class Learner(nn.Module):
    """A ViT and the decoder that is thrown away afterwards."""

    captions = False
    place: Tensor  # positions of the decoder

    def __init__(self, recipe: Recipe, feed: Feed, start: Start | None = None) -> None:
        super().__init__()
        own = recipe.objective
        assert isinstance(own, Mae)
        self.vit = vit.build(recipe, start=start)
        self.patch, self.patches = recipe.patch_size, recipe.patches
        self.kept = round(recipe.patches * (1 - own.masked))
        width, side = own.decoder_width, recipe.image_size // recipe.patch_size
        self.enter = nn.Linear(self.vit.embed_dim, width)  # type: ignore[arg-type]
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_buffer("place", build_sincos2d_pos_embed([side, side], width)[None], persistent=False)
        self.decoder = nn.Sequential(
            *(Block(width, own.decoder_heads, qkv_bias=True) for _ in range(own.decoder_depth))
        )
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, 3 * recipe.patch_size**2)
        self.augment = CropFlip(recipe.image_size, (0.2, 1.0)) if recipe.augment else nn.Identity()

    @property
    def published(self) -> nn.Module:
        """The network that is measured and kept."""
        return self.vit

    def patchify(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) → patches (n, patches, 3·p·p), rows before columns."""
        n, _, height, width = pixels.shape
        p = self.patch
        cut = pixels.view(n, 3, height // p, p, width // p, p)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 3 * p * p)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (n, patches, 3·p·p) → pixels (n, 3, H, W)."""
        n, count, p = len(patches), patches.shape[1], self.patch
        side = int(count**0.5)
        cut = patches.view(n, side, side, 3, p, p).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(n, 3, side * p, side * p)

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw which patches are visible: images → order (n, patches), the first `kept` are; hidden (n, patches) bool."""
        order = torch.rand(count, self.patches, device=device).argsort(1)
        hidden = torch.ones(count, self.patches, dtype=torch.bool, device=device)
        return order, hidden.scatter(1, order[:, : self.kept], False)

    def predict(self, pixels: Tensor, order: Tensor) -> Tensor:
        """Paint all patches from the visible ones: pixels, order → (n, patches, 3·p·p) of normalised pixels."""
        tokens = self.enter(vit.encode(self.vit, pixels, keep=order[:, : self.kept]))
        prefix = self.vit.num_prefix_tokens
        visible = tokens[:, prefix:]
        full = self.mask_token.to(visible.dtype).expand(len(tokens), self.patches, -1)
        at = order[:, : self.kept, None].expand(-1, -1, visible.shape[-1])
        full = full.scatter(1, at, visible) + self.place
        return self.paint(self.norm(self.decoder(torch.cat([tokens[:, :prefix], full], 1))[:, prefix:])).float()

    def forward(self, batch: Batch) -> Tensor:
        """Mean squared error over the hidden patches → scalar."""
        pixels = self.augment(batch.pixels)
        order, hidden = self.draw(len(pixels), pixels.device)
        wanted = self.patchify(pixels)
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (self.predict(pixels, order) - wanted).square().mean(-1)
        return error[hidden].mean()

"""A shallow autoencoder of raw images, whose embedding layer can begin a projection head.

Source: Schliebitz, Tapken & Atzmueller 2024, arXiv 2408.14514: flattened pixels -> Linear -> ReLU
-> Linear (the embedding) -> Linear -> ReLU -> Linear -> sigmoid, mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastclr.config import ConfigError


class Autoencoder(nn.Module):
    """The autoencoder; its embedding maps ``hidden_dim`` to ``latent_dim`` as fc1 of a head does.

    Args:
        num_pixels: Values of a flattened image, channels x height x width.
        hidden_dim: Width of both hidden layers; that of h, for the embedding to fit a head.
        latent_dim: Width of the code.
    """

    def __init__(self, num_pixels: int, hidden_dim: int = 512, latent_dim: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_pixels, hidden_dim)
        self.embedding = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_pixels)
        )

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction (n, pixels) in 0..1 of float images in 0..1."""
        code_ND = self.embedding(self.hidden(images_NCHW.flatten(1)).relu())
        return self.decoder(code_ND).sigmoid()


def train_autoencoder(
    images_XCHW: torch.Tensor,
    *,
    hidden_dim: int,
    latent_dim: int,
    epochs: int = 100,
    learning_rate: float = 1e-3,
    batch_size: int = 100,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Autoencoder:
    """Train an autoencoder on raw images, without augmentation.

    The source takes Adam at 1e-4, halved on a plateau of a validation loss, for 100 epochs; here
    the rate falls as a cosine, so that short trainings end as well and no images are held out.

    Args:
        images_XCHW: uint8 images, all of one size.
        hidden_dim: Width of the hidden layers.
        latent_dim: Width of the code.
        epochs: Passes over the images.
        learning_rate: Of Adam, at the start.
        batch_size: Images a step.
        seed: Of the first weights and of the order.
        say: Told the error of each epoch.

    Returns:
        The autoencoder in evaluation mode.

    Raises:
        ConfigError: If there are no images, or they are not uint8.
        FloatingPointError: If the error is not finite.
    """
    if images_XCHW.dtype != torch.uint8 or images_XCHW.ndim != 4 or not len(images_XCHW):
        raise ConfigError(
            f"the autoencoder got images {images_XCHW.dtype} {tuple(images_XCHW.shape)}: give "
            "uint8 (X, C, H, W), one image or more."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(images_XCHW[0].numel(), hidden_dim, latent_dim)
    model = model.to(images_XCHW.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    num_steps = epochs * -(-len(images_XCHW) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images_XCHW), generator=generator).split(batch_size):
            images_NCHW = images_XCHW[rows.to(images_XCHW.device)].float() / 255
            error = F.mse_loss(model(images_NCHW), images_NCHW.flatten(1))
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
            total += error.item() * len(rows)
        mean = total / len(images_XCHW)
        if not mean < float("inf"):
            raise FloatingPointError(
                f"the autoencoder's error is {mean} in epoch {epoch}: lower its learning rate."
            )
        say(f"autoencoder, epoch {epoch + 1} of {epochs}: mean squared error {mean:.5f}")
    return model.eval()

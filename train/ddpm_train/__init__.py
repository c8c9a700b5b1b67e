"""Train the network of a diffusion model: images in, ``model.pt`` out (``ddpm-train --help``)."""

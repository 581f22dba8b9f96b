"""The model of a run, as every way of training begins with it."""

from __future__ import annotations

import torch
from torch import nn

from efficient_dl.config import Config, DataSpec
from efficient_dl.local_learning.pieces import pieces_of
from efficient_dl.local_learning.recompute import checkpointed
from efficient_dl.models import build_model


def build_run_model(config: Config, spec: DataSpec, device: torch.device) -> nn.Module:
    """With the initial values of the run's seed, its blocks checkpointed if the configuration says so.

    A block is a piece that a partition may begin with, without the last one, whose activations would be needed at once.
    """
    model = build_model(config.model, spec, config.train.seed).to(device)
    if config.train.activation_checkpointing:
        inside = set(model.modules())  # not what an adapter has put around parts of the model
        for piece in pieces_of(model)[:-1]:
            if piece.module in inside:
                checkpointed(piece.module)
    return model

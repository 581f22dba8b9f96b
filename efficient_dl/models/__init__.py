"""Embedded models by name and size, so that everything runs without other packages."""

from efficient_dl.models.build import build_model, check_model, count_parameters, model_names

__all__ = ["build_model", "check_model", "count_parameters", "model_names"]

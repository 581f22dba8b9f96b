"""Embedded data sets by name, in an order that depends on (seed, step) alone."""

from efficient_dl.data.dataset import Dataset
from efficient_dl.data.load import DATA_NAMES, check_data, load_data

__all__ = ["DATA_NAMES", "Dataset", "check_data", "load_data"]

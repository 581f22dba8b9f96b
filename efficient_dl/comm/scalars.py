"""The numbers of `Compression.stats` that make curves, under the names that they have in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOTALS = (
    "wire_bytes_per_step",
    "ratio",
    "bits_per_value",
    "codec_seconds_per_step",
    "transport_seconds_per_step",
    "exposed_seconds_per_step",
)
ENTROPIES = ("order0_bits", "model_bits")
PARAMETERS = ("wire_bytes_apportioned", "bits_per_value")


def total_scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The totals by name; entropies only where something was encoded, the error only where it was measured."""
    keys = [*TOTALS, *(ENTROPIES if stats["encoded_values"] else ())]
    return {key: stats[key] for key in keys} | _error(stats)


def parameter_scalars(stats: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The rows of the parameters that were sent, by name; entropies and errors only where they were measured."""
    return {
        name: {key: row[key] for key in (*PARAMETERS, *(ENTROPIES if row["entropy_sampled"] else ()))}
        | _error(row)
        for name, row in stats["parameters"].items()
        if row["values_sent"]
    }


def _error(row: Mapping[str, Any]) -> dict[str, float]:
    return {"relative_error": row["relative_error"]} if row["error_sampled"] else {}

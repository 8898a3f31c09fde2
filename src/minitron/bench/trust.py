"""Whether a measured speed fits the prediction and the sizes."""

from __future__ import annotations

FARTHEST_BELOW = 0.5
"""Share of the predicted speed below which something other than the model slows decoding down."""
NOISE = 0.97
"""A ratio of sizes or speeds between this and 1 does not count as a difference."""


def below_prediction(measured: float, predicted: float) -> str:
    """A sentence if a measured speed (tokens/s) is so far below the predicted one that something else held it back."""
    if measured >= FARTHEST_BELOW * predicted:
        return ""
    return (
        f"measured {measured:,.4g} tokens/s is {measured / predicted:.2g} of the predicted {predicted:,.4g}: something "
        f"other than the model's size decided"
    )


def slower_though_smaller(
    small: float, large: float, bytes_small: float, bytes_large: float, large_name: str = "the model it was cut from"
) -> str:
    """A sentence if a model (tokens/s, bytes read per token) is slower than one that reads more; empty if not."""
    if bytes_small >= NOISE * bytes_large or small >= NOISE * large:
        return ""
    return (
        f"{small:,.4g} tokens/s is slower than {large_name} ({large:,.4g}), though it reads "
        f"{bytes_small / bytes_large:.0%} of the bytes per token: the difference is not one between the models"
    )

"""Which layers gain from an integer weight.

Quantizing a row and the epilogue cost the same whatever is saved on the product; below these sizes
nothing is left of it.
"""

from __future__ import annotations

from torchweld.quantization._configs import Config, Int4, Int8, Int8WeightOnly, check_config

# Smallest number of input and of output features, for each config: as benchmarks/linear_rule.py
# fits them to benchmarks/results/rule/linear.csv.
SMALLEST: dict[type, tuple[int, int]] = {
    Int8: (128, 64),
    Int8WeightOnly: (128, 64),
    Int4: (128, 128),
}


def worth_quantizing(config: Config, in_features: int, out_features: int) -> bool:
    """Whether a linear layer of these sizes is faster quantized than in float32.

    Args:
        config: what it would be quantized to.
        in_features: size of each input row.
        out_features: size of each output row.

    Returns:
        What :func:`torchweld.quantize` goes by, unless ``keep_small=False``.

    Raises:
        TypeError: ``config`` is not one.

    Example:
        >>> import torchweld as tw
        >>> tw.quantization.worth_quantizing(tw.Int8(), 768, 10)
        False
    """
    smallest_in, smallest_out = SMALLEST[type(check_config("worth_quantizing", config))]
    return in_features >= smallest_in and out_features >= smallest_out

"""Every tolerance of the parity verdict, and why it is what it is.

The yardstick is measured, not guessed: the error that eager PyTorch itself makes on the same tokens when it computes
in the target's precision. A runtime may order its sums differently, so it gets a small multiple of that error; a
mistake (a wrong mask, position, scale or weight) exceeds it by orders of magnitude.

What the yardstick is in each precision:
    fp32: eager in float32, against a truth in float64.
    fp16: eager in float16, against float32, with the same float16 weights; and once more all in float32.
    bf16: as fp16 where the runtime has bfloat16; on ONNX Runtime's CPU provider, which has not, all in float32.
    int8, int4, nvfp4: the truth has the weights as they were written, scale times code, unrounded. ONNX Runtime's CPU
        kernels round what such weights multiply to 8 bits (each block's largest to 127), and so does the yardstick; the
        graph is verified once more without that, in float32. On other runtimes, as for the dtype they compute in.
    fp8: the same weights; no runtime rounds activations.
"""

# Root-mean-square error over all numbers of a rung. Averaged over thousands of numbers, the rounding errors of two
# correct implementations differ by well under this factor.
RMS_MULTIPLE = 3.0

# Largest single error of a rung. Extremes scatter more than averages.
MAX_MULTIPLE = 5.0

# Rounding of the result itself, in units of the last place of the rung's largest value. It matters where eager
# PyTorch happens to be exact, such as in copies.
FLOOR_ULPS = 4.0

# Two logits closer than the largest allowed error may come out in either order: each may be off by that much.
TOP1_GAP_MULTIPLE = 2.0

# Rounding may decide between two experts (or keys) whose scores differ by less than this many units in the last place:
# scores have come through every layer before. What all such decisions together can move widens the yardstick.
NEAR_TIE_ULPS = 32.0

# Distance from 1 to the next number.
MACHINE_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# What cache slots hold that nobody may read: far above any real key or value, yet low enough in float16 (largest
# number 65504) that its product with a query, which kernels compute before they mask it, stays finite.
POISON = {"float32": 10_000.0, "bfloat16": 10_000.0, "float16": 64.0}

# How far a quantized weight may lie from the checkpoint's, in units of what rounding it to nearest is off by.
# MSE-optimal scales are never worse than that. GPTQ moves errors to weights that matter less, and so changes weights
# more. AWQ has no entry: it multiplies weights by factors that it takes out of others, and only the whole model can be
# compared.
WEIGHT_MULTIPLE = {"rtn": 1.0, "mse": 1.0, "gptq": 3.0}

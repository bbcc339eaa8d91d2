"""The graphs of Llama 3.2 Vision 11B, from its config alone, in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
sys.path.insert(0, "benchmarks")
from vision_export import CONFIG
from exporter.capture import build_encoder_on_meta, build_on_meta
from exporter.layouts import LAYOUTS
from exporter.pipeline import trace, trace_encoder
from exporter.precision import FLOAT_TYPES, cache_spec, vision_spec
from exporter.progress import Quiet
from graphs.families import find_family

family = find_family(CONFIG)
config, layout, precision = family.parse_config(CONFIG), LAYOUTS["portable"], FLOAT_TYPES["bf16"]
decoder = build_on_meta(config, torch.bfloat16)
cache, vision = cache_spec(decoder, 4096, precision.dtype), vision_spec(config, precision.dtype, 4)
signature = layout.signature(config, cache, 8, vision)
text = trace(decoder, layout, signature, cache, family.tensor_names(config), Quiet(), vision=vision)
signature = layout.encoder_signature(config, vision, 8)
encoder = build_encoder_on_meta(config, torch.bfloat16)
pictures = trace_encoder(encoder, layout, signature, family.encoder_names(config), Quiet())
kinds = [[node.op_type for node in model.graph] for model in (text, pictures)]
status = Path("/proc/self/status").read_text()  # resource's ru_maxrss would be the parent's, if that is larger
peak_kb = re.search(r"VmHWM:\\s*(\\d+)", status).group(1)
facts = {
    "peak_bytes": int(peak_kb) * 1024,
    "attention": [of.count("Attention") for of in kinds],
    "cached": kinds[0].count("TensorScatter"),
    "outputs": [value.name for value in pictures.graph.outputs],
    "shape": [str(dim) for dim in pictures.graph.outputs[0].shape],
    "initializers": sorted(value.name for model in (text, pictures) for value in model.graph.initializers.values()),
}
print(json.dumps(facts))
"""


@pytest.mark.slow
def test_the_11b_shape_is_traced_in_under_2_gb(x_root: Path) -> None:
    """21 GB of weights, of which none is there; 40 layers, 8 of them cross attention, 40 vision layers."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=x_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["peak_bytes"] < 2e9
    assert facts["attention"] == [40, 40]
    assert facts["cached"] == 2 * 32
    assert facts["outputs"][:2] == ["cross_key_values.3.key", "cross_key_values.3.value"]
    assert len(facts["outputs"]) == 16
    assert facts["shape"] == ["batch_size", "8", "vision_tokens", "128"]
    of_encoder = "language_model.model.layers.3.cross_attn.k_proj.weight"
    assert facts["initializers"].count(of_encoder) == 1  # the decoder does not compute them

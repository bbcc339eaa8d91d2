"""onnxruntime-genai runs an artifact: a request (JSON, see tests/clients/conftest.py) on stdin, an answer on stdout."""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as genai

request = json.load(sys.stdin)
session_options: dict[str, Any] = {"intra_op_num_threads": 1}
if request.get("in_float32"):
    session_options["session.qdq_matmulnbits_accuracy_level"] = "1"
changes: dict[str, Any] = {"decoder": {"session_options": session_options}}
if "stop_id" in request:
    changes["eos_token_id"] = request["stop_id"]
config = genai.Config(request["artifact"])
config.overlay(json.dumps({"model": changes}))
model = genai.Model(config)
tokenizer = genai.Tokenizer(model)
tokenizer.update_options(add_special_tokens=True)  # without it, a text has no BOS


def continue_rows(rows: list[list[int]]) -> list[list[int]]:
    """New tokens of each row, as one batch padded on the right, as this client's encode_batch pads."""
    width = max(map(len, rows))
    params = genai.GeneratorParams(model)
    params.set_search_options(
        batch_size=len(rows), max_length=width + request["max_new_tokens"], do_sample=False, num_beams=1
    )
    generator = genai.Generator(model, params)
    padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    generator.append_tokens(np.array(padded, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist()[width:] for row in range(len(rows))]


answer: dict[str, Any] = {"new": [continue_rows(rows) for rows in request["batches"]]}
if "messages" in request:
    answer["encoded"] = [tokenizer.encode(text).tolist() for text in request["texts"]]
    answer["decoded"] = [tokenizer.decode(np.array(row, dtype=np.int32)) for row in request["rows"]]
    answer["chat"] = tokenizer.apply_chat_template(json.dumps(request["messages"]), add_generation_prompt=True)
print(json.dumps(answer))

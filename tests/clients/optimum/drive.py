"""Optimum runs an artifact: a request (JSON, see tests/clients/conftest.py) on stdin, an answer on stdout."""

import json
import sys

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(request["artifact"], local_files_only=True)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if request.get("in_float32"):
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
model = ORTModelForCausalLM.from_pretrained(request["artifact"], local_files_only=True, session_options=options)
stop = {"eos_token_id": request["stop_id"]} if "stop_id" in request else {}


def continue_rows(rows: list[list[int]]) -> list[list[int]]:
    """New tokens of each row, as one batch padded on the left."""
    width = max(map(len, rows))
    output = model.generate(
        torch.tensor([[request["pad_id"]] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        max_new_tokens=request["max_new_tokens"],
        do_sample=False,
        pad_token_id=request["pad_id"],
        **stop,
    )
    return output[:, width:].tolist()


answer = {"new": [continue_rows(rows) for rows in request["batches"]]}
if "messages" in request:
    answer["encoded"] = [tokenizer(text)["input_ids"] for text in request["texts"]]
    answer["decoded"] = [tokenizer.decode(row, skip_special_tokens=True) for row in request["rows"]]
    answer["chat"] = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
print(json.dumps(answer))

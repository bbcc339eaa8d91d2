// transformers.js runs an artifact: a request (JSON, see tests/clients/conftest.py) on stdin, an answer on stdout.
import { readFileSync } from "node:fs";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env, pipeline } from "@huggingface/transformers";

const request = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
const session_options = { intraOpNumThreads: 1 };
if (request.in_float32) session_options.extra = { session: { qdq_matmulnbits_accuracy_level: "1" } };
const options = { dtype: request.dtype, device: "cpu", session_options };
const tokenizer = await AutoTokenizer.from_pretrained(request.artifact);
const model = await AutoModelForCausalLM.from_pretrained(request.artifact, options);
const stop = "stop_id" in request ? { eos_token_id: request.stop_id } : {};
const choice = { max_new_tokens: request.max_new_tokens, do_sample: false, ...stop };

const int64 = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

// New tokens of each row, as one batch padded on the left.
async function continueRows(rows) {
  const width = Math.max(...rows.map((row) => row.length));
  const pad = (row, value) => Array(width - row.length).fill(value);
  const output = await model.generate({
    input_ids: int64(rows.map((row) => [...pad(row, request.pad_id), ...row])),
    attention_mask: int64(rows.map((row) => [...pad(row, 0), ...row.map(() => 1)])),
    ...choice,
  });
  return output.tolist().map((row) => row.slice(width).map(Number));
}

const answer = { new: [] };
for (const rows of request.batches) answer.new.push(await continueRows(rows));
if ("messages" in request) {
  answer.encoded = request.texts.map((text) => tokenizer(text).input_ids.tolist()[0].map(Number));
  answer.decoded = request.rows.map((row) => tokenizer.decode(row, { skip_special_tokens: true }));
  answer.chat = tokenizer.apply_chat_template(request.messages, { tokenize: false, add_generation_prompt: true });
  const generator = await pipeline("text-generation", request.artifact, options);
  const asText = { ...choice, add_special_tokens: true }; // without it, no BOS unless tokenizer_config.json asks for one
  answer.continued = [];
  for (const text of request.texts) answer.continued.push((await generator(text, asText))[0].generated_text);
}
console.log(JSON.stringify(answer));

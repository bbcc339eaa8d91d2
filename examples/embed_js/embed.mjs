// Greedy decoding of an artifact under Node.js: prompts in, text out.
//
//     node embed.mjs ARTIFACT TEXT... [--max-new-tokens 32] [--ids] [--threads 0]
//
// The prompts are decoded as one batch; each is printed with its continuation, or, with --ids, as its new token ids.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Tokenizer } from "@huggingface/tokenizers";
import { Decoder } from "./decoder.mjs";

const USAGE = "usage: node embed.mjs ARTIFACT TEXT... [--max-new-tokens 32] [--ids] [--threads 0]";

function parse() {
  const options = {
    "max-new-tokens": { type: "string", default: "32" },
    threads: { type: "string", default: "0" },
    ids: { type: "boolean" },
  };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const [folder, ...texts] = positionals;
  const [maxNewTokens, threads] = [Number(values["max-new-tokens"]), Number(values.threads)];
  if (!texts.length || !(maxNewTokens >= 1) || !(threads >= 0)) throw new Error(USAGE);
  return { folder, texts, maxNewTokens, threads, ids: values.ids };
}

const readJson = (folder, name) => JSON.parse(readFileSync(join(folder, name), "utf8"));

/** eos_token_id of generation_config.json, else of config.json: a number or a list. */
function readStopIds(folder) {
  for (const name of ["generation_config.json", "config.json"]) {
    const ids = existsSync(join(folder, name)) ? readJson(folder, name).eos_token_id : null;
    if (ids != null) return [ids].flat();
  }
  return [];
}

function argmax(logits, start, end) {
  let best = start;
  for (let i = start + 1; i < end; i++) if (logits[i] > logits[best]) best = i;
  return best - start;
}

async function generate(decoder, prompts, maxNewTokens, stopIds) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  if (longest - 1 + maxNewTokens > decoder.maxLen) // the last new token is never written
    throw new Error(
      `this artifact's cache holds ${decoder.maxLen} tokens: ${longest} of the longest prompt and ` +
        `${maxNewTokens} new ones do not fit`,
    );
  const outputs = prompts.map(() => []);
  let active = prompts.map(() => true);
  let logits = await decoder.prefill(prompts);
  for (let step = 1; step <= maxNewTokens; step++) {
    // any sampling goes here
    const tokens = prompts.map((_, row) => argmax(logits, row * decoder.vocabSize, (row + 1) * decoder.vocabSize));
    active = active.map((on, row) => on && !stopIds.includes(tokens[row]));
    active.forEach((on, row) => on && outputs[row].push(tokens[row]));
    if (!active.includes(true)) break;
    if (step < maxNewTokens) logits = await decoder.decode(tokens, active);
  }
  return outputs;
}

try {
  const { folder, texts, maxNewTokens, threads, ids } = parse();
  const decoder = await Decoder.open(folder, threads);
  const tokenizer = new Tokenizer(readJson(folder, "tokenizer.json"), readJson(folder, "tokenizer_config.json"));
  const prompts = texts.map((text) => tokenizer.encode(text).ids);
  const outputs = await generate(decoder, prompts, maxNewTokens, readStopIds(folder));
  outputs.forEach((output, row) => {
    const text = tokenizer.decode([...prompts[row], ...output], { skip_special_tokens: true });
    console.log(ids ? output.join(",") : text);
  });
} catch (error) {
  const noKernel = error.message.includes("Could not find an implementation");
  console.error(`embed: ${error.message}${noKernel ? ": on the CPU, export without bf16 or nvfp4" : ""}`);
  process.exitCode = 2;
}

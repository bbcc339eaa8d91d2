// A decoder graph of the portable layout, and its key/value cache: prompts in, next-token logits out.
// Names of shapes: R rows (sequences decoded together), S new tokens of each, T cache slots in use, V vocabulary.
import { join } from "node:path";
import { InferenceSession, Tensor } from "onnxruntime-node";

const TOKEN_INPUTS = ["input_ids", "position_ids", "write_indices", "attention_mask", "logit_indices"];
const PAST = "past_key_values.";
const ARRAYS = { float32: Float32Array, float16: Uint16Array }; // float16: as its bits; we only ever write zeros

export class Decoder {
  /** Load the decoder.onnx of an artifact's folder; 0 threads lets ONNX Runtime choose. */
  static async open(folder, threads = 0) {
    const session = await InferenceSession.create(join(folder, "decoder.onnx"), {
      intraOpNumThreads: threads,
      extra: { session: { qdq_matmulnbits_accuracy_level: "4" } }, // int4 weights: multiply 8-bit integers
    });
    return new Decoder(session);
  }

  constructor(session) {
    this.session = session;
    this.caches = session.inputMetadata.filter(({ name }) => !TOKEN_INPUTS.includes(name));
    for (const { name, shape, type } of this.caches)
      if (!name.startsWith(PAST) || shape.length !== 4 || typeof shape[2] !== "number" || !(type in ARRAYS))
        throw new Error(
          `decoder.onnx takes ${name}, which is no static key/value cache: this program runs decoders that read ` +
            "text only, in the portable layout",
        );
    const missing = TOKEN_INPUTS.filter((name) => !session.inputNames.includes(name));
    if (missing.length || !this.caches.length)
      throw new Error(`decoder.onnx is none of the portable layout: it lacks ${missing[0] ?? PAST}`);
    this.maxLen = this.caches[0].shape[2]; // how many tokens a row of the cache holds
    this.vocabSize = session.outputMetadata.find(({ name }) => name === "logits").shape[2]; // V
  }

  /** Start anew with these token ids; return the logits [R, V] after each row's last one, valid until the next call. */
  async prefill(prompts) {
    const size = Math.max(...prompts.map((prompt) => prompt.length));
    if (size > this.maxLen || prompts.some((prompt) => !prompt.length))
      throw new Error(`a prompt must have 1 to ${this.maxLen} tokens, which is what this artifact's cache holds`);
    this.#allocate(prompts.length);
    this.lengths = prompts.map((prompt) => prompt.length);
    return this.#run({
      // padded on the right
      inputIds: prompts.flatMap((prompt) => Array.from({ length: size }, (_, i) => prompt[i] ?? 0)),
      positionIds: prompts.flatMap(() => [...Array(size).keys()]),
      writeIndices: prompts.map(() => 0),
      seen: this.lengths,
      total: size,
      logitIndices: this.lengths.map((length) => length - 1), // of the last token only
    });
  }

  /** Append one token to every row that is active; return the next logits [R, V]. Those of other rows mean nothing. */
  async decode(tokens, active) {
    if (this.lengths.some((length, row) => active[row] && length === this.maxLen))
      throw new Error(`a row of the cache is full: this artifact holds ${this.maxLen} tokens`);
    const slots = this.lengths.map((length) => Math.min(length, this.maxLen - 1)); // idle rows write there as well ..
    this.lengths = this.lengths.map((length, row) => length + (active[row] ? 1 : 0)); // .. and the mask hides it
    return this.#run({
      inputIds: tokens,
      positionIds: slots,
      writeIndices: slots,
      seen: this.lengths,
      total: Math.max(...slots) + 1,
      logitIndices: tokens.map(() => 0),
    });
  }

  /** A cache of zeros. Each tensor is fed as past and fetched as present: the graph writes into its memory. */
  #allocate(rows) {
    this.past = {};
    this.fetches = { logits: new Tensor(new Float32Array(rows * this.vocabSize), [rows, 1, this.vocabSize]) };
    for (const { name, shape, type } of this.caches) {
      const dims = [rows, ...shape.slice(1)];
      const tensor = new Tensor(type, new ARRAYS[type](dims.reduce((a, b) => a * b)), dims);
      this.past[name] = this.fetches[name.replace(PAST, "present.")] = tensor;
    }
  }

  /** One call. The mask lets row r see its first seen[r] slots of `total`. */
  async #run({ inputIds, positionIds, writeIndices, seen, total, logitIndices }) {
    const rows = seen.length;
    const mask = seen.flatMap((length) => Array.from({ length: total }, (_, slot) => (slot < length ? 1 : 0)));
    const int64 = (numbers, dims) => new Tensor("int64", BigInt64Array.from(numbers, BigInt), dims);
    const feeds = {
      input_ids: int64(inputIds, [rows, inputIds.length / rows]),
      position_ids: int64(positionIds, [rows, inputIds.length / rows]),
      write_indices: int64(writeIndices, [rows]),
      attention_mask: int64(mask, [rows, total]),
      logit_indices: int64(logitIndices, [rows, 1]),
      ...this.past,
    };
    await this.session.run(feeds, this.fetches);
    return this.fetches.logits.data;
  }
}

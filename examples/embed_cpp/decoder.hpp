// A decoder graph of the portable layout, and its key/value cache: prompts in, next-token logits out.
// Names of shapes: R rows (sequences decoded together), S new tokens of each, T cache slots in use, V vocabulary.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using Ids = std::vector<int64_t>;

class Decoder {
 public:
  // Load a decoder.onnx; 0 threads lets ONNX Runtime choose.
  Decoder(const std::string& path, int threads) : session_(env_, path.c_str(), options(threads)), binding_(session_) {
    std::set<std::string> missing = {"input_ids", "position_ids", "write_indices", "attention_mask", "logit_indices"};
    for (size_t i = 0; i < session_.GetInputCount(); ++i) {
      const std::string name = session_.GetInputNameAllocated(i, allocator_).get();
      if (missing.erase(name)) continue;
      const auto type_info = session_.GetInputTypeInfo(i);
      const auto tensor = type_info.GetTensorTypeAndShapeInfo();
      if (name.rfind(kPast, 0) != 0 || !number_bytes(tensor.GetElementType()) || tensor.GetDimensionsCount() != 4 ||
          tensor.GetShape()[2] < 1)
        throw std::invalid_argument(path + " takes " + name + ", which is no static key/value cache: this program " +
                                    "runs decoders that read text only, in the portable layout");
      caches_.push_back({name, tensor.GetElementType(), tensor.GetShape()});
      max_len_ = tensor.GetShape()[2];
    }
    if (!missing.empty() || caches_.empty())
      throw std::invalid_argument(path + " is no decoder of the portable layout: it lacks " +
                                  (missing.empty() ? kPast : *missing.begin()));
    vocab_size_ = session_.GetOutputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape()[2];
  }

  int64_t max_len() const { return max_len_; }        // how many tokens a row of the cache holds
  int64_t vocab_size() const { return vocab_size_; }  // V

  // Start anew with these prompts, none of which is empty or longer than max_len; return the logits [R, V] after each
  // one's last token. They stay valid until the next call.
  const float* prefill(const std::vector<Ids>& prompts) {
    allocate(static_cast<int64_t>(prompts.size()));
    const int64_t size = longest(prompts);
    Ids input_ids(rows_ * size, 0), position_ids(rows_ * size), logit_indices(rows_);
    for (int64_t row = 0; row < rows_; ++row) {
      std::copy(prompts[row].begin(), prompts[row].end(), input_ids.begin() + row * size);  // padded on the right
      for (int64_t i = 0; i < size; ++i) position_ids[row * size + i] = i;
      lengths_[row] = static_cast<int64_t>(prompts[row].size());
      logit_indices[row] = lengths_[row] - 1;  // of the last token only
    }
    return run(input_ids, position_ids, Ids(rows_, 0), lengths_, size, logit_indices);
  }

  // Append one token to every row that is active; return the next logits [R, V]. Those of other rows mean nothing.
  const float* decode(const Ids& tokens, const std::vector<bool>& active) {
    Ids slots(rows_), seen(rows_);
    for (int64_t row = 0; row < rows_; ++row) {
      if (active[row] && lengths_[row] == max_len_) throw std::invalid_argument("a row of the cache is full");
      slots[row] = std::min(lengths_[row], max_len_ - 1);  // an idle row writes where its next token would go ..
      seen[row] = lengths_[row] + (active[row] ? 1 : 0);   // .. and its mask hides that slot
    }
    lengths_ = seen;
    const int64_t total = *std::max_element(slots.begin(), slots.end()) + 1;
    return run(tokens, slots, slots, seen, total, Ids(rows_, 0));
  }

  static int64_t longest(const std::vector<Ids>& prompts) {
    size_t size = 0;
    for (const Ids& prompt : prompts) size = std::max(size, prompt.size());
    return static_cast<int64_t>(size);
  }

 private:
  struct Cache {
    std::string name;  // of the input
    ONNXTensorElementDataType type;
    std::vector<int64_t> shape;  // [R, kv_heads, max_len, head_dim]
    Ort::Value tensor{nullptr};
  };

  static constexpr const char* kPast = "past_key_values.";

  // Bytes of one number of a cache; 0: no cache is of that type.
  static size_t number_bytes(ONNXTensorElementDataType type) {
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return 4;
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 ? 2 : 0;
  }

  static Ort::SessionOptions options(int threads) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    options.AddConfigEntry("session.qdq_matmulnbits_accuracy_level", "4");  // int4 weights: multiply 8-bit integers
    return options;
  }

  // A cache of zeros for this many rows. It is bound once, as past and as present: the graph writes into it.
  void allocate(int64_t rows) {
    rows_ = rows;
    lengths_.assign(rows, 0);
    for (Cache& cache : caches_) {
      cache.shape[0] = rows;
      cache.tensor = Ort::Value::CreateTensor(allocator_, cache.shape.data(), cache.shape.size(), cache.type);
      const int64_t numbers = rows * cache.shape[1] * cache.shape[2] * cache.shape[3];
      // zeros, because attention multiplies slots that it may not see by 0, and 0 times a NaN is a NaN
      std::memset(cache.tensor.GetTensorMutableRawData(), 0, numbers * number_bytes(cache.type));
      binding_.BindInput(cache.name.c_str(), cache.tensor);
      binding_.BindOutput(("present." + cache.name.substr(std::strlen(kPast))).c_str(), cache.tensor);
    }
    logits_.resize(rows * vocab_size_);
    const int64_t shape[] = {rows, 1, vocab_size_};
    binding_.BindOutput("logits", Ort::Value::CreateTensor(memory_, logits_.data(), logits_.size(), shape, 3));
  }

  // One call. The mask lets row r see its first seen[r] slots of `total`.
  const float* run(Ids input_ids, Ids position_ids, Ids write_indices, const Ids& seen, int64_t total,
                   Ids logit_indices) {
    Ids mask(rows_ * total);
    for (int64_t row = 0; row < rows_; ++row) std::fill_n(mask.begin() + row * total, seen[row], 1);
    const int64_t size = static_cast<int64_t>(input_ids.size()) / rows_;
    bind("input_ids", input_ids, {rows_, size});
    bind("position_ids", position_ids, {rows_, size});
    bind("write_indices", write_indices, {rows_});
    bind("attention_mask", mask, {rows_, total});
    bind("logit_indices", logit_indices, {rows_, 1});
    session_.Run(Ort::RunOptions{nullptr}, binding_);
    return logits_.data();
  }

  void bind(const char* name, Ids& numbers, const std::vector<int64_t>& shape) {
    binding_.BindInput(
        name, Ort::Value::CreateTensor(memory_, numbers.data(), numbers.size(), shape.data(), shape.size()));
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_WARNING, "embed"};
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::Session session_;
  Ort::IoBinding binding_;
  std::vector<Cache> caches_;
  std::vector<float> logits_;  // [R, V]
  Ids lengths_;                // [R]: tokens of each row in the cache
  int64_t rows_ = 0, max_len_ = 0, vocab_size_ = 0;
};

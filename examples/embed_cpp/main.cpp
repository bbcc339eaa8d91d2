// Greedy decoding of an artifact with ONNX Runtime's C++ API: token ids in, token ids out.
//
//     embed ARTIFACT IDS... [--max-new-tokens 32] [--stop-ids 2] [--threads 0]
//
// Each IDS is one row, such as 1,21,26,14: rows are decoded together and may have different lengths. The new ids of
// each are printed on a line of its own, up to its stop id. Text to ids and back is a tokenizer library's business.

#include <getopt.h>

#include <algorithm>
#include <iostream>
#include <sstream>

#include "decoder.hpp"

struct Arguments {
  std::string artifact;
  std::vector<Ids> prompts;
  Ids stop_ids;
  int64_t max_new_tokens = 32;
  int threads = 0;
};

int64_t parse_number(const std::string& text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument("expected a whole number, or several as in 1,21,26, got '" + text + "'");
  return std::stoll(text);
}

Ids parse_ids(const std::string& text) {
  Ids ids;
  std::stringstream stream(text + ",");
  for (std::string part; std::getline(stream, part, ',');) ids.push_back(parse_number(part));
  return ids;
}

Arguments parse(int argc, char** argv) {
  const option options[] = {{"max-new-tokens", required_argument, nullptr, 'n'},
                            {"stop-ids", required_argument, nullptr, 's'},
                            {"threads", required_argument, nullptr, 't'},
                            {}};
  const std::string usage = "usage: embed ARTIFACT IDS... [--max-new-tokens 32] [--stop-ids 2] [--threads 0]";
  Arguments arguments;
  for (int key; (key = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
    if (key == 'n') arguments.max_new_tokens = parse_number(optarg);
    if (key == 's') arguments.stop_ids = parse_ids(optarg);
    if (key == 't') arguments.threads = static_cast<int>(parse_number(optarg));
    if (key == '?') throw std::invalid_argument(usage);
  }
  if (argc - optind < 2) throw std::invalid_argument(usage);
  arguments.artifact = argv[optind];
  for (int i = optind + 1; i < argc; ++i) arguments.prompts.push_back(parse_ids(argv[i]));
  return arguments;
}

void check(const Arguments& arguments, const Decoder& decoder) {
  for (const Ids& prompt : arguments.prompts)
    if (const int64_t id = *std::max_element(prompt.begin(), prompt.end()); id >= decoder.vocab_size())
      throw std::invalid_argument("token id " + std::to_string(id) + " is outside the vocabulary: ids are below " +
                                  std::to_string(decoder.vocab_size()));
  const int64_t longest = Decoder::longest(arguments.prompts);
  if (longest - 1 + arguments.max_new_tokens > decoder.max_len())  // the last new token is never written
    throw std::invalid_argument("this artifact's cache holds " + std::to_string(decoder.max_len()) + " tokens: " +
                                std::to_string(longest) + " of the longest prompt and " +
                                std::to_string(arguments.max_new_tokens) + " new ones do not fit");
}

std::vector<Ids> generate(Decoder& decoder, const Arguments& arguments) {
  const size_t rows = arguments.prompts.size();
  std::vector<Ids> outputs(rows);
  std::vector<bool> active(rows, true);
  Ids tokens(rows);
  const float* logits = decoder.prefill(arguments.prompts);
  for (int64_t step = 1; step <= arguments.max_new_tokens; ++step) {
    for (size_t row = 0; row < rows; ++row) {
      const float* of_row = logits + row * decoder.vocab_size();
      tokens[row] = std::max_element(of_row, of_row + decoder.vocab_size()) - of_row;  // any sampling goes here
      active[row] = active[row] && !std::count(arguments.stop_ids.begin(), arguments.stop_ids.end(), tokens[row]);
      if (active[row]) outputs[row].push_back(tokens[row]);
    }
    if (std::none_of(active.begin(), active.end(), [](bool on) { return on; })) break;
    if (step < arguments.max_new_tokens) logits = decoder.decode(tokens, active);
  }
  return outputs;
}

int main(int argc, char** argv) try {
  const Arguments arguments = parse(argc, argv);
  Decoder decoder(arguments.artifact + "/decoder.onnx", arguments.threads);
  check(arguments, decoder);
  for (const Ids& ids : generate(decoder, arguments)) {
    for (size_t i = 0; i < ids.size(); ++i) std::cout << (i ? "," : "") << ids[i];
    std::cout << "\n";
  }
} catch (const Ort::Exception& error) {
  const char* hint = error.GetOrtErrorCode() == ORT_NOT_IMPLEMENTED ? ": on the CPU, export without bf16 or nvfp4" : "";
  std::cerr << "embed: " << error.what() << hint << "\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << "embed: " << error.what() << "\n";
  return 2;
}

// Continues a text with a checkpoint, as it is written.
//
//   generate runs/first/step-00000200 --prompt "It was"   # of examples/cpp/train: bytes
//   generate runs/first/checkpoints/step-00001000         # of `muddformer train`
//   generate CHECKPOINT --ids 5,17,42
//
// Tokens become text by the checkpoint's tokenizer.json, or as bytes if it has none and 256 tokens,
// or else stay numbers. A tokenizer.json can only be decoded here, so its prompts are token ids;
// without any a new document begins.
#include <fmt/ranges.h>
#include <muddformer/models.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <ranges>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::map<std::string, std::string> options = {
    {"prompt", ""}, {"ids", ""},   {"tokens", "200"}, {"temperature", "0.8"},
    {"top-k", ""},  {"top-p", ""}, {"seed", ""},
};

template <class T>
std::optional<T> number(const std::string& name) {
  if (options.at(name).empty()) return std::nullopt;
  std::istringstream text(options.at(name));
  T value;
  if (!(text >> value) || !text.eof()) throw std::invalid_argument("--" + name + " takes a number");
  return value;
}

std::vector<int64_t> prompt_ids(bool bytes) {
  std::vector<int64_t> ids;
  std::istringstream text(options["ids"]);
  for (std::string id; std::getline(text, id, ',');) {
    if (id.empty() || id.size() > 9 || id.find_first_not_of("0123456789") != std::string::npos) {
      throw std::invalid_argument("--ids takes numbers with commas between, got " + id);
    }
    ids.push_back(std::stoll(id));
  }
  if (!options["prompt"].empty() && !bytes) {
    throw std::invalid_argument("this checkpoint takes --ids, not --prompt");
  }
  if (!options["prompt"].empty() && !ids.empty()) {
    throw std::invalid_argument("give --ids or --prompt, not both");
  }
  for (const unsigned char byte : options["prompt"]) ids.push_back(byte);
  return ids;
}

void generate(const std::filesystem::path& folder) {
  const muddformer::MUDDFormer model = muddformer::from_pretrained(folder);
  std::optional<muddformer::TokenDecoder> decoder;
  if (std::filesystem::exists(folder / "tokenizer.json"))
    decoder.emplace(folder / "tokenizer.json");
  const bool bytes = !decoder && model->config.vocab_size == 256;
  std::vector<int64_t> ids = prompt_ids(bytes);

  const auto show = [&](int64_t id) {
    if (decoder) {
      fmt::print("{}", decoder->decode(id));
    } else if (bytes) {
      std::fputc(static_cast<int>(id), stdout);
    } else {
      fmt::print("{} ", id);
    }
  };
  for (const int64_t id : ids) show(id);
  if (ids.empty() && !decoder && !bytes) {
    throw std::invalid_argument("give --ids: this checkpoint has no tokenizer.json");
  }
  if (ids.empty()) {  // the token between documents
    ids.push_back(decoder ? decoder->added_token("<|endoftext|>").value_or(0) : '\n');
  }
  const auto length = static_cast<int64_t>(ids.size());
  muddformer::GenerateOptions how;
  const int64_t room = std::max<int64_t>(0, model->config.block_size - length);
  how.max_new_tokens = std::min(number<int64_t>("tokens").value_or(200), room);
  how.temperature = number<double>("temperature").value_or(0.8);
  how.top_k = number<int64_t>("top-k");
  how.top_p = number<double>("top-p");
  how.seed = number<int64_t>("seed");
  if (decoder) how.eos_token_id = decoder->added_token("<|endoftext|>");
  muddformer::generate(model, torch::tensor(ids).unsqueeze(0), how, [&](const at::Tensor& tokens) {
    const auto id = tokens.item<int64_t>();
    if (id != how.eos_token_id) show(id);
    std::fflush(stdout);
    return true;
  });
  fmt::print("\n");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 2 || argc % 2 != 0)
      throw std::invalid_argument("generate CHECKPOINT [--OPTION VALUE]...");
    for (int i = 2; i < argc; i += 2) {
      const std::string argument = argv[i];
      if (!argument.starts_with("--") || !options.contains(argument.substr(2))) {
        throw std::invalid_argument(fmt::format("{}: the options are --{}", argument,
                                                fmt::join(std::views::keys(options), " --")));
      }
      options[argument.substr(2)] = argv[i + 1];
    }
    generate(argv[1]);
  } catch (const std::exception& error) {
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    fmt::print(stderr, "generate: {}\n",
               torch_error ? torch_error->what_without_backtrace() : error.what());
    return 1;
  }
}

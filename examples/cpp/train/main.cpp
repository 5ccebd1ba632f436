// Trains a MUDDFormer on text files, a token per byte, or on files of token ids.
//
//   train --output runs/first book.txt notes/*.txt
//   train --output runs/second --token-bytes 2 --vocab-size 4096 train.bin   # of `muddformer
//   train`
//
// The newest checkpoint in the output folder is continued, bit for bit as if nothing had happened:
// batches depend on the seed and the step alone. examples/cpp/generate continues a text with it,
// and so does muddformer.from_pretrained in Python.
#include <ATen/CPUGeneratorImpl.h>
#include <fmt/ranges.h>
#include <muddformer/models.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>
#include <numbers>
#include <ranges>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using torch::Tensor;

// Options and their defaults.
std::map<std::string, std::string> options = {
    {"output", "runs/cpp"}, {"steps", "200"},      {"stop-after", "1e9"}, {"batch", "8"},
    {"layers", "4"},        {"dim", "128"},        {"heads", "4"},        {"block-size", "128"},
    {"warmup", "20"},       {"decay", "0.1"},      {"clip", "1"},         {"learning-rate", "2e-3"},
    {"log-every", "10"},    {"save-every", "100"}, {"seed", "0"},         {"token-bytes", "1"},
    {"vocab-size", "256"},
};

double number(const std::string& name) {
  std::istringstream text(options.at(name));
  double value = 0;
  if (!(text >> value) || !text.eof()) throw std::invalid_argument("--" + name + " takes a number");
  return value;
}
const auto integer = [](const std::string& name) { return std::lround(number(name)); };
int64_t positive(const std::string& name) {
  if (integer(name) < 1) throw std::invalid_argument("--" + name + " must be at least 1");
  return integer(name);
}

Tensor read_tokens(const std::vector<std::string>& files) {
  const std::map<int64_t, at::ScalarType> dtypes = {
      {1, at::kByte}, {2, at::kUInt16}, {4, at::kUInt32}};
  const int64_t bytes = integer("token-bytes");
  if (!dtypes.contains(bytes)) throw std::invalid_argument("--token-bytes must be 1, 2 or 4");
  std::vector<Tensor> parts;
  for (const std::string& file : files) {
    const auto count = static_cast<int64_t>(fs::file_size(file)) / bytes;
    if (count > 0) parts.push_back(torch::from_file(file, false, count, dtypes.at(bytes)));
  }
  if (parts.empty()) throw std::invalid_argument("give files with text or token ids to train on");
  return parts.size() == 1 ? parts[0] : torch::cat(parts);
}

// The sequences of an update: random windows, int64 [batch, block_size + 1].
Tensor read_batch(const Tensor& tokens, int64_t step, int64_t block_size) {
  auto generator = torch::make_generator<at::CPUGeneratorImpl>(integer("seed") * 1000003 + step);
  const Tensor starts =
      torch::randint(tokens.size(0) - block_size, {positive("batch")}, generator, at::kLong);
  std::vector<Tensor> rows;
  for (int64_t i = 0; i < starts.size(0); ++i) {
    rows.push_back(tokens.narrow(0, starts[i].item<int64_t>(), block_size + 1).to(at::kLong));
  }
  return torch::stack(rows);
}

// Matrices decay; embeddings, norms, biases and connections do not.
torch::optim::AdamW make_optimizer(const muddformer::MUDDFormer& model) {
  const std::vector<Tensor> connections = model->connection_parameters();
  std::vector<Tensor> decayed, kept;
  for (const auto& item : model->named_parameters()) {
    const bool connection = std::ranges::any_of(
        connections, [&](const Tensor& parameter) { return parameter.is_same(item.value()); });
    const bool matrix = item.value().dim() >= 2 && item.key() != "tok_embeddings.weight";
    (matrix && !connection ? decayed : kept).push_back(item.value());
  }
  torch::optim::AdamW optimizer(
      {torch::optim::OptimizerParamGroup(kept), torch::optim::OptimizerParamGroup(decayed)},
      torch::optim::AdamWOptions().betas({0.9, 0.95}).weight_decay(number("decay")));
  static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[0].options()).weight_decay(0);
  return optimizer;
}

// Linear warm-up, then a cosine to a tenth.
double learning_rate(int64_t step) {
  const double warmup = number("warmup"), steps = number("steps"), now = static_cast<double>(step);
  if (now <= warmup) return number("learning-rate") * now / warmup;
  const double progress = (now - warmup) / (steps - warmup);
  return number("learning-rate") * (0.1 + 0.45 * (1 + std::cos(std::numbers::pi * progress)));
}

// A checkpoint is a folder step-N; optimizer.safetensors is written last and makes it complete.
void save(const muddformer::MUDDFormer& model, torch::optim::AdamW& optimizer, int64_t step) {
  const fs::path folder = fs::path(options["output"]) / fmt::format("step-{:08}", step);
  muddformer::save_pretrained(model, folder);
  std::map<std::string, Tensor> state;
  for (const auto& item : model->named_parameters()) {
    const auto& entry = static_cast<const torch::optim::AdamWParamState&>(
        *optimizer.state().at(item.value().unsafeGetTensorImpl()));
    state[item.key() + "/exp_avg"] = entry.exp_avg();
    state[item.key() + "/exp_avg_sq"] = entry.exp_avg_sq();
  }
  muddformer::save_safetensors(state, folder / "optimizer.safetensors",
                               {{"step", std::to_string(step)}});
}

int64_t restore(const muddformer::MUDDFormer& model, torch::optim::AdamW& optimizer,
                const fs::path& folder) {
  const muddformer::SafetensorsFile file(folder / "optimizer.safetensors");
  const int64_t step = std::stoll(file.metadata().at("step"));
  for (const auto& item : model->named_parameters()) {
    auto entry = std::make_unique<torch::optim::AdamWParamState>();
    entry->step(step);
    entry->exp_avg(file.tensor(item.key() + "/exp_avg").clone());
    entry->exp_avg_sq(file.tensor(item.key() + "/exp_avg_sq").clone());
    optimizer.state()[item.value().unsafeGetTensorImpl()] = std::move(entry);
  }
  return step;
}

fs::path newest_checkpoint() {
  std::vector<fs::path> folders;
  for (const auto& entry : fs::directory_iterator(options["output"])) {
    if (fs::exists(entry.path() / "optimizer.safetensors")) folders.push_back(entry.path());
  }
  return folders.empty() ? fs::path() : *std::ranges::max_element(folders);
}

void train(const std::vector<std::string>& files) {
  const Tensor tokens = read_tokens(files);
  fs::create_directories(options["output"]);  // or say at once that it cannot be
  const fs::path checkpoint = newest_checkpoint();
  torch::manual_seed(static_cast<uint64_t>(integer("seed")));
  muddformer::MUDDFormerConfig config{.n_layer = integer("layers"), .ffn_reallocation = false};
  config.vocab_size = integer("vocab-size");
  config.block_size = integer("block-size");
  config.n_head = integer("heads");
  config.dim = integer("dim");
  auto model =
      checkpoint.empty() ? muddformer::MUDDFormer(config) : muddformer::from_pretrained(checkpoint);
  torch::optim::AdamW optimizer = make_optimizer(model);
  int64_t step = checkpoint.empty() ? 0 : restore(model, optimizer, checkpoint);
  const int64_t block_size = model->config.block_size, steps = integer("steps"), first = step;
  const int64_t last = std::min(steps, integer("stop-after"));
  if (tokens.size(0) <= block_size) throw std::invalid_argument("the text is shorter than a block");
  fmt::print("{} tokens, from step {} of {}\n", tokens.size(0), step, steps);

  const auto start = std::chrono::steady_clock::now();
  while (step < last) {
    const Tensor rows = read_batch(tokens, ++step, block_size);
    const Tensor loss = model->forward(rows.slice(1, 0, block_size), rows.slice(1, 1));
    optimizer.zero_grad();
    loss.backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), number("clip"));
    for (auto& group : optimizer.param_groups()) group.options().set_lr(learning_rate(step));
    optimizer.step();
    if (step % positive("log-every") == 0 || step == last) {
      const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
      const double speed = static_cast<double>(step - first) / spent.count();
      const int64_t left = std::llround(static_cast<double>(steps - step) / speed);
      fmt::print("step {:>6}  loss {:.6f}  {:>8.0f} tokens/s  {}:{:02} left\n", step,
                 loss.item<double>(), speed * static_cast<double>(rows.size(0) * block_size),
                 left / 60, left % 60);
      std::fflush(stdout);
    }
    if (step % positive("save-every") == 0 || step == last) save(model, optimizer, step);
  }
}

int main(int argc, char** argv) {
  try {
    std::vector<std::string> files;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (!argument.starts_with("--")) {
        files.push_back(argument);
      } else if (!options.contains(argument.substr(2)) || i + 1 == argc) {
        throw std::invalid_argument(fmt::format("{}: the options are --{}", argument,
                                                fmt::join(std::views::keys(options), " --")));
      } else {
        options[argument.substr(2)] = argv[++i];
      }
    }
    train(files);
  } catch (const std::exception& error) {
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    fmt::print(stderr, "train: {}\n",
               torch_error ? torch_error->what_without_backtrace() : error.what());
    return 1;
  }
}

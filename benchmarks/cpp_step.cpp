// A training step of the C++ model; benchmarks/cpp_step.py compiles and runs it beside Python's.
//
// `cpp_step CONFIG.json DEVICE BATCH TOKENS SECONDS THREADS` prints the median milliseconds of a
// step (zero_grad, forward, backward, AdamW), those of forward and backward alone, and the peak
// memory in MiB: on CUDA what tensors took, on a CPU what the process has grown by.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <muddformer/models.h>
#include <torch/cuda.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

// The most memory that this process has had; getrusage() would begin with its parent's.
double peak_resident_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

template <class Call>
double median_ms(const Call& call, bool cuda, double seconds) {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < 3; ++i) call();
  if (cuda) torch::cuda::synchronize();
  std::vector<double> times;
  const auto begin = Clock::now();
  while (times.size() < 10 || Clock::now() - begin < std::chrono::duration<double>(seconds)) {
    const auto start = Clock::now();
    call();
    if (cuda) torch::cuda::synchronize();
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "usage: cpp_step CONFIG.json DEVICE BATCH TOKENS SECONDS THREADS\n";
    return 2;
  }
  std::ifstream file(argv[1]);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const at::Device device(argv[2]);
  const bool cuda = device.is_cuda();
  const int64_t batch = std::stoll(argv[3]), tokens = std::stoll(argv[4]);
  const double seconds = std::stod(argv[5]);
  at::set_num_threads(std::stoi(argv[6]));
  at::manual_seed(0);

  const double before = peak_resident_mib();
  const auto config = muddformer::MUDDFormerConfig::from_json(text);
  muddformer::MUDDFormer model(config, device);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(1e-4));
  const at::Tensor ids = at::randint(config.vocab_size, {batch, tokens}, at::kLong).to(device);
  const at::Tensor targets = ids.roll(-1, 1);
  const auto pass = [&] {
    optimizer.zero_grad();
    model->forward(ids, targets).backward();
  };
  const auto step = [&] {
    pass();
    optimizer.step();
  };
  const double step_ms = median_ms(step, cuda, seconds), pass_ms = median_ms(pass, cuda, seconds);
  double peak = peak_resident_mib() - before;
  if (cuda) {
    using c10::CachingAllocator::StatType;
    const auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(device.index());
    peak =
        static_cast<double>(stats.allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)].peak) /
        (1 << 20);
  }
  std::cout << step_ms << ' ' << pass_ms << ' ' << peak << '\n';
}

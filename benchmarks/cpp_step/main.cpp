// A training step of the C++ model; cpp_step.py compiles and runs it beside Python's.
//
// `cpp_step CONFIG.json DEVICE DTYPE BATCH TOKENS SECONDS THREADS [TRACE.json STEPS]` prints the
// median milliseconds of a step (forward, backward, fused AdamW, zero_grad), those of forward and
// backward alone, the peak of what tensors took on the device, and of what the process has had of
// the host's memory, in MiB. DTYPE: float32, or bfloat16 for autocast. With a trace it writes what
// the device does in so many steps, as torch.profiler does.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <muddformer/models.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/cuda.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tensor_memory.h"

namespace {

// torch.autocast(device, torch.bfloat16), if wanted.
class Autocast {
 public:
  Autocast(at::DeviceType device, bool wanted) : device_(device), wanted_(wanted) {
    if (!wanted_) return;
    at::autocast::set_autocast_dtype(device_, at::kBFloat16);
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (!wanted_) return;
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_, false);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  at::DeviceType device_;
  bool wanted_;
};

// torch.optim.AdamW(fused=True), which LibTorch's own optimizer does not offer.
class FusedAdamW {
 public:
  FusedAdamW(std::vector<at::Tensor> parameters, double lr)
      : parameters_(std::move(parameters)), lr_(lr) {
    for (const at::Tensor& p : parameters_) {
      means_.push_back(at::zeros_like(p));
      squares_.push_back(at::zeros_like(p));
      steps_.push_back(at::zeros({}, p.options().dtype(at::kFloat)));
    }
  }
  void step() {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> grads;
    for (const at::Tensor& p : parameters_) grads.push_back(p.grad());
    at::_foreach_add_(steps_, 1);
    at::_fused_adamw_(parameters_, grads, means_, squares_, {}, steps_, lr_, /*beta1=*/0.9,
                      /*beta2=*/0.999, /*weight_decay=*/1e-2, /*eps=*/1e-8, /*amsgrad=*/false,
                      /*maximize=*/false);
  }
  void zero_grad() {
    for (at::Tensor& p : parameters_) p.mutable_grad() = at::Tensor();
  }

 private:
  std::vector<at::Tensor> parameters_, means_, squares_, steps_;
  double lr_;
};

double peak_cuda_mib(at::Device device) {
  using c10::CachingAllocator::StatType;
  const auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(device.index());
  const auto& bytes = stats.allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)];
  return static_cast<double>(bytes.peak) / (1 << 20);
}

// The most memory that this process has had; getrusage() would begin with its parent's.
double peak_resident_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stod(line.substr(6)) / 1024;
  }
  return 0;
}

// Of a call, on CUDA of five that are enqueued one after the other, as in a loop of training.
template <class Call>
double median_ms(const Call& call, bool cuda, double seconds) {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < 3; ++i) call();
  if (cuda) torch::cuda::synchronize();
  std::vector<double> times;
  const auto begin = Clock::now();
  while (times.size() < 10 || Clock::now() - begin < std::chrono::duration<double>(seconds)) {
    const int calls = cuda ? 5 : 1;
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) call();
    if (cuda) torch::cuda::synchronize();
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count() /
                    calls);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Writes a trace of calls: the kernels, or what the CPU does.
template <class Call>
void trace(const Call& call, bool cuda, int calls, const std::string& path) {
  using torch::profiler::impl::ActivityType;
  namespace profiler = torch::autograd::profiler;
  const std::set<ActivityType> activities{cuda ? ActivityType::CUDA : ActivityType::CPU};
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  for (int i = 0; i < calls; ++i) call();
  if (cuda) torch::cuda::synchronize();
  profiler::disableProfiler()->save(path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8 && argc != 10) {
    std::cerr << "usage: cpp_step CONFIG.json DEVICE DTYPE BATCH TOKENS SECONDS THREADS "
                 "[TRACE.json STEPS]\n";
    return 2;
  }
  std::ifstream file(argv[1]);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const at::Device device(argv[2]);
  const bool cuda = device.is_cuda();
  const bool autocast = std::string(argv[3]) == "bfloat16";
  const int64_t batch = std::stoll(argv[4]), tokens = std::stoll(argv[5]);
  const double seconds = std::stod(argv[6]);
  at::set_num_threads(std::stoi(argv[7]));
  at::manual_seed(0);
  count_tensor_memory();

  const auto config = muddformer::MUDDFormerConfig::from_json(text);
  muddformer::MUDDFormer model(config, device);
  FusedAdamW optimizer(model->parameters(), 1e-4);
  const at::Tensor ids = at::randint(config.vocab_size, {batch, tokens}, at::kLong).to(device);
  const at::Tensor targets = ids.roll(-1, 1);
  const auto pass = [&] {
    optimizer.zero_grad();
    const at::Tensor loss = [&] {
      const Autocast guard(device.type(), autocast);
      return model->forward(ids, targets);
    }();
    loss.backward();
  };
  const auto step = [&] {
    pass();
    optimizer.step();
  };
  const double step_ms = median_ms(step, cuda, seconds), pass_ms = median_ms(pass, cuda, seconds);
  std::cout << step_ms << ' ' << pass_ms << ' '
            << (cuda ? peak_cuda_mib(device) : peak_tensor_mib()) << ' ' << peak_resident_mib()
            << '\n';
  if (argc == 10) trace(step, cuda, std::stoi(argv[9]), argv[8]);
}

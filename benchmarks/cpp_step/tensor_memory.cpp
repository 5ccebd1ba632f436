#include "tensor_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <atomic>
#include <cstddef>
#include <cstring>

namespace {

std::atomic<size_t> now = 0, peak = 0;

// Keeps the number of bytes in front of each block, in a place that leaves the block aligned.
class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    auto* block = static_cast<std::byte*>(c10::alloc_cpu(bytes + kFront));
    std::memcpy(block, &bytes, sizeof(bytes));
    const size_t total = now += bytes;
    for (size_t most = peak; total > most && !peak.compare_exchange_weak(most, total);) continue;
    return {block + kFront, block + kFront, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kFront = 64;

  static void release(void* data) {
    if (data == nullptr) return;
    std::byte* block = static_cast<std::byte*>(data) - kFront;
    size_t bytes = 0;
    std::memcpy(&bytes, block, sizeof(bytes));
    now -= bytes;
    c10::free_cpu(block);
  }
};

}  // namespace

void count_tensor_memory() {
  static CountingAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/255);
}

double peak_tensor_mib() {
  return static_cast<double>(peak) / (1 << 20);
}

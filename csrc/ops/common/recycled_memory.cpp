#include "recycled_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>

namespace muddformer::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kSmallest = size_t{128} << 10;  // malloc itself recycles what is smaller
constexpr std::chrono::seconds kIdle{5};         // what is unused for longer is given back

size_t most_kept() {
  constexpr const char* kName = "MUDDFORMER_CPU_CACHE_MIB";
  constexpr size_t kDefault = 256, kMost = size_t{1} << 20;
  const char* const given = std::getenv(kName);
  size_t mebibytes = kDefault;
  if (given != nullptr && *given != '\0') {
    const std::string_view text = given;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), mebibytes);
    TORCH_CHECK_VALUE(
        error == std::errc() && end == text.data() + text.size() && mebibytes <= kMost, kName,
        ": expected a whole number of MiB from 0 to ", kMost, ", got '", text, "'");
  }
  return mebibytes << 20;
}

struct Block {
  c10::DataPtr memory;
  size_t bytes;
  Clock::time_point since{};  // when it came back
};

class RecyclingAllocator final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive every static object.
  static RecyclingAllocator& instance() {
    static auto* allocator = new RecyclingAllocator(most_kept());
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest || bytes > most_kept_) return c10::GetCPUAllocator()->allocate(bytes);
    std::unique_ptr<Block> block = take(bytes);
    if (block == nullptr) {
      block.reset(new Block{c10::GetCPUAllocator()->allocate(bytes), bytes});
    }
    void* data = block->memory.get();
    const auto give_back = [](void* context) {
      instance().keep(std::unique_ptr<Block>(static_cast<Block*>(context)));
    };
    return {data, block.release(), give_back, c10::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  explicit RecyclingAllocator(size_t most_kept) : most_kept_(most_kept) {
    // A child has the blocks, but not the thread that watches them.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] {
                     instance().watched_ = false;
                     instance().mutex_.unlock();
                   });
    // From here on the static objects that freeing needs are taken apart.
    std::atexit([] {
      const std::lock_guard lock(instance().mutex_);
      instance().exiting_ = true;
    });
  }

  std::unique_ptr<Block> take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    // The newest first: the caches may still hold it.
    const auto found = std::find_if(kept_.rbegin(), kept_.rend(),
                                    [bytes](const auto& block) { return block->bytes == bytes; });
    if (found == kept_.rend()) return nullptr;
    std::unique_ptr<Block> block = std::move(*found);
    kept_.erase(std::next(found).base());
    kept_bytes_ -= bytes;
    return block;
  }

  // What is not kept is freed by ~Block.
  void keep(std::unique_ptr<Block> block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    block->since = Clock::now();
    while (kept_bytes_ + block->bytes > most_kept_) drop_oldest();
    kept_bytes_ += block->bytes;
    kept_.push_back(std::move(block));
    if (!watched_ && !exiting_) watch();
  }

  void drop_oldest() {
    kept_bytes_ -= kept_.front()->bytes;
    kept_.pop_front();
  }

  // Starts the thread that frees what is idle. Where the system has no thread to give, blocks stay
  // until others need their place.
  void watch() {
    try {
      std::thread([] { instance().free_idle(); }).detach();
      watched_ = true;
    } catch (const std::system_error&) {
    }
  }

  void free_idle() {
    std::unique_lock lock(mutex_);
    while (!kept_.empty() && !exiting_) {
      const Clock::time_point due = kept_.front()->since + kIdle;
      if (due <= Clock::now()) {
        drop_oldest();
        continue;
      }
      lock.unlock();
      std::this_thread::sleep_until(due);
      lock.lock();
    }
    watched_ = false;
    if (exiting_) return;
    lock.unlock();
#if defined(__GLIBC__)
    malloc_trim(0);  // blocks that malloc would rather keep in the middle of its heap
#endif
  }

  const size_t most_kept_;
  // Operators only ever try it: a thread that comes second does without.
  std::mutex mutex_;
  std::deque<std::unique_ptr<Block>> kept_;  // the oldest first
  size_t kept_bytes_ = 0;
  bool watched_ = false;  // there is a thread that frees what is idle
  bool exiting_ = false;
};

}  // namespace

at::Tensor recycled_output(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_generic(sizes, &RecyclingAllocator::instance(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

std::vector<at::Tensor> recycled_outputs(int64_t count, const at::Tensor& like) {
  std::vector<at::Tensor> outputs;
  outputs.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    outputs.push_back(recycled_output(like.sizes(), like.scalar_type()));
  }
  return outputs;
}

}  // namespace muddformer::cpu

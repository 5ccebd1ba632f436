#include "recycled_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <mutex>

namespace muddformer::cpu {
namespace {

constexpr size_t kMostKept = size_t{256} << 20;
constexpr size_t kSmallest = size_t{128} << 10;  // malloc itself recycles what is smaller

struct Block {
  c10::DataPtr memory;
  size_t bytes;
};

class RecyclingAllocator final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive every static object.
  static RecyclingAllocator& instance() {
    static auto* allocator = new RecyclingAllocator;
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return c10::GetCPUAllocator()->allocate(bytes);
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
    if (!lock || block->bytes > kMostKept) return;
    while (kept_bytes_ + block->bytes > kMostKept) {
      kept_bytes_ -= kept_.front()->bytes;
      kept_.pop_front();
    }
    kept_bytes_ += block->bytes;
    kept_.push_back(std::move(block));
  }

  // Only ever tried: a thread that comes second, or a child forked while another thread held the
  // lock, does without.
  std::mutex mutex_;
  std::deque<std::unique_ptr<Block>> kept_;
  size_t kept_bytes_ = 0;
};

}  // namespace

std::vector<at::Tensor> recycled_outputs(int64_t count, const at::Tensor& like) {
  std::vector<at::Tensor> outputs;
  outputs.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    outputs.emplace_back(at::detail::empty_generic(like.sizes(), &RecyclingAllocator::instance(),
                                                   c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                   like.scalar_type(), std::nullopt));
  }
  return outputs;
}

}  // namespace muddformer::cpu

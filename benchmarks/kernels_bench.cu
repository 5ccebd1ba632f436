// Speed of the depth-aggregation kernels, without torch: correctness against float64 first, then
// medians of CUDA-event timings beside the copy speed of the same run. Prints a table and writes
// CSV.
//
// The copy speed is that of one large copy; same_size_copy_ms is a copy that moves as many bytes as
// the case, launched alike: what small cases lose to the launch and to the memory's start shows
// there too.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -Icsrc/kernels benchmarks/kernels_bench.cu -o kernels_bench
//       csrc/kernels/common/device.cu csrc/kernels/depth_aggregate/*.cu
//   kernels_bench [--csv FILE] [--date YYYY-MM-DD] [--group NAME]... [--op NAME]
//
// floor = bytes that must move at the speed of a device-to-device copy (bytes read plus bytes
// written): S reads + C writes of [tokens, D] forward, 2S + C reads + S writes backward with an
// incoming gradient for every source.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <type_traits>
#include <vector>

#include "depth_aggregate/depth_aggregate.h"

namespace {

using namespace muddformer::kernels;

#define CUDA_CHECK(call)                                                 \
  do {                                                                   \
    const cudaError_t error = (call);                                    \
    if (error != cudaSuccess) {                                          \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(error));                           \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

enum class Op { Forward, Backward };

struct Case {
  const char* group;
  Op op;
  Path path;
  DType dtype;
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
};

const char* name(Op op) {
  return op == Op::Forward ? "forward" : "backward";
}

const char* name(Path path) {
  return path == Path::Automatic ? "automatic"
         : path == Path::Scalar  ? "scalar"
         : path == Path::Vector  ? "vector"
                                 : "ring";
}

const char* name(DType dtype) {
  return dtype == DType::Float32    ? "float32"
         : dtype == DType::Float64  ? "float64"
         : dtype == DType::BFloat16 ? "bfloat16"
                                    : "float16";
}

size_t size_of(DType dtype) {
  return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
}

__global__ void fill(unsigned char* to, size_t count, DType dtype, uint64_t seed) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint64_t z = seed * 0x9e3779b97f4a7c15ull + i;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    const float value = static_cast<float>((z >> 41) & 0x3fffff) / (1 << 21) - 1.0f;
    switch (dtype) {
      case DType::Float32:
        reinterpret_cast<float*>(to)[i] = value;
        break;
      case DType::Float64:
        reinterpret_cast<double*>(to)[i] = value;
        break;
      case DType::BFloat16:
        reinterpret_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(value);
        break;
      case DType::Float16:
        reinterpret_cast<__half*>(to)[i] = __float2half(value);
        break;
    }
  }
}

// One large allocation from which every case cuts its tensors.
struct Arena {
  unsigned char* base = nullptr;
  size_t size = 0;
  size_t used = 0;

  unsigned char* take(size_t bytes) {
    unsigned char* start = base + used;
    used += (bytes + 511) / 512 * 512;
    if (used > size) {
      std::fprintf(stderr, "the arena is too small\n");
      std::exit(1);
    }
    return start;
  }
};

// The tensors of one case.
struct Tensors {
  std::vector<const void*> x, grad_in, dy;
  std::vector<void*> grad_out, y;
  std::vector<int64_t> stride;
  unsigned char* w;
  unsigned char* dw;

  Tensors(const Case& c, Arena& arena) {
    const size_t row = c.dim * size_of(c.dtype);
    const size_t weights = c.tokens * c.ways * c.sources * size_of(c.dtype);
    w = arena.take(weights);
    dw = arena.take(weights);
    for (int j = 0; j < c.sources; ++j) {
      x.push_back(arena.take(c.tokens * row));
      stride.push_back(c.dim);
      if (c.op == Op::Forward) continue;
      grad_in.push_back(arena.take(c.tokens * row));
      grad_out.push_back(arena.take(c.tokens * row));
    }
    for (int i = 0; i < c.ways; ++i) {
      if (c.op == Op::Forward) y.push_back(arena.take(c.tokens * row));
      if (c.op == Op::Backward) dy.push_back(arena.take(c.tokens * row));
    }
  }

  cudaError_t launch(const Case& c, cudaStream_t stream) const {
    const int64_t w_stride = static_cast<int64_t>(c.ways) * c.sources;
    if (c.op == Op::Forward) {
      return launch_aggregate_forward({c.dtype, c.tokens, c.dim, c.sources, c.ways, x.data(),
                                       stride.data(), w, w_stride, y.data(), c.path},
                                      stream);
    }
    return launch_aggregate_backward(
        {c.dtype, c.tokens, c.dim, c.sources, c.ways, x.data(), stride.data(), w, w_stride,
         dy.data(), grad_in.data(), grad_out.data(), dw, c.path},
        stream);
  }
};

std::vector<double> download(const void* from, int64_t count, DType dtype) {
  std::vector<unsigned char> raw(count * size_of(dtype));
  CUDA_CHECK(cudaMemcpy(raw.data(), from, raw.size(), cudaMemcpyDeviceToHost));
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) {
    switch (dtype) {
      case DType::Float32:
        values[i] = reinterpret_cast<const float*>(raw.data())[i];
        break;
      case DType::Float64:
        values[i] = reinterpret_cast<const double*>(raw.data())[i];
        break;
      case DType::BFloat16:
        values[i] = __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(raw.data())[i]);
        break;
      case DType::Float16:
        values[i] = __half2float(reinterpret_cast<const __half*>(raw.data())[i]);
        break;
    }
  }
  return values;
}

// The largest ||out - reference|| / ||reference|| over the outputs, on a few tokens. Outputs are
// poisoned before.
double error_of(const Case& c, const Tensors& tensors) {
  const size_t row_bytes = c.dim * size_of(c.dtype);
  for (void* out : tensors.y) CUDA_CHECK(cudaMemset(out, 0xff, c.tokens * row_bytes));
  for (void* out : tensors.grad_out) CUDA_CHECK(cudaMemset(out, 0xff, c.tokens * row_bytes));
  CUDA_CHECK(tensors.launch(c, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  const auto row = [&](const void* from, int64_t t) {
    return download(static_cast<const unsigned char*>(from) + t * row_bytes, c.dim, c.dtype);
  };
  double worst = 0;
  const auto compare = [&](const std::vector<double>& out, const std::vector<double>& reference) {
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      difference += (out[i] - reference[i]) * (out[i] - reference[i]);
      norm += reference[i] * reference[i];
    }
    const double error = std::sqrt(difference / norm);
    worst = std::isnan(error) ? error : std::max(worst, error);
  };
  const int64_t block = static_cast<int64_t>(c.ways) * c.sources;
  for (const int64_t t : {int64_t{0}, c.tokens / 3, c.tokens - 1}) {
    const auto w = download(tensors.w + t * block * size_of(c.dtype), block, c.dtype);
    if (c.op == Op::Forward) {
      std::vector<std::vector<double>> sums(c.ways, std::vector<double>(c.dim));
      for (int j = 0; j < c.sources; ++j) {
        const auto x = row(tensors.x[j], t);
        for (int way = 0; way < c.ways; ++way) {
          for (int64_t i = 0; i < c.dim; ++i) sums[way][i] += w[way * c.sources + j] * x[i];
        }
      }
      for (int way = 0; way < c.ways; ++way) compare(row(tensors.y[way], t), sums[way]);
      continue;
    }
    std::vector<double> dots(block);
    std::vector<std::vector<double>> dy;
    for (int way = 0; way < c.ways; ++way) dy.push_back(row(tensors.dy[way], t));
    for (int j = 0; j < c.sources; ++j) {
      const auto x = row(tensors.x[j], t);
      auto grad = row(tensors.grad_in[j], t);
      for (int way = 0; way < c.ways; ++way) {
        for (int64_t i = 0; i < c.dim; ++i) {
          grad[i] += w[way * c.sources + j] * dy[way][i];
          dots[way * c.sources + j] += dy[way][i] * x[i];
        }
      }
      compare(row(tensors.grad_out[j], t), grad);
    }
    compare(download(tensors.dw + t * block * size_of(c.dtype), block, c.dtype), dots);
  }
  return worst;
}

// Median milliseconds of launch(i), from batches of about two milliseconds.
template <typename Launch>
double median_ms(const Launch& launch) {
  constexpr int kBatches = 15;
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  int count = 0;
  const auto timed = [&](int launches) {
    CUDA_CHECK(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i) launch(count++);
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    return ms / launches;
  };
  timed(3);
  const int launches = std::clamp(static_cast<int>(2.0 / timed(3)), 3, 100);
  std::vector<double> times;
  for (int i = 0; i < kBatches; ++i) times.push_back(timed(launches));
  std::sort(times.begin(), times.end());
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  return times[kBatches / 2];
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const Op op : {Op::Forward, Op::Backward}) {
    const auto add = [&](const char* group, int64_t tokens, int64_t dim, int sources, int ways = 4,
                         DType dtype = DType::BFloat16, Path path = Path::Automatic) {
      cases.push_back({group, op, path, dtype, tokens, dim, sources, ways});
    };
    for (const int s : {5, 9, 17, 25, 33}) add("main", 8192, 2048, s);
    for (const int64_t dim : {1024, 2560, 4096}) {
      for (const int s : {9, 17, 33}) add("width", 8192, dim, s);
    }
    for (const int64_t dim : {384, 768, 8192}) add("width", 8192, dim, 17);
    for (const int64_t tokens : {1024, 2048, 4096, 16384, 32768, 65536}) {
      for (const int s : {9, 33}) add("tokens", tokens, 2048, s);
    }
    for (const int ways : {1, 2, 3}) add("ways", 8192, 2048, 17, ways);
    for (const DType dtype : {DType::Float32, DType::Float16}) {
      for (const int64_t dim : {1024, 2048, 2560}) {
        for (const int s : {9, 33}) add("dtype", 8192, dim, s, 4, dtype);
      }
    }
    for (const int s : {5, 9, 17, 25, 33})
      add("vector", 8192, 2048, s, 4, DType::BFloat16, Path::Vector);
    for (const int64_t dim : {1024, 2560, 4096})
      add("vector", 8192, dim, 17, 4, DType::BFloat16, Path::Vector);
    for (const DType dtype : {DType::Float32, DType::Float16})
      add("vector", 8192, 2048, 17, 4, dtype, Path::Vector);
    add("scalar", 8192, 2048, 17, 4, DType::BFloat16, Path::Scalar);
    add("scalar", 8192, 2048, 17, 4, DType::Float64, Path::Scalar);
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const char* csv_path = nullptr;
  std::string date;
  std::vector<std::string> groups;
  std::string op;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--csv") == 0) csv_path = argv[i + 1];
    if (std::strcmp(argv[i], "--date") == 0) date = argv[i + 1];
    if (std::strcmp(argv[i], "--group") == 0) groups.push_back(argv[i + 1]);
    if (std::strcmp(argv[i], "--op") == 0) op = argv[i + 1];
  }
  if (date.empty()) {
    char text[16];
    const std::time_t now = std::time(nullptr);
    std::strftime(text, sizeof(text), "%Y-%m-%d", std::gmtime(&now));
    date = text;
  }
  cudaDeviceProp device;
  int runtime = 0;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  const std::string cuda =
      std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10);

  std::vector<Case> cases;
  for (const Case& c : all_cases()) {
    if (!op.empty() && op != name(c.op)) continue;
    if (groups.empty() || std::count(groups.begin(), groups.end(), c.group) > 0) cases.push_back(c);
  }
  std::stable_sort(cases.begin(), cases.end(),
                   [](const Case& a, const Case& b) { return a.dtype < b.dtype; });
  const auto bytes_of = [](const Case& c) {
    const double units = c.op == Op::Forward ? c.sources + c.ways : 3.0 * c.sources + c.ways;
    return units * c.tokens * c.dim * size_of(c.dtype);
  };

  constexpr double kRotated =
      1e9;  // bytes that pass before a tensor is used again: many times the L2 cache
  Arena arena;
  for (const Case& c : cases) {
    arena.size = std::max(arena.size, static_cast<size_t>(1.1 * bytes_of(c) + kRotated));
  }
  CUDA_CHECK(cudaMalloc(&arena.base, arena.size));
  const size_t half = std::min(arena.size / 2, size_t{1} << 30);
  const double copy_ms = median_ms([&](int) {
    CUDA_CHECK(cudaMemcpyAsync(arena.base + half, arena.base, half, cudaMemcpyDeviceToDevice));
  });
  const double copy_speed = 2.0 * half / copy_ms * 1e-6;
  std::printf("%s, CUDA %s, copy %.0f GB/s\n", device.name, cuda.c_str(), copy_speed);
  std::printf("%-8s %-9s %-8s %-8s %7s %6s %4s %2s %9s %7s %9s %9s %9s\n", "group", "op", "path",
              "dtype", "tokens", "D", "S", "C", "ms", "GB/s", "of floor", "copy ms", "error");

  std::FILE* csv = csv_path != nullptr ? std::fopen(csv_path, "w") : nullptr;
  if (csv != nullptr) {
    std::fprintf(csv,
                 "device,cuda,date,op,path,dtype,tokens,D,S,C,ms,gb_per_s,fraction_of_floor,copy_"
                 "gb_per_s,same_size_copy_ms,error\n");
  }
  uint64_t seed = 0;
  bool all_right = true;
  for (const Case& c : cases) {
    arena.used = 0;
    std::vector<Tensors> sets;
    do {
      sets.emplace_back(c, arena);
    } while (arena.used < kRotated);
    fill<<<4096, 256>>>(arena.base, arena.used / size_of(c.dtype), c.dtype, ++seed);
    const double error = error_of(c, sets[0]);
    const double ms =
        median_ms([&](int i) { CUDA_CHECK(sets[i % sets.size()].launch(c, nullptr)); });
    const double speed = bytes_of(c) / ms * 1e-6;
    const size_t piece = static_cast<size_t>(bytes_of(c) / 2) / 512 * 512;
    const size_t pieces = arena.size / piece / 2;
    const double same_ms = median_ms([&](int i) {
      unsigned char* to = arena.base + i % pieces * 2 * piece;
      CUDA_CHECK(cudaMemcpyAsync(to, to + piece, piece, cudaMemcpyDeviceToDevice));
    });
    const double bound = c.dtype == DType::BFloat16  ? 1e-2
                         : c.dtype == DType::Float16 ? 2e-3
                                                     : 1e-5;
    std::printf("%-8s %-9s %-8s %-8s %7lld %6lld %4d %2d %9.4f %7.0f %9.3f %9.4f %9.1e%s\n",
                c.group, name(c.op), name(c.path), name(c.dtype), static_cast<long long>(c.tokens),
                static_cast<long long>(c.dim), c.sources, c.ways, ms, speed, speed / copy_speed,
                same_ms, error, error < bound ? "" : "  WRONG");
    if (csv != nullptr) {
      std::fprintf(csv, "%s,%s,%s,%s,%s,%s,%lld,%lld,%d,%d,%.5f,%.1f,%.4f,%.1f,%.5f,%.2e\n",
                   device.name, cuda.c_str(), date.c_str(), name(c.op), name(c.path), name(c.dtype),
                   static_cast<long long>(c.tokens), static_cast<long long>(c.dim), c.sources,
                   c.ways, ms, speed, speed / copy_speed, copy_speed, same_ms, error);
    }
    all_right = all_right && error < bound;
  }
  if (csv != nullptr) std::fclose(csv);
  return all_right ? 0 : 1;
}

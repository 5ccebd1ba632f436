// Host code alone: descriptors, and the cache of what cuBLASLt's heuristic has said. See matmul.h.
//
// cuBLASLt counts in columns: a row-major matrix is the transposed one to it. So it is given
// d^T = b^T a^T, whose first operand is b.
#include <cublasLt.h>

#include <cstring>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include "matmul.h"

namespace muddformer::kernels {
namespace {

constexpr int kMaxDevices = 64;
constexpr size_t kMaxPlans = 4096;  // when there are more, all are forgotten

// What a plan depends on. Compared and hashed as bytes: no padding, nothing left uninitialised.
struct Key {
  int64_t rows, columns, depth;
  int64_t a_stride, b_stride, d_stride, gelu_input_stride, workspace_bytes;
  int32_t dtype, out_dtype, transposed, epilogue, adds, alignment[4], device;
};
static_assert(sizeof(Key) == 8 * 8 + 10 * 4);

std::string_view bytes_of(const Key& key) {
  return {reinterpret_cast<const char*>(&key), sizeof(Key)};
}
struct Hash {
  size_t operator()(const Key& key) const { return std::hash<std::string_view>()(bytes_of(key)); }
};
struct Equal {
  bool operator()(const Key& a, const Key& b) const { return bytes_of(a) == bytes_of(b); }
};

// Descriptors are plain memory: a launch copies them and puts its own pointers in.
struct Plan {
  bool supported = false;
  cublasLtMatmulDescOpaque_t operation{};
  cublasLtMatrixLayoutOpaque_t a{}, b{}, d{};
  cublasLtMatmulAlgo_t algorithm{};
};

cudaError_t error_of(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return cudaSuccess;
    case CUBLAS_STATUS_NOT_SUPPORTED:
    case CUBLAS_STATUS_INVALID_VALUE:
      return cudaErrorNotSupported;
    case CUBLAS_STATUS_ALLOC_FAILED:
      return cudaErrorMemoryAllocation;
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return cudaErrorNoKernelImageForDevice;
    default:
      return cudaErrorLaunchFailure;
  }
}

// A handle for each device, for the life of the process: taking it apart would need the CUDA
// runtime at a time when that may be gone.
cudaError_t handle_of(int device, cublasLtHandle_t& handle) {
  static std::mutex mutex;
  static cublasLtHandle_t handles[kMaxDevices];
  if (device >= kMaxDevices) return cudaErrorNotSupported;
  const std::lock_guard lock(mutex);
  if (handles[device] == nullptr) {
    // What it allocates is no part of a graph that is being captured.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    const cublasStatus_t status = cublasLtCreate(&handles[device]);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != CUBLAS_STATUS_SUCCESS) return error_of(status);
  }
  handle = handles[device];
  return cudaSuccess;
}

cublasLtEpilogue_t epilogue_of(const Matmul& p) {
  if (p.bias_grad != nullptr) return CUBLASLT_EPILOGUE_BGRADB;  // our a is its b
  if (p.gelu_grad) return CUBLASLT_EPILOGUE_DGELU;
  if (p.gelu) {
    if (p.gelu_input == nullptr) {
      return p.bias != nullptr ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    }
    return p.bias != nullptr ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
  }
  return p.bias != nullptr ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
}

// The largest power of two, at most 256, that divides the address.
int32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<int32_t>(address & (~address + 1));
}

Key key_of(const Matmul& p, int device) {
  Key key;
  std::memset(&key, 0, sizeof(key));
  key.rows = p.rows;
  key.columns = p.columns;
  key.depth = p.depth;
  key.a_stride = p.a_stride;
  key.b_stride = p.b_stride;
  key.d_stride = p.d_stride;
  key.gelu_input_stride = p.gelu_input_stride;
  key.workspace_bytes = p.workspace_bytes;
  key.dtype = static_cast<int32_t>(p.dtype);
  key.out_dtype = static_cast<int32_t>(p.out_dtype);
  key.transposed = (p.a_transposed ? 1 : 0) | (p.b_transposed ? 2 : 0);
  key.epilogue = epilogue_of(p);
  key.adds = p.c != nullptr;
  key.alignment[0] = alignment_of(p.a);
  key.alignment[1] = alignment_of(p.b);
  key.alignment[2] = p.c == nullptr ? alignment_of(p.d) : alignment_of(p.c);
  key.alignment[3] = alignment_of(p.d);
  key.device = device;
  return key;
}

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::BFloat16 ? CUDA_R_16BF : dtype == DType::Float16 ? CUDA_R_16F : CUDA_R_32F;
}

template <typename Value>
cublasStatus_t set(cublasLtMatmulDescOpaque_t& operation, cublasLtMatmulDescAttributes_t attribute,
                   const Value& value) {
  return cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof(value));
}

// The pointers of a launch.
cublasStatus_t set_pointers(cublasLtMatmulDescOpaque_t& operation, const Matmul& p) {
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  const void* const bias = p.bias_grad != nullptr ? p.bias_grad : p.bias;
  if (bias != nullptr) status = set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  if (p.gelu_input != nullptr && status == CUBLAS_STATUS_SUCCESS) {
    status = set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.gelu_input);
  }
  return status;
}

cublasStatus_t describe(const Matmul& p, Plan& plan) {
  const cudaDataType_t type = type_of(p.dtype), out_type = type_of(p.out_dtype);
  const auto as_stored = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const auto layout = [](cublasLtMatrixLayoutOpaque_t& to, cudaDataType_t of, int64_t rows,
                         int64_t columns, int64_t stride) {
    return cublasLtMatrixLayoutInit(&to, of, static_cast<uint64_t>(columns),
                                    static_cast<uint64_t>(rows), stride);
  };
  cublasStatus_t status = cublasLtMatmulDescInit(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  const auto then = [&status](auto&& next) {
    if (status == CUBLAS_STATUS_SUCCESS) status = next();
  };
  then([&] { return set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, as_stored(p.b_transposed)); });
  then([&] { return set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, as_stored(p.a_transposed)); });
  then([&] { return set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue_of(p)); });
  if (p.bias != nullptr) {
    then([&] { return set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type); });
  }
  if (p.bias_grad != nullptr) {
    then([&] { return set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, out_type); });
  }
  if (p.gelu_input != nullptr) {
    then([&] {
      return set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.gelu_input_stride);
    });
  }
  then([&] {
    return p.b_transposed ? layout(plan.a, type, p.columns, p.depth, p.b_stride)
                          : layout(plan.a, type, p.depth, p.columns, p.b_stride);
  });
  then([&] {
    return p.a_transposed ? layout(plan.b, type, p.depth, p.rows, p.a_stride)
                          : layout(plan.b, type, p.rows, p.depth, p.a_stride);
  });
  then([&] { return layout(plan.d, out_type, p.rows, p.columns, p.d_stride); });
  then([&] { return set_pointers(plan.operation, p); });
  return status;
}

// What the heuristic says. Without an algorithm the plan stays unsupported.
Plan make_plan(const Matmul& p, const Key& key, cublasLtHandle_t handle) {
  Plan plan;
  cublasLtMatmulPreferenceOpaque_t preference;
  if (describe(p, plan) != CUBLAS_STATUS_SUCCESS ||
      cublasLtMatmulPreferenceInit(&preference) != CUBLAS_STATUS_SUCCESS) {
    return plan;
  }
  const auto prefer = [&preference](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)) ==
           CUBLAS_STATUS_SUCCESS;
  };
  const auto alignment = [&key](int i) { return static_cast<uint32_t>(key.alignment[i]); };
  // Parts of a sum meet in float32: never in the 16 bits of the output.
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  if (!prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(p.workspace_bytes)) ||
      !prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions) ||
      !prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(1)) ||
      !prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(0)) ||
      !prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(2)) ||
      !prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(3))) {
    return plan;
  }
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, &plan.operation, &plan.a, &plan.b, &plan.d, &plan.d, &preference, 1, &result, &found);
  plan.supported =
      status == CUBLAS_STATUS_SUCCESS && found == 1 && result.state == CUBLAS_STATUS_SUCCESS;
  plan.algorithm = result.algo;
  return plan;
}

Plan plan_of(const Matmul& p, int device, cublasLtHandle_t handle) {
  static std::mutex mutex;
  static std::unordered_map<Key, Plan, Hash, Equal> plans;
  const Key key = key_of(p, device);
  {
    const std::lock_guard lock(mutex);
    const auto known = plans.find(key);
    if (known != plans.end()) return known->second;
  }
  const Plan plan = make_plan(p, key, handle);
  const std::lock_guard lock(mutex);
  if (plans.size() >= kMaxPlans) plans.clear();
  return plans.emplace(key, plan).first->second;
}

}  // namespace

cudaError_t launch_matmul(const Matmul& p, cudaStream_t stream) {
  const bool narrow_type = p.dtype == DType::BFloat16 || p.dtype == DType::Float16;
  const bool known_output = p.out_dtype == p.dtype || p.out_dtype == DType::Float32;
  if (!narrow_type || !known_output || p.rows < 1 || p.columns < 1 || p.depth < 1) {
    return cudaErrorNotSupported;
  }
  int device = 0;
  cublasLtHandle_t handle = nullptr;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = handle_of(device, handle);
  if (error != cudaSuccess) return error;
  Plan plan = plan_of(p, device, handle);
  if (!plan.supported) return cudaErrorNotSupported;
  const cublasStatus_t status = set_pointers(plan.operation, p);
  if (status != CUBLAS_STATUS_SUCCESS) return error_of(status);
  const float one = 1, beta = p.c != nullptr ? 1 : 0;
  return error_of(cublasLtMatmul(handle, &plan.operation, &one, p.b, &plan.a, p.a, &plan.b, &beta,
                                 p.c != nullptr ? p.c : p.d, &plan.d, p.d, &plan.d, &plan.algorithm,
                                 p.workspace, static_cast<size_t>(p.workspace_bytes), stream));
}

}  // namespace muddformer::kernels

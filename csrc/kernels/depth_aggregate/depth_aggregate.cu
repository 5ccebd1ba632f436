// Checks and dispatch of depth aggregation: by dtype, and to the fastest path that the device, the
// alignment and the sizes allow. The fast paths of each dtype are compiled in files of their own.
#include "../common/device.h"
#include "checks.h"
#include "depth_aggregate.h"
#include "launch.h"
#include "scalar.cuh"

namespace muddformer::kernels {
namespace {

// Settles Path::Automatic; a path that was named must be possible.
cudaError_t choose(Path wanted, bool vectors, const Device& device, Path& path) {
  const Path best = !vectors ? Path::Scalar : !device.bulk_copy ? Path::Vector : Path::Ring;
  path = wanted == Path::Automatic ? best : wanted;
  return path <= best ? cudaSuccess : cudaErrorNotSupported;
}

}  // namespace

cudaError_t launch_aggregate_forward(const AggregateForward& p, cudaStream_t stream) {
  if (!valid(p) || p.sources > kMaxSources) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool vectors = has_vectors(p) && p.sources <= kForwardTable && aligned(p.y, p.ways);
  Path path;
  error = choose(p.path, vectors, device, path);
  if (error != cudaSuccess) return error;
  switch (p.dtype) {
    case DType::Float32:
      return path == Path::Scalar ? launch_forward_scalar<float>(p, device, stream)
                                  : forward_fast<float>(p, path, stream);
    case DType::BFloat16:
      return path == Path::Scalar ? launch_forward_scalar<__nv_bfloat16>(p, device, stream)
                                  : forward_fast<__nv_bfloat16>(p, path, stream);
    case DType::Float16:
      return path == Path::Scalar ? launch_forward_scalar<__half>(p, device, stream)
                                  : forward_fast<__half>(p, path, stream);
    case DType::Float64:
      return launch_forward_scalar<double>(p, device, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_aggregate_backward(const AggregateBackward& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool vectors = has_vectors(p) && p.ways <= 4 && aligned(p.dy, p.ways) &&
                       aligned(p.grad_in, p.sources) && aligned(p.grad_out, p.sources);
  Path path;
  error = choose(p.path, vectors, device, path);
  if (error != cudaSuccess) return error;
  switch (p.dtype) {
    case DType::Float32:
      return path == Path::Scalar ? launch_backward_scalar<float>(p, device, stream)
                                  : backward_fast<float>(p, path, stream);
    case DType::BFloat16:
      return path == Path::Scalar ? launch_backward_scalar<__nv_bfloat16>(p, device, stream)
                                  : backward_fast<__nv_bfloat16>(p, path, stream);
    case DType::Float16:
      return path == Path::Scalar ? launch_backward_scalar<__half>(p, device, stream)
                                  : backward_fast<__half>(p, path, stream);
    case DType::Float64:
      return launch_backward_scalar<double>(p, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace muddformer::kernels

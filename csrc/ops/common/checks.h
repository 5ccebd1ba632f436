// Helpers of the checks of operators' arguments. An error names the argument, what was expected and
// what came. Sizes may be symbolic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cmath>
#include <limits>
#include <optional>
#include <ostream>

namespace muddformer::detail {

// Name of an argument or of an entry of a list argument; formatted only when an error is raised.
struct ArgumentName {
  const char* name;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const ArgumentName& argument) {
  out << argument.name;
  if (argument.index >= 0) out << '[' << argument.index << ']';
  return out;
}

inline void check_defined(const at::Tensor& tensor, ArgumentName argument) {
  TORCH_CHECK_TYPE(tensor.defined(), argument, ": expected a tensor, got None");
}

inline bool is_floating(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

inline void check_floating(const at::Tensor& tensor, ArgumentName argument) {
  check_defined(tensor, argument);
  TORCH_CHECK_TYPE(is_floating(tensor.scalar_type()), argument,
                   ": expected dtype float64, float32, bfloat16 or float16, got ",
                   tensor.scalar_type());
}

inline void check_same_device(const at::Tensor& tensor, ArgumentName argument,
                              const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), argument, ": expected device ", like.device(),
                    " of ", like_name, ", got ", tensor.device());
}

inline void check_same_dtype_device(const at::Tensor& tensor, ArgumentName argument,
                                    const at::Tensor& like, const char* like_name) {
  check_defined(tensor, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), argument, ": expected dtype ",
                   like.scalar_type(), " of ", like_name, ", got ", tensor.scalar_type());
  check_same_device(tensor, argument, like, like_name);
}

// autograd itself has no clear word for an undefined input.
inline void check_all_defined(at::TensorList tensors, const char* name) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_defined(tensors[i], {name, static_cast<int64_t>(i)});
  }
}

// A tensor of the shape, dtype and device of `like`.
inline void check_like(const at::Tensor& tensor, ArgumentName argument, const at::Tensor& like,
                       const char* like_name) {
  check_same_dtype_device(tensor, argument, like, like_name);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == like.sym_sizes(), argument, ": expected shape ",
                    like.sym_sizes(), " of ", like_name, ", got ", tensor.sym_sizes());
}

// Kernels hold it as float32.
inline void check_eps(double eps, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, name, ": expected a finite number >= 0, got ",
                    eps);
  constexpr double kMost = std::numeric_limits<float>::max();
  TORCH_CHECK_VALUE(eps <= kMost, name, ": expected at most ", kMost, ", got ", eps);
}

// The largest number of a floating dtype.
inline double largest(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::numeric_limits<double>::max();
    case at::kHalf:
      return std::numeric_limits<c10::Half>::max();
    case at::kBFloat16:
      return std::numeric_limits<c10::BFloat16>::max();
    default:
      return std::numeric_limits<float>::max();
  }
}

// A bound of weights of this dtype, which are divided by it in float32 or float64.
inline void check_cap(std::optional<double> cap, at::ScalarType dtype) {
  if (!cap.has_value()) return;
  TORCH_CHECK_VALUE(std::isfinite(*cap) && *cap > 0,
                    "cap: expected a finite number > 0 or None, got ", *cap);
  TORCH_CHECK_VALUE(*cap <= largest(dtype), "cap: expected at most ", largest(dtype),
                    ", the largest ", dtype, ", got ", *cap);
  const double least =
      dtype == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  TORCH_CHECK_VALUE(*cap >= least, "cap: expected at least ", least, ", got ", *cap);
}

// float32 for everything but float64: the type that products and sums are accumulated in.
inline at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace muddformer::detail

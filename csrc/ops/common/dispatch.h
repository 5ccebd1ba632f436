// Between functions that take options objects and the dispatcher, which knows tensors, lists and
// numbers alone: a schema spells an options object out, argument by argument.
//
//   flat<kernel>                  the kernel as it is registered: m.impl("op", flat<op_cpu>)
//   Operator<decltype(f)>("op")   the operator of that name, to be called like f
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "generator.h"
#include "norms.h"

namespace muddformer::detail {

template <typename... T>
struct Types {
  static constexpr size_t count = sizeof...(T);
};

// How schemas spell an options object: arguments, and the way to them and back. Other parameters
// are spelled as they are.
template <typename Parameter>
struct Spelling {
  using Arguments = Types<Parameter>;
  static Parameter join(Parameter argument) { return std::forward<Parameter>(argument); }
  static std::tuple<Parameter> split(Parameter value) { return {std::forward<Parameter>(value)}; }
};

template <>
struct Spelling<const StreamNorms&> {
  using Arguments = Types<const OptionalTensors&, const OptionalTensors&, std::string_view, double,
                          bool, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&>;
  static StreamNorms join(const OptionalTensors& weights, const OptionalTensors& biases,
                          std::string_view kind, double eps, bool add_newest,
                          const std::optional<at::Tensor>& pre_weight,
                          const std::optional<at::Tensor>& post_weight) {
    return {std::string(kind), eps, weights, biases, add_newest, pre_weight, post_weight};
  }
  static auto split(const StreamNorms& n) {
    return std::tuple<const OptionalTensors&, const OptionalTensors&, std::string_view, double,
                      bool, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&>(
        n.weights, n.biases, n.kind, n.eps, n.add_newest, n.pre_weight, n.post_weight);
  }
};

template <>
struct Spelling<const GeneratorOptions&> {
  using Arguments =
      Types<const std::optional<at::Tensor>&, double, std::string_view, std::optional<double>>;
  static GeneratorOptions join(const std::optional<at::Tensor>& scale, double eps,
                               std::string_view gelu_approximate, std::optional<double> cap) {
    return {scale, eps, std::string(gelu_approximate), cap};
  }
  static auto split(const GeneratorOptions& o) {
    return std::tuple<const std::optional<at::Tensor>&, double, std::string_view,
                      std::optional<double>>(o.scale, o.eps, o.gelu_approximate, o.cap);
  }
};

template <typename... T>
struct Joined;
template <typename... A>
struct Joined<Types<A...>> {
  using Type = Types<A...>;
};
template <typename... A, typename... B, typename... Rest>
struct Joined<Types<A...>, Types<B...>, Rest...> : Joined<Types<A..., B...>, Rest...> {};

template <typename... Parameters>
using Spelled = typename Joined<Types<>, typename Spelling<Parameters>::Arguments...>::Type;

// A parameter made of the arguments from the one at `first`.
template <typename Parameter, size_t first, typename Arguments, size_t... i>
decltype(auto) join_at(Arguments& arguments, std::index_sequence<i...>) {
  return Spelling<Parameter>::join(
      std::forward<std::tuple_element_t<first + i, Arguments>>(std::get<first + i>(arguments))...);
}

// For each parameter the number of arguments before its own.
template <typename... Parameters>
constexpr std::array<size_t, sizeof...(Parameters)> first_arguments() {
  std::array<size_t, sizeof...(Parameters)> first{Spelling<Parameters>::Arguments::count...};
  size_t sum = 0;
  for (size_t& entry : first) sum += std::exchange(entry, sum);
  return first;
}

template <auto kernel, typename... Parameters, typename Arguments, size_t... i>
auto call_joined(Types<Parameters...>, Arguments& arguments, std::index_sequence<i...>) {
  constexpr auto first = first_arguments<Parameters...>();
  return kernel(join_at<Parameters, first[i]>(
      arguments, std::make_index_sequence<Spelling<Parameters>::Arguments::count>{})...);
}

template <auto kernel, typename Function, typename Arguments>
struct Flat;
template <auto kernel, typename Result, typename... Parameters, typename... Arguments>
struct Flat<kernel, Result (*)(Parameters...), Types<Arguments...>> {
  static Result call(Arguments... arguments) {
    std::tuple<Arguments...> all(std::forward<Arguments>(arguments)...);
    return call_joined<kernel>(Types<Parameters...>{}, all,
                               std::index_sequence_for<Parameters...>{});
  }
};

template <typename Result, typename... Parameters>
Spelled<Parameters...> spelled_of(Result (*)(Parameters...));

// The kernel with every options object among its parameters spelled out.
template <auto kernel>
inline constexpr auto flat = Flat<kernel, decltype(kernel), decltype(spelled_of(kernel))>::call;

// Appended, since GCC 12 takes a sum of the two for an overflow where <string> comes from a
// precompiled header.
inline std::string qualified(const char* name) {
  return std::string("muddformer::").append(name);
}

template <typename Function>
class Operator;
template <typename Result, typename... Parameters>
class Operator<Result(Parameters...)> {
 public:
  explicit Operator(const char* name, const char* overload = "")
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(qualified(name).c_str(), overload)
                    .typed<typename FunctionOf<Spelled<Parameters...>>::Type>()) {}

  Result operator()(Parameters... parameters) const {
    return std::apply(
        [this](auto&&... arguments) {
          return handle_.call(std::forward<decltype(arguments)>(arguments)...);
        },
        std::tuple_cat(Spelling<Parameters>::split(std::forward<Parameters>(parameters))...));
  }

 private:
  template <typename Arguments>
  struct FunctionOf;
  template <typename... Arguments>
  struct FunctionOf<Types<Arguments...>> {
    using Type = Result(Arguments...);
  };

  c10::TypedOperatorHandle<typename FunctionOf<Spelled<Parameters...>>::Type> handle_;
};

}  // namespace muddformer::detail

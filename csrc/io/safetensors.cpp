#include "safetensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/from_file.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <tuple>
#include <utility>

#include "files.h"

namespace muddformer {

namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kLargestHeader = 100'000'000;  // as the format's own library has it
constexpr const char* kMetadata = "__metadata__";

struct DtypeName {
  at::ScalarType dtype;
  const char* name;
};

// In the order in which the format's own library sorts tensors: the most aligned first.
constexpr std::array kDtypes = {
    DtypeName{at::kUInt64, "U64"},
    DtypeName{at::kLong, "I64"},
    DtypeName{at::kDouble, "F64"},
    DtypeName{at::kComplexFloat, "C64"},
    DtypeName{at::kFloat, "F32"},
    DtypeName{at::kUInt32, "U32"},
    DtypeName{at::kInt, "I32"},
    DtypeName{at::kBFloat16, "BF16"},
    DtypeName{at::kHalf, "F16"},
    DtypeName{at::kUInt16, "U16"},
    DtypeName{at::kShort, "I16"},
    DtypeName{at::kFloat8_e5m2fnuz, "F8_E5M2FNUZ"},
    DtypeName{at::kFloat8_e4m3fnuz, "F8_E4M3FNUZ"},
    DtypeName{at::kFloat8_e8m0fnu, "F8_E8M0"},
    DtypeName{at::kFloat8_e4m3fn, "F8_E4M3"},
    DtypeName{at::kFloat8_e5m2, "F8_E5M2"},
    DtypeName{at::kChar, "I8"},
    DtypeName{at::kByte, "U8"},
    DtypeName{at::kBool, "BOOL"},
};

// One entry of the header, its offsets counted from the first value; `where` begins every message.
SafetensorsEntry parse_entry(const json& value, const std::string& where) {
  TORCH_CHECK_VALUE(value.is_object() && value.contains("dtype") && value.contains("shape") &&
                        value.contains("data_offsets"),
                    where, "expected an object of dtype, shape and data_offsets");
  const json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];

  const auto* known = std::ranges::find_if(
      kDtypes, [&](const DtypeName& each) { return dtype.is_string() && dtype == each.name; });
  TORCH_CHECK_VALUE(known != kDtypes.end(), where, "unknown dtype ", shown(dtype));
  SafetensorsEntry entry{known->dtype, {}, 0, 0};

  // Counts the bytes as if no size were zero: strides are products of the other sizes.
  const auto largest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  uint64_t bytes = c10::elementSize(entry.dtype);
  bool empty = false;
  TORCH_CHECK_VALUE(shape.is_array(), where, "shape is no list");
  for (const json& size : shape) {
    TORCH_CHECK_VALUE(size.is_number_unsigned(), where, "shape has the size ", shown(size));
    const uint64_t count = size.get<uint64_t>();
    TORCH_CHECK_VALUE(count <= largest / bytes, where, "shape is too large");
    empty = empty || count == 0;
    bytes *= std::max<uint64_t>(count, 1);
    entry.shape.push_back(static_cast<int64_t>(count));
  }
  if (empty) bytes = 0;

  TORCH_CHECK_VALUE(offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                        offsets[1].is_number_unsigned(),
                    where, "data_offsets are not two positions");
  const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
  TORCH_CHECK_VALUE(begin <= end && end <= largest, where, "data_offsets [", begin, ", ", end,
                    "] are no range");
  TORCH_CHECK_VALUE(end - begin == bytes, where, "data_offsets hold ", end - begin,
                    " bytes, but dtype and shape take ", bytes);
  entry.begin = static_cast<int64_t>(begin);
  entry.end = static_cast<int64_t>(end);
  return entry;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  const std::string where = path.string() + ": not a complete safetensors file: ";
  const uint64_t size = size_of_file(path);
  TORCH_CHECK_VALUE(size > kLengthBytes, where, "it has ", size, " bytes");
  try {
    bytes_ = at::from_file(path.string(), /*shared=*/false, static_cast<int64_t>(size), at::kByte);
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(ValueError,
                    path.string() + ": cannot be read: " + error.what_without_backtrace());
  }
  const char* data = static_cast<const char*>(bytes_.const_data_ptr());

  uint64_t length = 0;
  std::memcpy(&length, data, kLengthBytes);
  TORCH_CHECK_VALUE(length <= kLargestHeader, where, "its header claims ", length,
                    " bytes, at most ", kLargestHeader, " are read");
  TORCH_CHECK_VALUE(length <= size - kLengthBytes, where, "its header claims ", length,
                    " bytes, the file has ", size);
  TORCH_CHECK_VALUE(data[kLengthBytes] == '{', where, "its header does not begin with {");
  const json header = parse_json({data + kLengthBytes, length}, path.string());

  const auto first = static_cast<int64_t>(kLengthBytes + length);
  std::vector<std::tuple<int64_t, int64_t, std::string>> ranges;
  for (const auto& [name, value] : header.items()) {
    if (name == kMetadata) {
      if (value.is_null()) continue;
      TORCH_CHECK_VALUE(value.is_object(), where, kMetadata, " is no object");
      for (const auto& [key, text] : value.items()) {
        TORCH_CHECK_VALUE(text.is_string(), where, kMetadata, " has no text for ", shown_name(key));
        metadata_[key] = text.get<std::string>();
      }
      continue;
    }
    SafetensorsEntry entry = parse_entry(value, where + shown_name(name) + ": ");
    TORCH_CHECK_VALUE(entry.end <= static_cast<int64_t>(size) - first, where, shown_name(name),
                      ": its values end at byte ", entry.end, ", the file has ",
                      static_cast<int64_t>(size) - first, " of them");
    entry.begin += first;
    entry.end += first;
    ranges.emplace_back(entry.begin, entry.end, name);
    entries_[name] = std::move(entry);
  }

  std::ranges::sort(ranges);
  int64_t next = first;
  for (const auto& [begin, end, name] : ranges) {
    TORCH_CHECK_VALUE(begin == next, where, shown_name(name), ": its values begin at byte ",
                      begin - first, ", those before it end at ", next - first);
    next = end;
  }
  TORCH_CHECK_VALUE(next == static_cast<int64_t>(size), where, "no tensor has the last ",
                    static_cast<int64_t>(size) - next, " bytes");
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto found = entries_.find(name);
  TORCH_CHECK_VALUE(found != entries_.end(), path_.string(), ": no tensor ", shown_name(name));
  const SafetensorsEntry& entry = found->second;
  const auto* data = static_cast<const uint8_t*>(bytes_.const_data_ptr()) + entry.begin;
  if (entry.dtype == at::kBool) {
    const bool valid =
        std::all_of(data, data + (entry.end - entry.begin), [](uint8_t byte) { return byte <= 1; });
    TORCH_CHECK_VALUE(valid, path_.string(), ": ", shown_name(name),
                      " has a bool that is neither 0 nor 1");
  }
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(entry.dtype) != 0) {
    at::Tensor copy = at::empty(entry.shape, entry.dtype);
    if (copy.nbytes() > 0) std::memcpy(copy.mutable_data_ptr(), data, copy.nbytes());
    return copy;
  }
  // The mapping is private, so what the tensor's owner writes stays with this process.
  return at::from_blob(
      const_cast<uint8_t*>(data), entry.shape, [bytes = bytes_](void*) {},
      at::TensorOptions(entry.dtype).device(at::kCPU));
}

std::map<std::string, at::Tensor> load_safetensors(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, entry] : file.entries()) tensors[name] = file.tensor(name);
  return tensors;
}

void save_safetensors(const std::map<std::string, at::Tensor>& tensors,
                      const std::filesystem::path& path,
                      const std::map<std::string, std::string>& metadata) {
  using Place = std::tuple<size_t, std::string, at::Tensor>;  // number of the dtype, name, values
  std::vector<Place> order;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_TYPE(tensor.defined(), name, ": expected a tensor, got None");
    TORCH_CHECK_VALUE(name != kMetadata, name, ": a name that the format keeps for itself");
    TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && !tensor.is_meta(), name,
                      ": expected a dense tensor with values, got layout ", tensor.layout(), " on ",
                      tensor.device());
    const auto* known = std::ranges::find(kDtypes, tensor.scalar_type(), &DtypeName::dtype);
    TORCH_CHECK_TYPE(known != kDtypes.end(), name, ": no safetensors dtype for ",
                     tensor.scalar_type());
    order.emplace_back(known - kDtypes.begin(), name,
                       tensor.detach().cpu().resolve_conj().resolve_neg().contiguous());
  }
  std::ranges::sort(order, [](const Place& left, const Place& right) {
    return std::tie(std::get<0>(left), std::get<1>(left)) <
           std::tie(std::get<0>(right), std::get<1>(right));
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  uint64_t begin = 0;
  for (const auto& [dtype, name, tensor] : order) {
    const uint64_t end = begin + tensor.nbytes();
    header[name] = {{"dtype", kDtypes[dtype].name},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception& error) {
    TORCH_CHECK_VALUE(false, path.string(), ": a name or text is not UTF-8: ", error.what());
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the values are aligned
  const uint64_t length = text.size();
  TORCH_CHECK_VALUE(length <= kLargestHeader, path.string(), ": the header would have ", length,
                    " bytes, at most ", kLargestHeader, " can be read");

  std::vector<std::string_view> parts = {{reinterpret_cast<const char*>(&length), sizeof(length)},
                                         text};
  for (const Place& place : order) {
    const at::Tensor& tensor = std::get<2>(place);
    parts.emplace_back(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
  }
  write_file(path, parts);
}

}  // namespace muddformer

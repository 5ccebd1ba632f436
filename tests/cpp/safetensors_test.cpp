#include <gtest/gtest.h>
#include <muddformer/io/safetensors.h>
#include <torch/types.h>

#include <chrono>
#include <cstring>
#include <map>

#include "files.h"

namespace muddformer {
namespace {

using at::Tensor;
using testing_files::damaged;
using testing_files::error_of;
using testing_files::Folder;
using testing_files::read_bytes;
using testing_files::write_bytes;
using Tensors = std::map<std::string, Tensor>;

bool same_bytes(const void* left, const void* right, size_t count) {
  return count == 0 || std::memcmp(left, right, count) == 0;
}

bool same_bytes(const Tensor& left, const Tensor& right) {
  return left.scalar_type() == right.scalar_type() && left.sizes() == right.sizes() &&
         same_bytes(left.contiguous().const_data_ptr(), right.contiguous().const_data_ptr(),
                    left.nbytes());
}

std::string with_length(const std::string& header) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + header;
}

Tensors small() {
  return {{"weight", torch::arange(6, at::kFloat).reshape({2, 3})},
          {"bias", torch::arange(3, at::kBFloat16)},
          {"flags", torch::tensor({true, false})}};
}

TEST(Safetensors, EveryDtypeAndShapeComesBackBitForBit) {
  const Folder folder;
  torch::manual_seed(0);
  for (const at::ScalarType dtype :
       {at::kByte, at::kChar, at::kUInt16, at::kShort, at::kUInt32, at::kInt, at::kUInt64,
        at::kLong, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble, at::kComplexFloat,
        at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz,
        at::kFloat8_e8m0fnu}) {
    const Tensor bytes = torch::randint(256, {5 * 8 * 24}, at::kByte);
    Tensors tensors = {{"values", bytes.view(dtype)},
                       {"none", torch::empty({0, 3}, dtype)},
                       {"rows", bytes.view(dtype).view({5, -1}).slice(0, 0, 5, 2)},
                       {"turned", bytes.view(dtype).view({8, -1}).t()},
                       {"one", bytes.view(dtype)[3]}};
    save_safetensors(tensors, folder / "file");
    const Tensors read = load_safetensors(folder / "file");
    ASSERT_EQ(read.size(), tensors.size());
    for (const auto& [name, tensor] : tensors) {
      EXPECT_TRUE(same_bytes(read.at(name), tensor)) << name << ' ' << dtype;
    }
  }
  const Tensor flags = torch::tensor({true, false, true});
  const Tensor conjugate = torch::randn({4}, at::kComplexFloat).conj();
  save_safetensors({{"flags", flags}, {"conjugate", conjugate}}, folder / "file");
  EXPECT_TRUE(same_bytes(load_safetensors(folder / "file").at("flags"), flags));
  EXPECT_TRUE(torch::equal(load_safetensors(folder / "file").at("conjugate"), conjugate));
}

TEST(Safetensors, WritesTheBytesOfTheFormatsOwnLibrary) {
  const Folder folder;
  save_safetensors({{"b", torch::zeros({0, 3})},
                    {"a", torch::ones({1})},
                    {"s", torch::ones({}, at::kShort)},
                    {"d", torch::zeros({1}, at::kDouble)},
                    {"\xc3\xa9\n\"\x7f", torch::ones({1}, at::kByte)}},
                   folder / "file");
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"d":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
      R"("a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},)"
      R"("b":{"dtype":"F32","shape":[0,3],"data_offsets":[12,12]},)"
      R"("s":{"dtype":"I16","shape":[],"data_offsets":[12,14]},)"
      "\"\xc3\xa9\\n\\\"\x7f\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[14,15]}}";
  const std::string padding((8 - header.size() % 8) % 8, ' ');
  const std::string values("\0\0\0\0\0\0\0\0\0\0\x80\x3f\1\0\1", 15);
  EXPECT_EQ(read_bytes(folder / "file"), with_length(header + padding) + values);
  save_safetensors({}, folder / "file", {});
  EXPECT_EQ(read_bytes(folder / "file"), with_length("{}      "));
}

TEST(Safetensors, MetadataAndEntries) {
  const Folder folder;
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"config", "{\"a\": 1}"}};
  save_safetensors(small(), folder / "file", metadata);
  const SafetensorsFile file(folder / "file");
  EXPECT_EQ(file.metadata(), metadata);
  EXPECT_EQ(file.entries().size(), 3u);
  EXPECT_EQ(file.entries().at("weight").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(file.entries().at("bias").dtype, at::kBFloat16);
  EXPECT_NE(error_of([&] { file.tensor("other"); }).find("no tensor other"), std::string::npos);
}

TEST(Safetensors, TensorsOutliveTheFile) {
  const Folder folder;
  save_safetensors(small(), folder / "file");
  Tensor weight = SafetensorsFile(folder / "file").tensor("weight");
  std::filesystem::remove(folder / "file");
  EXPECT_TRUE(torch::equal(weight, small().at("weight")));
  weight.add_(1);
  EXPECT_TRUE(torch::equal(weight, small().at("weight") + 1));
}

TEST(Safetensors, WritingToATensorLeavesTheFile) {
  const Folder folder;
  save_safetensors(small(), folder / "file");
  const std::string before = read_bytes(folder / "file");
  load_safetensors(folder / "file").at("weight").zero_();
  EXPECT_EQ(read_bytes(folder / "file"), before);
  // A file can be written anew from the tensors that are read from it.
  save_safetensors(load_safetensors(folder / "file"), folder / "file");
  EXPECT_EQ(read_bytes(folder / "file"), before);
}

TEST(Safetensors, ValuesThatAreNotAlignedAreRead) {
  const Folder folder;
  const std::string values("\0\0\x80\x3f", 4);
  for (const char* padding : {"", " ", "  ", "   "}) {
    const std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                               R"("none":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})" +
                               std::string(padding);
    write_bytes(folder / "file", with_length(header) + values);
    EXPECT_EQ(load_safetensors(folder / "file").at("a").item<float>(), 1);
  }
}

TEST(Safetensors, AFailedWriteLeavesTheOldFile) {
  const Folder folder;
  save_safetensors(small(), folder / "file");
  const std::string before = read_bytes(folder / "file");
  const auto save = [&](Tensor tensor, const char* name = "x") {
    return error_of([&] { save_safetensors({{name, tensor}}, folder / "file"); });
  };
  EXPECT_NE(save(torch::empty({2}, at::kMeta)).find("x: expected a dense"), std::string::npos);
  EXPECT_NE(save(torch::eye(2).to_sparse()).find("x: expected a dense"), std::string::npos);
  EXPECT_NE(save(Tensor()).find("x: expected a tensor"), std::string::npos);
  EXPECT_NE(save(torch::zeros({1}, at::kComplexDouble)).find("x: no safetensors dtype"),
            std::string::npos);
  EXPECT_NE(save(torch::zeros({1}), "__metadata__").find("keeps for itself"), std::string::npos);
  EXPECT_NE(save(torch::zeros({1}), "\xff").find("not UTF-8"), std::string::npos);
  EXPECT_EQ(read_bytes(folder / "file"), before);

  std::filesystem::create_directories(folder / "taken" / "inside");
  EXPECT_NE(
      error_of([&] { save_safetensors(small(), folder / "taken"); }).find("cannot be written"),
      std::string::npos);
  EXPECT_NE(error_of([&] {
              save_safetensors(small(), folder / "no" / "file");
            }).find("cannot be written: No such file"),
            std::string::npos);
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    ++files;
  }
  EXPECT_EQ(files, 2u);  // no temporary file is left
}

struct Broken {
  std::string header;
  size_t values;
  const char* message;
};

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

TEST(Safetensors, BrokenFilesAreRefused) {
  const Folder folder;
  const auto pair = [](const char* first, const char* second) {
    return std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)") + first +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + second + "}}";
  };
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  const std::vector<Broken> cases = {
      {"[]", 0, "does not begin with {"},
      {" {}", 0, "does not begin with {"},
      {"\xef\xbb\xbf{}", 0, "does not begin with {"},
      {"{", 0, "not valid JSON"},
      {"{}x", 0, "not valid JSON"},
      {std::string("{}\0", 3), 0, "not valid JSON"},
      {std::string("{}\0{}", 5), 0, "not valid JSON"},
      {"{\"\xff\":1}", 0, "not valid JSON"},
      {"{\"\\ud800\":1}", 0, "not valid JSON"},
      {"{\"a\":1e999}", 0, "not valid JSON"},
      {"{\"a\":" + deep + "}", 0, "nested more than 16 levels"},
      {"{\"a\":{\"b\":{\"c\":{}}}}", 0, "a: expected an object"},
      {"{\"a\":3}", 0, "a: expected an object"},
      {"{\"a\":null}", 0, "a: expected an object"},
      {"{\"a\":{}}", 0, "a: expected an object"},
      {R"({"a":{"dtype":"U8","shape":[0]}})", 0, "a: expected an object"},
      {"{\"__metadata__\":3}", 0, "__metadata__ is no object"},
      {"{\"__metadata__\":{\"a\":3}}", 0, "__metadata__ has no text for a"},
      {"{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0, "key 'a' twice"},
      {R"({"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}})", 0, "twice"},
      {R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
       R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
       0, "key 'a' twice"},
      {entry("\"F99\"", "[1]", "[0,4]"), 4, "a: unknown dtype 'F99'"},
      {entry("\"f32\"", "[1]", "[0,4]"), 4, "a: unknown dtype 'f32'"},
      {entry("3", "[1]", "[0,4]"), 4, "a: unknown dtype 3"},
      {entry("\"F32\"", "1", "[0,4]"), 4, "a: shape is no list"},
      {entry("\"F32\"", "[-1]", "[0,4]"), 4, "a: shape has the size -1"},
      {entry("\"F32\"", "[1.0]", "[0,4]"), 4, "a: shape has the size 1.0"},
      {entry("\"F32\"", "[\"1\"]", "[0,4]"), 4, "a: shape has the size"},
      {entry("\"F32\"", "[[1]]", "[0,4]"), 4, "a: shape has the size [1]"},
      {entry("\"F32\"", "[4294967296,4294967296]", "[0,4]"), 4, "a: shape is too large"},
      {entry("\"F32\"", "[9223372036854775807]", "[0,4]"), 4, "a: shape is too large"},
      {entry("\"F32\"", "[18446744073709551615]", "[0,4]"), 4, "a: shape is too large"},
      {entry("\"F32\"", "[18446744073709551616]", "[0,4]"), 4, "a: shape has the size"},
      {entry("\"U8\"", "[0,9223372036854775807,2]", "[0,0]"), 0, "a: shape is too large"},
      {entry("\"F32\"", "[1]", "[0]"), 4, "a: data_offsets are not two positions"},
      {entry("\"F32\"", "[1]", "[0,4,8]"), 4, "a: data_offsets are not two positions"},
      {entry("\"F32\"", "[1]", "[-4,0]"), 4, "a: data_offsets are not two positions"},
      {entry("\"F32\"", "[1]", "[4,0]"), 4, "a: data_offsets [4, 0] are no range"},
      {entry("\"F32\"", "[1]", "[0,18446744073709551615]"), 4, "are no range"},
      {entry("\"F32\"", "[1]", "[0,3]"), 4, "hold 3 bytes, but dtype and shape take 4"},
      {entry("\"F32\"", "[2]", "[0,8]"), 4, "a: its values end at byte 8, the file has 4"},
      {entry("\"F32\"", "[1]", "[9223372036854775800,9223372036854775804]"), 4, "values end at"},
      {entry("\"F32\"", "[1]", "[1,5]"), 5, "a: its values begin at byte 1"},
      {entry("\"F32\"", "[1]", "[0,4]"), 5, "no tensor has the last 1 bytes"},
      {"{}", 1, "no tensor has the last 1 bytes"},
      {pair("[0,4]", "[0,4]"), 4, "b: its values begin at byte 0, those before it end at 4"},
      {pair("[0,4]", "[2,6]"), 6, "b: its values begin at byte 2, those before it end at 4"},
      {pair("[0,4]", "[5,9]"), 9, "b: its values begin at byte 5, those before it end at 4"},
  };
  for (const Broken& each : cases) {
    write_bytes(folder / "file", with_length(each.header) + std::string(each.values, '\0'));
    const std::string message = error_of([&] { load_safetensors(folder / "file"); });
    EXPECT_NE(message.find(each.message), std::string::npos)
        << each.header.substr(0, 100) << "\n  gave " << message;
    EXPECT_NE(message.find((folder / "file").string()), std::string::npos) << message;
  }
  const auto refused = [&](const std::string& bytes) {
    write_bytes(folder / "file", bytes);
    return error_of([&] { load_safetensors(folder / "file"); });
  };
  EXPECT_NE(refused("").find("it has 0 bytes"), std::string::npos);
  EXPECT_NE(refused(std::string(8, '\0')).find("it has 8 bytes"), std::string::npos);
  EXPECT_NE(refused(std::string(8, '\xff') + "{}").find("header claims"), std::string::npos);
  EXPECT_NE(refused(std::string("\3\0\0\0\0\0\0\0{}", 10)).find("header claims 3 bytes"),
            std::string::npos);
  EXPECT_NE(refused(with_length(entry("\"BOOL\"", "[2]", "[0,2]")) + "\1\2").find("a has a bool"),
            std::string::npos);
  for (const char* path : {"", ".", "nowhere"}) {
    EXPECT_NE(error_of([&] { load_safetensors(folder / path); }).find("no such file"),
              std::string::npos);
  }
}

TEST(Safetensors, ManyNamesTakeLinearTime) {
  const Folder folder;
  std::string header = "{";
  for (int i = 0; i < 200'000; ++i) {
    header += "\"layers." + std::to_string(i) +
              "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},";
  }
  header.back() = '}';
  write_bytes(folder / "file", with_length(header));
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(SafetensorsFile(folder / "file").entries().size(), 200'000u);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));  // squared: 150
}

TEST(Safetensors, MessagesAreBounded) {
  const Folder folder;
  const std::string name(1'000'000, 'x');
  for (const std::string& header :
       {"{\"" + name + "\":3}", "{\"" + name + "\":3,\"" + name + "\":3}",
        "{\"__metadata__\":{\"" + name + "\":3}}", "{\"" + name + "}",
        entry("\"" + name + "\"", "[1]", "[0,4]"), entry("\"F32\"", "[\"" + name + "\"]", "[0,4]"),
        "{\"" + name + "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}"}) {
    write_bytes(folder / "file", with_length(header));
    const std::string message = error_of([&] { load_safetensors(folder / "file"); });
    EXPECT_LT(message.size(), 1000u) << message.substr(0, 300);
    EXPECT_NE(message, "no error");
  }
}

// Whatever is read must be what the file's bytes say.
void read_all(const std::filesystem::path& path) {
  const std::string bytes = read_bytes(path);
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  const SafetensorsFile file(path);
  size_t total = 8 + length;
  for (const auto& [name, entry] : file.entries()) {
    const Tensor tensor = file.tensor(name);
    ASSERT_EQ(tensor.sizes(), at::IntArrayRef(entry.shape));
    ASSERT_EQ(tensor.scalar_type(), entry.dtype);
    ASSERT_TRUE(same_bytes(tensor.const_data_ptr(), bytes.data() + entry.begin, tensor.nbytes()));
    total += tensor.nbytes();
  }
  ASSERT_EQ(total, bytes.size());
}

TEST(Safetensors, AnyDamageIsHarmless) {
  const Folder folder;
  save_safetensors(small(), folder / "whole");
  const std::string whole = read_bytes(folder / "whole");
  size_t refused = 0, read = 0;
  for (const std::string& bytes : damaged(whole, whole.size())) {
    write_bytes(folder / "file", bytes);
    const std::string message = error_of([&] { read_all(folder / "file"); });
    if (message == "no error") {
      ++read;
    } else {
      ++refused;
      ASSERT_NE(message.find((folder / "file").string()), std::string::npos) << message;
    }
  }
  RecordProperty("refused", static_cast<int>(refused));
  RecordProperty("read", static_cast<int>(read));
  EXPECT_GT(refused, 5000u);
  EXPECT_GT(read, 500u);  // values, names, spaces and metadata may be anything
}

}  // namespace
}  // namespace muddformer

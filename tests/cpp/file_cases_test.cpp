// Files that Python and C++ take alike, of tests/file_cases.json: which are read, and which refused.
#include <gtest/gtest.h>
#include <muddformer/io/safetensors.h>
#include <muddformer/io/tokenizer.h>
#include <muddformer/models/checkpoint.h>

#include <cstdint>
#include <nlohmann/json.hpp>

#include "files.h"

namespace muddformer {
namespace {

using testing_files::error_of;
using testing_files::Folder;
using testing_files::read_bytes;
using testing_files::write_bytes;

void read_header(const Folder& folder, const std::string& text) {
  const uint64_t length = text.size();
  const std::string bytes(reinterpret_cast<const char*>(&length), sizeof(length));
  write_bytes(folder / "file", bytes + text + std::string(8, '\0'));
  SafetensorsFile(folder / "file");
}

void read_config(const Folder& folder, const std::string& text) {
  write_bytes(folder / "config.json", text);
  load_config(folder.path());
}

void read_tokenizer(const Folder& folder, const std::string& text) {
  write_bytes(folder / "tokenizer.json", text);
  TokenDecoder(folder / "tokenizer.json");
}

TEST(FileCases, AreReadOrRefused) {
  const Folder folder;
  const auto cases = nlohmann::json::parse(read_bytes(MUDDFORMER_TEST_DATA "/../file_cases.json"));
  using Read = void (*)(const Folder&, const std::string&);
  for (const auto& [kind, read] : {std::pair<const char*, Read>{"header", read_header},
                                   {"config", read_config},
                                   {"tokenizer", read_tokenizer}}) {
    ASSERT_GT(cases.at(kind).size(), 10u);
    for (const auto& each : cases.at(kind)) {
      const std::string message = error_of([&] { read(folder, each.at("text")); });
      EXPECT_EQ(message == "no error", each.at("read").get<bool>())
          << kind << ": " << each.at("case") << ": " << message;
      EXPECT_LT(message.size(), 1000u);
    }
  }
}

}  // namespace
}  // namespace muddformer

// Files of the tests: a folder for each test, bytes in and out, damage, messages of errors.
#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace muddformer::testing_files {

/// An empty folder for the running test, removed in the end.
class Folder {
 public:
  Folder() {
    const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::path(testing::TempDir()) /
            (std::string("muddformer-") + test->test_suite_name() + "-" + test->name());
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_bytes(const std::filesystem::path& path, std::string_view bytes) {
  // Some file systems wait for the disk when a file is cut to nothing.
  std::filesystem::remove(path);
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// The message of the c10::Error that a call ends with; any other exception fails the test.
inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

/// A call must end with a c10::Error whose message has `text`.
inline void expect_error(const std::function<void()>& call, const std::string& text) {
  const std::string error = error_of(call);
  EXPECT_NE(error.find(text), std::string::npos) << error;
}

/// Copies of `bytes` with one fault each: cut at every place, every bit of the first `text` bytes
/// flipped, and a byte removed, doubled or replaced by something that JSON gives a meaning.
inline std::vector<std::string> damaged(const std::string& bytes, size_t text) {
  std::vector<std::string> copies;
  for (size_t place = 0; place < bytes.size(); ++place) copies.push_back(bytes.substr(0, place));
  for (size_t place = 0; place < text; ++place) {
    for (int bit = 0; bit < 8; ++bit) {
      copies.push_back(bytes);
      copies.back()[place] = static_cast<char>(copies.back()[place] ^ (1 << bit));
    }
    copies.push_back(bytes);
    copies.back().erase(place, 1);
    copies.push_back(bytes);
    copies.back().insert(place, 1, bytes[place]);
    for (const char symbol : std::string_view("{}[]\",:-0 \\\n\0\xff", 14)) {
      copies.push_back(bytes);
      copies.back()[place] = symbol;
    }
  }
  return copies;
}

}  // namespace muddformer::testing_files

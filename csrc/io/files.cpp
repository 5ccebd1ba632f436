#include "files.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <string>
#include <system_error>
#include <unordered_set>
#include <vector>

namespace muddformer {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr size_t kDeepest = 16;

// What the parser tells of a text, checked and not kept: json::parse has a callback for this too,
// which makes it go through all members of an object at the end of each of them.
class Checker : public json::json_sax_t {
 public:
  explicit Checker(const std::string& name) : name_(name) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open(); }
  bool end_array() override { return close(); }
  bool key(string_t& value) override {
    TORCH_CHECK_VALUE(keys_.back().insert(value).second, name_, ": JSON has the key ",
                      shown(json(value)), " twice in one object");
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& error) override {
    C10_THROW_ERROR(ValueError,
                    c10::str(name_, ": not valid JSON: ", shown_name(error.what(), 300)));
  }

 private:
  bool open() {
    TORCH_CHECK_VALUE(keys_.size() < kDeepest, name_, ": JSON is nested more than ", kDeepest,
                      " levels deep");
    keys_.emplace_back();
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  const std::string& name_;
  std::vector<std::unordered_set<std::string>> keys_;  // of the objects and arrays that are open
};

}  // namespace

std::string shown(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (value.is_string()) text.front() = text.back() = '\'';
  return shown_name(text);
}

std::string shown_name(const std::string& name, size_t limit) {
  if (name.size() <= limit) return name;
  while (limit > 0 && (static_cast<unsigned char>(name[limit]) & 0xc0) == 0x80) --limit;  // UTF-8
  return name.substr(0, limit) + "...";
}

nlohmann::json parse_json(std::string_view text, const std::string& name) {
  // The library takes a zero byte for the end of the text, and passes over a byte order mark.
  TORCH_CHECK_VALUE(text.find('\0') == text.npos, name, ": not valid JSON: a zero byte");
  TORCH_CHECK_VALUE(!text.starts_with("\xef\xbb\xbf"), name, ": not valid JSON: a byte order mark");
  Checker checker(name);
  json::sax_parse(text, &checker);
  json values = json::parse(text);
  TORCH_CHECK_VALUE(values.is_object(), name, ": must hold a JSON object, got ",
                    values.type_name());
  return values;
}

bool is_file(const fs::path& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

uint64_t size_of_file(const fs::path& path) {
  struct stat status{};
  TORCH_CHECK_VALUE(::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode), path.string(),
                    ": no such file");
  return static_cast<uint64_t>(status.st_size);
}

void make_directories(const fs::path& path) {
  fs::path made;
  for (const fs::path& part : path) {
    made /= part;
    const bool there = ::mkdir(made.c_str(), 0777) == 0 || errno == EEXIST || errno == EISDIR;
    TORCH_CHECK(there, made.string(), ": cannot be made: ", std::generic_category().message(errno));
  }
}

std::string read_file(const fs::path& path, uint64_t limit) {
  const uint64_t size = size_of_file(path);
  TORCH_CHECK_VALUE(size <= limit, path.string(), ": ", size, " bytes are too many, at most ",
                    limit, " are read");
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  file.read(text.data(), static_cast<std::streamsize>(size));
  TORCH_CHECK_VALUE(file, path.string(), ": cannot be read");
  return text;
}

nlohmann::json read_json(const fs::path& path, uint64_t limit) {
  return parse_json(read_file(path, limit), path.string());
}

namespace {

// A file descriptor that is closed in the end.
struct Descriptor {
  Descriptor(const fs::path& path, int flags) : value(::open(path.c_str(), flags, 0666)) {}
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  const int value;
};

void check_written(bool done, const fs::path& path) {
  TORCH_CHECK(done, path.string(), ": cannot be written: ", std::generic_category().message(errno));
}

void write_all(const Descriptor& file, std::string_view part, const fs::path& path) {
  while (!part.empty()) {
    const ssize_t count = ::write(file.value, part.data(), part.size());
    check_written(count >= 0 || errno == EINTR, path);
    part.remove_prefix(std::max<ssize_t>(count, 0));
  }
}

}  // namespace

void write_file(const fs::path& path, std::span<const std::string_view> parts) {
  static std::atomic<unsigned> number = 0;  // threads may write at the same time
  const fs::path folder = path.has_parent_path() ? path.parent_path() : ".";
  const fs::path scratch =
      folder / c10::str(".", path.filename().string(), ".", ::getpid(), ".", number++, ".tmp");
  try {
    const Descriptor file(scratch, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC);
    check_written(file.value >= 0, path);
    for (const std::string_view part : parts) write_all(file, part, path);
    check_written(::fsync(file.value) == 0, path);
    check_written(::rename(scratch.c_str(), path.c_str()) == 0, path);
  } catch (...) {
    ::unlink(scratch.c_str());
    throw;
  }
  const Descriptor directory(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  // Some file systems cannot do this for a folder; the file is in its place all the same.
  if (directory.value >= 0) (void)::fsync(directory.value);
}

}  // namespace muddformer

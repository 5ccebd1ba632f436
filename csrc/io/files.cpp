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
#include <set>
#include <string>
#include <system_error>
#include <vector>

namespace muddformer {

namespace fs = std::filesystem;
using nlohmann::json;

nlohmann::json parse_json(std::string_view text, const std::string& name, int depth) {
  // The library takes a zero byte for the end of the text.
  TORCH_CHECK_VALUE(text.find('\0') == text.npos, name, ": not valid JSON: a zero byte");
  std::vector<std::set<std::string>> keys(depth + 1);  // of the open object of every level
  const auto check = [&](int level, json::parse_event_t event, json& value) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        TORCH_CHECK_VALUE(level < depth, name, ": JSON is nested more than ", depth,
                          " levels deep");
        keys[level + 1].clear();
        break;
      case json::parse_event_t::key:
        TORCH_CHECK_VALUE(keys[level].insert(value.get<std::string>()).second, name,
                          ": JSON has the key ", value.dump(), " twice in one object");
        break;
      default:
        break;
    }
    return true;
  };
  json values;
  try {
    values = json::parse(text, check);
  } catch (const json::exception& error) {
    C10_THROW_ERROR(ValueError, c10::str(name, ": not valid JSON: ", error.what()));
  }
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

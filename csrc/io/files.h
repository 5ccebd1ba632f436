// Files that are read or written whole: shared by the safetensors, checkpoint and tokenizer code.
//
// By the functions of POSIX, not of std::filesystem: LibTorch's wheels export their own copy of the
// latter, which crashes in a program that finds it before the C++ library's.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

namespace muddformer {

// Parses a JSON object that is not trusted: no byte order mark, no duplicate keys, no more than 16
// levels of objects and arrays. Takes time linear in the length of the text. Throws c10::ValueError
// beginning with `name`, a path or what the text is. Python's read_json() takes the same texts.
nlohmann::json parse_json(std::string_view text, const std::string& name);

// A value, or a name out of a file, as an error shows it: not much of it.
std::string shown(const nlohmann::json& value);
std::string shown_name(const std::string& name, size_t limit = 100);

// The number of bytes of a file. Throws c10::ValueError beginning with `path` if there is none.
uint64_t size_of_file(const std::filesystem::path& path);

// Whether there is a file of this name.
bool is_file(const std::filesystem::path& path);

// Makes a directory and those above it that are not there. Throws c10::Error.
void make_directories(const std::filesystem::path& path);

// The contents of a file of at most `limit` bytes. Throws c10::ValueError beginning with `path`.
std::string read_file(const std::filesystem::path& path, uint64_t limit);

// The JSON object in a file of at most `limit` bytes; throws as parse_json() and read_file().
nlohmann::json read_json(const std::filesystem::path& path, uint64_t limit);

// Writes the parts, one after the other, into a file beside `path`, which gets that name only when
// all of it is on the disk: an interrupted write leaves the old file. Throws c10::Error.
void write_file(const std::filesystem::path& path, std::span<const std::string_view> parts);

}  // namespace muddformer

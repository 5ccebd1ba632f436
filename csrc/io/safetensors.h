// Tensors in a file: the safetensors format, read through a memory map and written atomically.
//
// The format: the length of the header, 8 bytes, little-endian; the header, JSON, `{"__metadata__":
// {text: text}, name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}`; the
// values, without gaps. Files are not trusted: everything that a header says is checked before a
// value is read. Dtypes: BOOL, U8 to U64, I8 to I64, F16, BF16, F32, F64, C64 and the F8 ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "../macros.h"

namespace muddformer {

/// What a safetensors header says of a tensor.
struct SafetensorsEntry {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t begin, end;  ///< where its values are, in bytes from the beginning of the file
};

/// An open safetensors file, mapped into memory. Not to be truncated by anyone while it is in use.
class MUDDFORMER_API SafetensorsFile {
 public:
  /// Maps a file and checks its header: no duplicate names, every entry with its three keys (others
  /// are skipped), no overlapping, missing or surplus bytes.
  ///
  /// @throws c10::ValueError beginning with the path: no such file, or what is wrong with it.
  explicit SafetensorsFile(const std::filesystem::path& path);

  /// The tensors by name.
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }

  /// The texts under `__metadata__`.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// A tensor on the CPU. It is a view of the mapped file, which stays mapped as long as it is used
  /// (a copy where the file does not align it). Tensors of one name share their values, of this
  /// object or a copy of it: clone() before you write. The file never changes.
  ///
  /// @throws c10::ValueError if there is no such tensor, or a bool that is neither 0 nor 1.
  at::Tensor tensor(const std::string& name) const;

 private:
  std::filesystem::path path_;
  at::Tensor bytes_;
  std::map<std::string, SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// All tensors of a safetensors file by name, as SafetensorsFile::tensor() gives them.
///
/// @throws c10::ValueError beginning with the path: no such file, or what is wrong with it.
MUDDFORMER_API std::map<std::string, at::Tensor> load_safetensors(
    const std::filesystem::path& path);

/// Writes tensors, from any device, into a safetensors file: byte for byte the one that the
/// format's own library writes. The file appears under its name only when all of it is on the disk.
///
/// @param metadata texts for `__metadata__`.
/// @throws c10::ValueError, c10::TypeError naming the tensor that cannot be stored: no values
///   (meta), not strided, a dtype without a name in the format, the name `__metadata__`; or naming
///   the path: a name or text that is not UTF-8, or more of them than a file may begin with.
/// @throws c10::Error if the file cannot be written; an old file is then as it was.
MUDDFORMER_API void save_safetensors(const std::map<std::string, at::Tensor>& tensors,
                                     const std::filesystem::path& path,
                                     const std::map<std::string, std::string>& metadata = {
                                         {"format", "pt"}});

}  // namespace muddformer

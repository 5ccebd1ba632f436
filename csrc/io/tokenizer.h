// Token ids as text, from Hugging Face's `tokenizer.json`.
//
// Decoding only, of byte-level vocabularies (what `muddformer train` makes, GPT-2's and their
// like): that is a look-up in a table. Encoding needs the library `tokenizers` or its like, and
// none of them can be linked into a C++ program from what their packages install; give generate()
// token ids that Python made:
//
//   python -c "from tokenizers import Tokenizer; print(Tokenizer.from_file('tokenizer.json')
//              .encode('def ').ids)"
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include "../macros.h"

namespace muddformer {

/// The bytes of every token of a byte-level vocabulary.
class MUDDFORMER_API TokenDecoder {
 public:
  /// @param path of `tokenizer.json`.
  /// @throws c10::ValueError beginning with the path: no such file, not a tokenizer, or one that is
  ///   not byte-level BPE.
  explicit TokenDecoder(const std::filesystem::path& path);

  /// The bytes of a token; none for an id that stands for no token. A character outside ASCII may
  /// be spread over tokens, so only the bytes of a whole text are sure to be UTF-8.
  std::string_view decode(int64_t id) const;

  /// The id of an added token, "<|endoftext|>" say, which ends a document for `muddformer train`.
  std::optional<int64_t> added_token(const std::string& content) const;

 private:
  std::unordered_map<int64_t, std::string> bytes_;
  std::unordered_map<std::string, int64_t> added_;
};

}  // namespace muddformer

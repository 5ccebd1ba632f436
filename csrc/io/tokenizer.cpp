#include "tokenizer.h"

#include <c10/util/Exception.h>

#include <array>
#include <nlohmann/json.hpp>

#include "files.h"

namespace muddformer {

namespace {

using nlohmann::json;

constexpr uint64_t kLargestTokenizer = uint64_t{1} << 28;
constexpr uint64_t kLargestId = (uint64_t{1} << 31) - 1;

// Byte-level vocabularies write bytes that are printable in Latin-1 as themselves, the others as
// the characters from U+0100 on. This is the byte of each such character; -1: no byte.
std::array<int, 0x200> byte_symbols() {
  std::array<int, 0x200> bytes;
  bytes.fill(-1);
  int others = 0x100;
  for (int byte = 0; byte < 0x100; ++byte) {
    const bool printable =
        (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad && byte <= 0xff);
    bytes[printable ? byte : others++] = byte;
  }
  return bytes;
}

// The bytes that a token's symbols stand for. The symbols end below U+0200, so in UTF-8 they take
// one or two bytes; json has checked that `token` is UTF-8.
std::string bytes_of(const std::string& token, const std::string& where) {
  static const std::array<int, 0x200> symbols = byte_symbols();
  std::string bytes;
  for (size_t i = 0; i < token.size(); ++i) {
    auto symbol = static_cast<unsigned>(static_cast<unsigned char>(token[i]));
    if (symbol >= 0x80 && i + 1 < token.size()) {
      symbol = ((symbol & 0x3f) << 6) | (static_cast<unsigned char>(token[++i]) & 0x3f);
    }
    TORCH_CHECK_VALUE(symbol < symbols.size() && symbols[symbol] >= 0, where, "the token ",
                      shown(json(token)), " is not made of bytes");
    bytes += static_cast<char>(symbols[symbol]);
  }
  return bytes;
}

// Other models, and BPE that marks the ends of words, write tokens that are not bytes.
void check_model(const json& model, const std::string& where) {
  const json type = model.value("type", json(model.contains("merges") ? "BPE" : "unknown"));
  TORCH_CHECK_VALUE(type == "BPE", where, "its model is ", shown(type), ", expected 'BPE'");
  TORCH_CHECK_VALUE(model.at("merges").is_array() && model.at("vocab").is_object(), where,
                    "its model has no vocab or no merges");
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json mark = model.value(name, json());
    TORCH_CHECK_VALUE(mark.is_null() || mark == "", where, "its model has the ", name, " ",
                      shown(mark));
  }
}

}  // namespace

TokenDecoder::TokenDecoder(const std::filesystem::path& path) {
  const std::string where = path.string() + ": not a byte-level tokenizer: ";
  const json values = read_json(path, kLargestTokenizer);
  const auto id_of = [&](const json& id) {
    TORCH_CHECK_VALUE(id.is_number_unsigned() && id.get<uint64_t>() <= kLargestId, where,
                      "a token has the id ", shown(id));
    return id.get<int64_t>();
  };
  try {
    const json& decoder = values.at("decoder");
    TORCH_CHECK_VALUE(decoder.is_object() && decoder.at("type") == "ByteLevel", where,
                      "its decoder is ", shown(decoder));
    check_model(values.at("model"), where);
    for (const json& token : values.value("added_tokens", json::array())) {
      const auto content = token.at("content").get<std::string>();
      const int64_t id = id_of(token.at("id"));
      added_[content] = id;
      bytes_[id] = content;  // added tokens are spelt out
    }
    for (const auto& [token, id] : values.at("model").at("vocab").items()) {
      if (!added_.contains(token)) bytes_[id_of(id)] = bytes_of(token, where);
    }
  } catch (const json::exception& error) {
    TORCH_CHECK_VALUE(false, where, shown_name(error.what()));
  }
}

std::string_view TokenDecoder::decode(int64_t id) const {
  const auto found = bytes_.find(id);
  return found == bytes_.end() ? std::string_view() : std::string_view(found->second);
}

std::optional<int64_t> TokenDecoder::added_token(const std::string& content) const {
  const auto found = added_.find(content);
  if (found == added_.end()) return std::nullopt;
  return found->second;
}

}  // namespace muddformer

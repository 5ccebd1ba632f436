#include <gtest/gtest.h>
#include <muddformer/io/tokenizer.h>

#include "files.h"

namespace muddformer {
namespace {

using testing_files::damaged;
using testing_files::error_of;
using testing_files::Folder;
using testing_files::write_bytes;

// "\u0120" stands for a space, "\u010a" for a line feed, "\u00c3\u00a9" for the bytes of e acute.
const std::string kTokenizer =
    R"({"version":"1.0","added_tokens":[{"id":0,"content":"<|end|>","special":true}],)"
    R"("decoder":{"type":"ByteLevel","add_prefix_space":true},)"
    R"("model":{"type":"BPE","merges":[],"vocab":{"<|end|>":0,"a":1,"\u0120b\u010a":2,"\u00c3":3,"\u00a9":4}}})";

TEST(TokenDecoder, Decodes) {
  const Folder folder;
  write_bytes(folder / "tokenizer.json", kTokenizer);
  const TokenDecoder decoder(folder / "tokenizer.json");
  EXPECT_EQ(decoder.decode(0), "<|end|>");
  EXPECT_EQ(decoder.decode(1), "a");
  EXPECT_EQ(decoder.decode(2), " b\n");
  EXPECT_EQ(std::string(decoder.decode(3)) + std::string(decoder.decode(4)), "\xc3\xa9");
  EXPECT_EQ(decoder.decode(5), "");
  EXPECT_EQ(decoder.decode(-1), "");
  EXPECT_EQ(decoder.added_token("<|end|>"), 0);
  EXPECT_EQ(decoder.added_token("a"), std::nullopt);
}

TEST(TokenDecoder, RefusesWhatIsNotByteLevel) {
  const Folder folder;
  const auto load = [&](const std::string& from, const std::string& to) {
    std::string text = kTokenizer;
    write_bytes(folder / "t.json", text.replace(text.find(from), from.size(), to));
    return error_of([&] { TokenDecoder(folder / "t.json"); });
  };
  const auto expect = [&](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find((folder / "t.json").string()), std::string::npos) << message;
  };
  expect(load("ByteLevel", "WordPiece"), "its decoder is");
  expect(load("\"BPE\"", "\"WordLevel\""), "its model is 'WordLevel', expected 'BPE'");
  expect(load("\"merges\":[]", "\"merges\":{}"), "no vocab or no merges");
  expect(load("\"merges\"", "\"end_of_word_suffix\":\"</w>\",\"merges\""), "end_of_word_suffix");
  expect(load("\"a\":1", "\"\\u4e16\":1"), "is not made of bytes");
  expect(load("\"a\":1", "\"a b\":1"), "is not made of bytes");
  expect(load("\"a\":1", "\"a\":-1"), "a token has the id -1");
  expect(load("\"a\":1", "\"a\":\"1\""), "a token has the id");
  expect(load("\"decoder\"", "\"decoders\""), "not a byte-level tokenizer");
  expect(load("\"id\":0", "\"ids\":0"), "not a byte-level tokenizer");
  expect(load("{", "["), "not valid JSON");
  EXPECT_NE(error_of([&] { TokenDecoder(folder / "no"); }).find("no such file"), std::string::npos);
  for (const std::string& bytes : damaged(kTokenizer, kTokenizer.size())) {
    write_bytes(folder / "t.json", bytes);
    const std::string message = error_of([&] { TokenDecoder(folder / "t.json").decode(1); });
    if (message != "no error") expect(message, "t.json");
  }
}

}  // namespace
}  // namespace muddformer

// Checkpoints: a directory with `model.safetensors` (or shards and their index) and `config.json`,
// the same that Python writes and reads. Files are not trusted: everything they claim is checked
// before it is used.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <optional>

#include "../macros.h"
#include "muddformer.h"

namespace muddformer {

/// Writes a model's weights (`model.safetensors`) and configuration (`config.json`) into a
/// directory.
///
/// The directory is made if it is not there. Each file appears under its name only when all of it
/// is on the disk, so an interrupted save leaves the old file.
///
/// @throws c10::ValueError if the parameters are on the meta device; c10::Error if the directory
///   cannot be written.
MUDDFORMER_API void save_pretrained(const MUDDFormer& model,
                                    const std::filesystem::path& directory);

/// The model of a checkpoint directory: one of save_pretrained(), here or in Python, or of the
/// public release as safetensors.
///
/// @param directory holds `config.json` with the fields of MUDDFormerConfig or the public release's
///   keys, and `model.safetensors` or `model.safetensors.index.json` with the shards that it names.
/// @param device where the parameters are put.
/// @param dtype of the parameters. Left out: as they are stored.
/// @throws c10::ValueError naming the file and what is wrong with it: missing, broken, unknown or
///   missing parameters, another shape or dtype, unknown keys; c10::TypeError for a wrong `dtype`.
MUDDFORMER_API MUDDFormer from_pretrained(const std::filesystem::path& directory,
                                          c10::Device device = c10::kCPU,
                                          std::optional<c10::ScalarType> dtype = std::nullopt);

/// The configuration in a checkpoint directory, with our field names or the public release's keys.
///
/// @throws c10::ValueError naming the file and what is wrong with it.
MUDDFORMER_API MUDDFormerConfig load_config(const std::filesystem::path& directory);

}  // namespace muddformer

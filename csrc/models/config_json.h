// Configurations from parsed JSON: what MUDDFormerConfig's functions of JSON texts do after
// parsing.
#pragma once

#include <nlohmann/json.hpp>

#include "config.h"

namespace muddformer {

MUDDFormerConfig config_from(const nlohmann::json& values);
MUDDFormerConfig config_from_official(const nlohmann::json& values);
bool is_official(const nlohmann::json& values);

}  // namespace muddformer

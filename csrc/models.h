// Modules and models with Multiway Dynamic Dense (MUDD) connections for LibTorch, their files and
// generation: everything public. The operators are in muddformer.h.
#pragma once

#include "inference/generation.h"
#include "io/safetensors.h"
#include "io/tokenizer.h"
#include "models/checkpoint.h"
#include "models/config.h"
#include "models/kv_cache.h"
#include "models/layers.h"
#include "models/muddformer.h"
#include "nn.h"

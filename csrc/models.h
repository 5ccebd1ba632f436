// The models and modules with Multiway Dynamic Dense (MUDD) connections for LibTorch: everything
// public.
#pragma once

#include "models/checkpoint.h"
#include "models/config.h"
#include "models/depth_aggregation.h"
#include "models/generation.h"
#include "models/kv_cache.h"
#include "models/layers.h"
#include "models/mudd_stack.h"
#include "models/muddformer.h"
#include "models/safetensors.h"
#include "models/tokenizer.h"
